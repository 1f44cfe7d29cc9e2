"""A parent for a process of a cluster: it says in a clear last line how its child ended, whatever ended it.

JAX ends a process that has lost the coordinator with `abort` and a trace of C++, and the system's own killer says
nothing at all. No code inside the process can have the last word then.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from types import FrameType

GIVEN_UP = 75  # exit code (EX_TEMPFAIL) of a process that is whole itself: the same command, started again, goes on
ANEW = "start the same command again"  # what to do where nothing was kept
ONWARD = f"{ANEW}: it goes on from the newest checkpoint"


def supervise(restart: str) -> None:
    """Forks and returns in the child alone; the parent passes signals on, waits, and exits as the child did.

    Call it before anything starts threads.

    Args:
        restart: what to do when the cause is mended.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        return
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child as well
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0 and -code in asked:
        code = 128 - code
    elif code < 0:
        print(f"error: {_explain(-code, restart)}", file=sys.stderr, flush=True)
        code = GIVEN_UP
    os._exit(code)


def _explain(number: int, restart: str) -> str:
    here = f"the process on {socket.gethostname()}"
    if number == signal.SIGABRT:
        return (
            f"{here} was ended because another process, or the connection to it, was lost (see the message of JAX "
            f"above): find the first error in the logs of all processes, then {restart}"
        )
    cause = "; was it out of memory?" if number == signal.SIGKILL else ""
    return f"{here} was ended by {signal.Signals(number).name}{cause}: fix the cause, then {restart}"


def _die_with(parent: int) -> None:
    """Asks Linux to kill this process when its parent is killed."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(GIVEN_UP)
