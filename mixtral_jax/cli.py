"""What the entry scripts share: one sentence and exit code 2 for a user's mistake."""

import os
import sys
from collections.abc import Callable

from mixtral_jax.config import DistributedConfig, UserError
from mixtral_jax.distributed.processes import may_be_several, speaks
from mixtral_jax.kernels.cpu.memory import restart_with_huge_pages


def run(main: Callable[[list[str]], None], *, several: bool = False) -> None:
    """Calls `main` with the command line's arguments and turns a `UserError` into a sentence and exit code 2.

    Args:
        main: the program.
        several: the processes that a launcher starts run it together, so one tells of a mistake that all make.
    """
    # Nothing here uses a hub unless a source names one; libraries must not wait for a network at start.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        main(sys.argv[1:])
    except UserError as error:
        if not several or speaks():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare(distributed: DistributedConfig) -> None:
    """Prepares a program that may compute on this machine's CPU; call it before anything heavy is imported."""
    if not may_be_several(distributed, os.environ):
        restart_with_huge_pages()
