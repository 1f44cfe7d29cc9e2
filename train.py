"""Pretrains a model: `python train.py [CONFIG.yaml] [key=value ...]`; without arguments, configs/tiny.yaml."""

from pathlib import Path

from mixtral_jax import cli
from mixtral_jax.config_loading import key_table, load_config, user_path
from mixtral_jax.console import make_console
from mixtral_jax.data.sources import find_sources
from mixtral_jax.distributed.processes import joined
from mixtral_jax.distributed.supervisor import ONWARD

DEFAULT = Path(__file__).parent / "configs" / "tiny.yaml"


def main(arguments: list[str]) -> None:
    """Trains, or resumes, the run that the arguments describe."""
    if {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\n\nEvery key with its default; docs/config.md says what they mean:\n\n{key_table()}")
        return
    named = arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file())
    config = load_config(user_path(arguments[0]) if named else DEFAULT, arguments[1:] if named else arguments)
    find_sources(config.data.sources)
    cli.prepare(config.distributed, config.data.cache_dir)
    with joined(config.distributed, ONWARD):
        # Heavy imports come after the cheap checks, so that a typing error is told at once.
        from mixtral_jax.training.summary import summarize
        from mixtral_jax.training.trainer import Trainer

        console = make_console()
        say = lambda text: console.print(text, soft_wrap=True)  # noqa: E731
        outcome = Trainer(config, say=say, began=cli.BEGAN).run()
        summarize(config, outcome, console)


if __name__ == "__main__":
    cli.run(main, several=True)
