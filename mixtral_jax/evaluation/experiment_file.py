"""The file of an experiment: one configuration, what variants change in it, and seeds; together they name the runs."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from mixtral_jax.config import Config, UserError
from mixtral_jax.config_loading import home_expanded, load_config, parse_structured, read_config_file


@dataclass(frozen=True)
class ExperimentConfig:
    """The keys of an experiment's file."""

    base: str = MISSING  # a configuration; relative to the experiment's file
    # By name what each changes, section.key=value; the first is what others compare with. {seed} is the run's, so that
    # one variant can begin where an earlier one ends: init_from=runs/FILE/VARIANT/{seed}.
    variants: dict[str, list[str]] = MISSING
    seeds: list[int] = MISSING
    overrides: list[str] = field(default_factory=list)  # of all variants
    run_dir: str = ""  # holds a directory a variant, and in it a run a seed; empty: runs/<name of the file>


@dataclass(frozen=True)
class Run:
    """One of an experiment's runs."""

    variant: str
    seed: int
    config: Config

    def __str__(self) -> str:
        return f"{self.variant}/{self.seed}"


def load_experiment(path: Path, overrides: Sequence[str]) -> list[Run]:
    """Reads an experiment's file; the runs come seed by seed, so that what is there early can be compared.

    Args:
        path: the YAML file.
        overrides: `section.key=value` for all runs.

    Raises:
        UserError: the file, a configuration or a change in it is wrong, or a run would not be measured at its end.
    """
    file = parse_structured(ExperimentConfig, read_config_file(path), where=str(path))
    for name in file.variants:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"variant '{name}' of {path} names a directory: use letters, digits, points and dashes")
    for what, values in (("variants", list(file.variants)), ("seeds", file.seeds)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{what} of {path} are {values}: name at least one, and each once")
    root = Path(home_expanded(file.run_dir) or f"runs/{path.stem}")
    runs = []
    for seed in file.seeds:
        for variant, changes in file.variants.items():
            given = [word.replace("{seed}", str(seed)) for word in (*file.overrides, *changes, *overrides)]
            own = next((word for word in given if word.split("=")[0] in ("seed", "run_dir")), None)
            if own:
                raise UserError(f"{own} is decided by the experiment: leave it out of {path} and the command line")
            config = load_config(path.parent / home_expanded(file.base), given)
            if config.train.eval_every == 0 or config.train.steps % config.train.eval_every:
                raise UserError(
                    f"variant '{variant}' measures held-out text every train.eval_every={config.train.eval_every} of "
                    f"{config.train.steps} steps, and not at the end: set a divisor of train.steps"
                )
            if config.objective.name == "preference":
                raise UserError(
                    f"variant '{variant}' learns preferences, and no loss by token is measured: leave it out"
                )
            config = dataclasses.replace(config, seed=seed, run_dir=str(root / variant / str(seed)))
            runs.append(Run(variant, seed, config))
    return runs


def choose(runs: list[Run], only: str | None) -> list[Run]:
    """Takes all runs, or the one of a name (VARIANT/SEED) or a number from 0 (of a job in an array).

    Raises:
        UserError: there is no such run.
    """
    if only is None:
        return runs
    found = [run for number, run in enumerate(runs) if only in (str(run), str(number))]
    if not found:
        raise UserError(f"there is no run '{only}': name one of {', '.join(map(str, runs))}, or 0 to {len(runs) - 1}")
    return found
