"""The verbs beside training and evaluation: `python -m mixtral_jax VERB ...`, or `mixtral-jax VERB ...`."""

from mixtral_jax import cli
from mixtral_jax.config import UserError
from mixtral_jax.verbs import VERBS


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


def start() -> None:
    """What the command `mixtral-jax` calls."""
    cli.run(main)


if __name__ == "__main__":
    start()
