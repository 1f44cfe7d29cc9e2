"""The verbs beside training and evaluation: `python -m mixtral_jax VERB ...`."""

import argparse
import importlib.util

from mixtral_jax import cli
from mixtral_jax.config import UserError


def prepare(arguments: list[str]) -> None:
    """Web pages and documents to a clean token cache: prepare CONFIG [key=value ...]."""
    parser = argparse.ArgumentParser(prog="mixtral_jax prepare", description=prepare.__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/prepare_samples.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as executor.workers=8")
    options = parser.parse_intermixed_args(arguments)
    from mixtral_jax.preparation.config import load_prepare_config

    config = load_prepare_config(options.config, options.overrides)
    if importlib.util.find_spec("datatrove") is None:
        raise UserError("prepare needs packages that are not installed: pip install 'mixtral_jax[prepare]'")
    from rich.console import Console

    from mixtral_jax.preparation.running import prepare as run

    run(config, Console())


VERBS = {"prepare": prepare}


def main(arguments: list[str]) -> None:
    """Calls the verb that the first argument names."""
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print("usage: python -m mixtral_jax VERB ...\n\nverbs:")
        print("\n".join(f"  {name:10} {call.__doc__}" for name, call in VERBS.items()))
    elif verb not in VERBS:
        raise UserError(f"'{verb}' is no verb: choose one of {', '.join(VERBS)}")
    else:
        VERBS[verb](arguments[1:])


if __name__ == "__main__":
    cli.run(main)
