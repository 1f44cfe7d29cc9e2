"""datatrove's local executor, made quiet and mortal: no log lines on the terminal, no process that outlives ours."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from functools import lru_cache
from typing import Any

import multiprocess
import multiprocess.connection
import multiprocess.pool
from datatrove.executor import LocalPipelineExecutor
from loguru import logger

PR_SET_PDEATHSIG = 1
WATCH = 0.5  # seconds between two looks whether the main process lives


class MortalPool(multiprocess.pool.Pool):
    """A pool whose work fails when a worker is killed; of the standard one it would be waited for, for ever."""

    def imap_unordered(self, func: Any, iterable: Any, chunksize: int = 1) -> Any:
        """As the standard one's."""
        results = super().imap_unordered(func, iterable, chunksize)
        workers = list(self._pool)

        def watch() -> None:
            # They end when all is done, or one is lost.
            multiprocess.connection.wait([worker.sentinel for worker in workers])
            results._set(0, (False, RuntimeError("a worker was killed; was it out of memory? lower executor.workers")))

        threading.Thread(target=watch, daemon=True).start()
        return results


class QuietExecutor(LocalPipelineExecutor):
    """Runs tasks in processes of this machine; what they log is in files below `logging_dir` only."""

    def run(self) -> Any:
        """Runs the tasks that are not finished yet."""
        die_with_parent_at_fork()
        self.owner = os.getpid()
        # One process imports everything; the workers of all stages are copies of it.
        multiprocess.set_forkserver_preload(["mixtral_jax.preparation.stages"])
        multiprocess.pool.Pool = MortalPool  # where datatrove takes it from
        with _silence():
            return super().run()

    def _launch_run_for_rank(self, rank: int, ranks_q: Any, completed: Any = None, completed_lock: Any = None) -> Any:
        if self.workers > 1:
            die_with_parent_at_fork()
            _die_with(self.owner)
        with _silence():
            return super()._launch_run_for_rank(rank, ranks_q, completed, completed_lock)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        return super()._run_for_rank(rank, local_rank + 1, node_rank)  # only the first one would log to the terminal


def die_with_parent() -> None:
    """Asks the system to end this process when its parent ends, so that a killed run leaves nobody who writes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@lru_cache
def die_with_parent_at_fork() -> None:
    """Does so for every process that this one forks from now on."""
    os.register_at_fork(after_in_child=die_with_parent)


@lru_cache
def _die_with(owner: int) -> None:
    """Ends this process soon after another one. The server that workers are forked from lives as long as they do."""

    def watch() -> None:
        while True:
            time.sleep(WATCH)
            try:
                os.kill(owner, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _silence() -> Any:
    logger.remove()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
    logger.remove()
