"""The runs of an experiment, trained one after the other."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mixtral_jax.evaluation.experiment_file import Run
from mixtral_jax.evaluation.experiments import read_seed
from mixtral_jax.runs.run_dir import RunDirectory
from mixtral_jax.training.trainer import Trainer


def run_all(runs: Sequence[Run], say: Callable[[str], None]) -> None:
    """Trains what is not done yet, in this order; what was begun goes on.

    A signal ends the run at work, and no other begins.

    Raises:
        UserError: what `Trainer` raises, or a run that is done was made with another configuration.
    """
    for number, run in enumerate(runs, 1):
        if read_seed(run.config):
            RunDirectory(Path(run.config.run_dir), run.config).close()  # compares the configurations
            say(f"{run} is done")
            continue
        say(f"{run}, {number} of {len(runs)}")
        if not Trainer(run.config, say).run().finished:
            say("stopped; the same command goes on")
            return
