"""What the entry scripts share: one sentence and exit code 2 for a user's mistake."""

import _thread
import argparse
import glob
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixtral_jax.config import DistributedConfig, NoCheckpointError, UserError
from mixtral_jax.distributed.cluster import may_be_several
from mixtral_jax.distributed.processes import speaks
from mixtral_jax.kernels.cpu.memory import ACCELERATORS, restart_with_huge_pages

BEGAN = time.monotonic()  # before anything heavy is imported
PATIENCE = 20  # seconds that threads of libraries get to end in after an error: Orbax's would wait for ten minutes


def run(main: Callable[[list[str]], None], *, several: bool = False) -> None:
    """Calls `main` with the command line's arguments and turns a `UserError` into a sentence and exit code 2.

    Args:
        main: the program.
        several: the processes that a launcher starts run it together, so one tells of a mistake that all make.
    """
    sys.stdout, sys.stderr = (SteadyStream(stream) for stream in (sys.stdout, sys.stderr))  # type: ignore[assignment]
    # Nothing here uses a hub unless a source names one; libraries must not wait for a network at start.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    choose_platform()
    sys.unraisablehook = _interrupt_again
    try:
        main(sys.argv[1:])
    except UserError as error:
        if not several or speaks():
            print(f"error: {error}", file=sys.stderr)
        _end(2)
    except (KeyboardInterrupt, Exception) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, KeyboardInterrupt):  # imports in C++ make another error of it
            cause = cause.__cause__ or cause.__context__
        if cause:
            print("interrupted", file=sys.stderr)
            _end(130)
        traceback.print_exc()
        _end(1)


def _interrupt_again(lost: Any) -> None:
    """Lets Ctrl-C come once more if it came where Python ignores errors, as in JAX's callback of garbage collection."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
        return
    later = threading.Timer(0.05, _thread.interrupt_main)  # not now, when this function would be what it ends
    later.daemon = True
    later.start()


def _end(code: int) -> None:
    """Ends this process as usual, or at once where what it still waits for does not come."""
    sys.stdout.flush()  # which Python itself does after it has waited for threads
    late = threading.Timer(PATIENCE, os._exit, [code])
    late.daemon = True
    try:
        late.start()
    except RuntimeError:  # there is no memory for another thread, which is what those that wait may lack too
        os._exit(code)
    sys.exit(code)


class Arguments(argparse.ArgumentParser):
    """Reads a command line whose mistakes are one sentence each, as all others are."""

    def add_argument(self, *names: Any, **about: Any) -> argparse.Action:
        """Adds an argument; of words that may be none, Python 3.11 otherwise says that they are required."""
        if about.get("nargs") == "*":
            about.setdefault("default", [])
        return super().add_argument(*names, **about)

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` where argparse would print the usage and exit."""
        raise UserError(f"{message}; see {self.prog} --help")


def check_checkpoint(path: Path) -> None:
    """Raises `UserError` where no checkpoint can be; what else there is to check takes heavy imports."""
    if not path.is_dir():
        raise NoCheckpointError(path)


def choose_platform() -> None:
    """Chooses the CPU where there is nothing else, before JAX looks for plugins.

    Those that the planner brings complain at length where they find no device.
    """
    if sys.platform == "linux" and not any(glob.glob(pattern) for pattern in ACCELERATORS):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


class SteadyStream:
    """A standard stream that outlives its reader and its disk, and prints every text in any encoding.

    A run goes on when `head` has seen enough or the disk under its log is full; what it writes itself is guarded
    elsewhere.
    """

    def __init__(self, stream: Any):
        """Wraps a stream; None stands for one that the caller has closed."""
        self._stream: Any = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes a text, or drops it where nothing can be written any more."""
        return self._steadily(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """Flushes what can be."""
        self._steadily(self._stream.flush)

    def _steadily(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._stream.name == "<stdout>":
                print(f"standard output is lost ({error.strerror}): going on without it", file=sys.stderr)
            return act()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def cache_dir_of(overrides: Sequence[str]) -> str:
    """Finds `data.cache_dir` among overrides, before there is a configuration."""
    return next((word.partition("=")[2] for word in overrides if word.startswith("data.cache_dir=")), "")


def prepare(distributed: DistributedConfig, cache_dir: str) -> None:
    """Prepares a program that may compute on this machine's CPU; call it before anything heavy is imported.

    Args:
        distributed: whether there are other processes.
        cache_dir: where kernels may be kept if not beside their code; empty: the user's own caches.
    """
    if cache_dir:
        os.environ["MIXTRAL_JAX_CACHE_DIR"] = cache_dir
    if not may_be_several(distributed, os.environ):
        restart_with_huge_pages()
