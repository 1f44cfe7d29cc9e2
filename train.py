"""Pretrains a model: `python train.py [CONFIG.yaml] [key=value ...]`; without arguments, configs/tiny.yaml."""

from pathlib import Path

from rich.console import Console

from mixtral_jax import cli
from mixtral_jax.config_loading import load_config
from mixtral_jax.distributed.processes import joined

DEFAULT = Path(__file__).parent / "configs" / "tiny.yaml"


def main(arguments: list[str]) -> None:
    """Trains, or resumes, the run that the arguments describe."""
    named = arguments and "=" not in arguments[0]
    config = load_config(arguments[0] if named else DEFAULT, arguments[1:] if named else arguments)
    cli.prepare(config.distributed)
    with joined(config.distributed):
        # Heavy imports come after the cheap checks, so that a typing error is told at once.
        from mixtral_jax.training.summary import summarize
        from mixtral_jax.training.trainer import Trainer

        console = Console()
        say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
        outcome = Trainer(config, say=say).run()
        summarize(config, outcome, console)


if __name__ == "__main__":
    cli.run(main, several=True)
