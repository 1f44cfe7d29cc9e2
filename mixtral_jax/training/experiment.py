"""The runs of an experiment, trained one after the other."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mixtral_jax.config import UserError
from mixtral_jax.evaluation.experiment_file import Run
from mixtral_jax.evaluation.experiments import read_seed
from mixtral_jax.runs.run_dir import RunDirectory
from mixtral_jax.training.trainer import Trainer


def run_all(runs: Sequence[Run], chosen: Sequence[Run], say: Callable[[str], None]) -> None:
    """Trains what is not done yet, in this order; what was begun goes on.

    A signal ends the run at work, and no other begins.

    Args:
        runs: of the experiment.
        chosen: those of them to train.
        say: prints a line for people.

    Raises:
        UserError: what `Trainer` raises, a run that is done was made with another configuration, or one that begins
            where another ends comes before that.
    """
    for number, run in enumerate(chosen, 1):
        if read_seed(run.config):
            RunDirectory(Path(run.config.run_dir), run.config).close()  # compares the configurations
            say(f"{run} is done")
            continue
        before = next((other for other in runs if other.config.run_dir == run.config.init_from), None)
        if before and not read_seed(before.config):
            raise UserError(f"{run} begins where {before} ends, which is not done: train that first")
        say(f"{run}, {number} of {len(chosen)}")
        if not Trainer(run.config, say).run().finished:
            say("stopped; the same command goes on")
            return
