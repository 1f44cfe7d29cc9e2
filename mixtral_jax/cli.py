"""What the entry scripts share: one sentence and exit code 2 for a user's mistake."""

import os
import sys
from collections.abc import Callable

from mixtral_jax.config import UserError
from mixtral_jax.distributed.processes import speaks

TUNABLES = "GLIBC_TUNABLES"


def run(main: Callable[[list[str]], None], *, several: bool = False) -> None:
    """Calls `main` with the command line's arguments and turns a `UserError` into a sentence and exit code 2.

    Args:
        main: the program.
        several: the processes that a launcher starts run it together, so one tells of a mistake that all make.
    """
    if several:
        _ask_for_huge_pages()
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


def _ask_for_huge_pages() -> None:
    """Starts the program again with huge pages for large memory, which Linux gives to who asks.

    XLA for CPU takes its temporaries anew for every step; page by page of 4 KiB that is a tenth of its time. The C
    library reads the wish at start alone.
    """
    if sys.platform != "linux" or TUNABLES in os.environ:
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
