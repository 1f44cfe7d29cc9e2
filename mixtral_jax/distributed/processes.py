"""Several processes that run one program: how they join, agree, and end together; see `cluster` for who belongs to it.

Every process calls the same functions of this module in the same order. In a lone process they cost nothing.
"""

import contextlib
import itertools
import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mixtral_jax.config import DistributedConfig, UserError
from mixtral_jax.distributed.cluster import START_TIMEOUT, Cluster, find_cluster, launched_as, may_be_several
from mixtral_jax.distributed.step_watch import StepWatch
from mixtral_jax.distributed.supervisor import ANEW, GIVEN_UP, supervise
from mixtral_jax.distributed.watchdog import ROOT, USER_ERROR, Watchdog

T = TypeVar("T")

CRASH = 1  # exit code of a program's own error
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; the watchdog ends what waits in vain


_joined: Watchdog | None = None  # of this process among the others
_calls = itertools.count()  # of the functions below, which all processes make in the same order
_watch: StepWatch | None = None  # of this process, inside of `joined`
_speaks: bool | None = None  # whether this process tells of its mistakes; None: as its number says


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return _joined is None or _joined.process == 0


def number() -> int:
    """The number of this process among all, from 0."""
    return _joined.process if _joined else 0


def count() -> int:
    """How many processes there are."""
    return _joined.count if _joined else 1


def speaks() -> bool:
    """Whether this process is to tell of a mistake that all processes may have made."""
    return launched_as(sys.argv, os.environ) == 0 if _speaks is None else _speaks


@contextlib.contextmanager
def joined(config: DistributedConfig, restart: str = ANEW) -> Iterator[None]:
    """Joins the other processes, if there are any, for as long as it is entered; call it before any use of devices.

    Process 0 alone keeps its standard output. An error in any process ends all of them, with one sentence. A lone
    process is watched for steps that hang.

    Args:
        config: who the others are, if no launcher says so.
        restart: what to do when a process is lost or hangs.

    Raises:
        UserError: the processes did not find each other.
    """
    global _joined, _speaks, _watch
    cluster = None
    if may_be_several(config, os.environ):
        supervise(restart)
        cluster = find_cluster(config, os.environ)
    _speaks = True  # alone, or about things that another process may not even see
    if cluster is None:
        _watch = lone = StepWatch(float(config.step_timeout), restart)
        lone.start()
        try:
            yield
        finally:
            lone.stop()
            _watch = None
        return
    _joined = _watch = mine = _connect(cluster, config, restart)
    try:
        yield
        barrier()  # what one still does, the others must wait for
    except BaseException as error:
        _end_all(mine, error)
    mine.stop()
    _joined = _watch = None
    import jax

    jax.distributed.shutdown()


def _connect(cluster: Cluster, config: DistributedConfig, restart: str) -> Watchdog:
    import jax
    from jax._src.distributed import global_state  # the one way to its key-value store

    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=START_TIMEOUT,
            # The watchdog is to speak first (JAX may act after half of this already); JAX itself, loudly, where the
            # coordinator is gone.
            heartbeat_timeout_seconds=3 * config.heartbeat_timeout,
            shutdown_timeout_seconds=60,
            coordinator_bind_address=cluster.bind_address,
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the {cluster.num_processes} processes did not find each other at {cluster.coordinator} ({reason}): see "
            "that all were started, that the address is that of process 0 and that its port is free and open"
        ) from None
    if cluster.process_id:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        logging.disable(logging.WARNING)
    watchdog = Watchdog(
        global_state.client, cluster.process_id, cluster.num_processes,
        heartbeat_timeout=config.heartbeat_timeout, step_timeout=config.step_timeout, restart=restart,
    )  # fmt: skip
    watchdog.start()
    return watchdog


def _end_all(mine: Watchdog, error: BaseException) -> None:
    """Ends every process for an error in this one; does not return."""
    if isinstance(error, UserError):
        mine.end_all(USER_ERROR, str(error))
    if isinstance(error, KeyboardInterrupt):
        mine.end_all(130, "interrupted")
    code = CRASH
    if _is_of_communication(error):
        mine.await_verdict()
        code = GIVEN_UP
    traceback.print_exception(error)
    who = f"process {mine.process} on {socket.gethostname()}"
    first_line = (str(error).strip() or "no message").splitlines()[0]
    remedy = f"its log has the traceback; fix it and {mine.restart}"
    text = f"{who} failed with {type(error).__name__}: {first_line}; {remedy}"
    mine.end_all(code, text)


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error may come from the loss of another process."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


@contextlib.contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Undoes something also where this process is ended, in here, because another one failed or was lost."""
    farewells = _joined.farewells if _joined else []
    farewells.append(undo)
    try:
        yield
    finally:
        undo()
        farewells.remove(undo)


def barrier() -> None:
    """Waits until every process is here."""
    if _joined:
        _joined.client.wait_at_barrier(f"{ROOT}{next(_calls)}", FOREVER)


def from_main(compute: Callable[[], T]) -> T:
    """Lets process 0 compute a JSON value and returns it in every process."""
    if _joined is None:
        return compute()
    key = f"{ROOT}value/{next(_calls)}"
    if _joined.process == 0:
        value = compute()
        _joined.client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(_joined.client.blocking_key_value_get(key, FOREVER))


def take_turn() -> int:
    """Takes a number that this module's other calls do not take, in every process the same; in the main thread."""
    return next(_calls) if _joined else 0


def with_all(
    turn: int,
    work: Callable[[str], str],
    compute: Callable[[Callable[[list[str]], list[str]]], T],
    threads: int | None = None,
) -> T:
    """Lets process 0 compute a JSON value with the help of all others and returns it in every process.

    Args:
        turn: of this computation among the calls of this module, see `take_turn`; it may be in another thread.
        work: what any process may do to one item for the others; may raise `OSError`, `ValueError` or `UserError`.
        compute: is given a function that does the work on many items, of which each process takes its share.
        threads: of each process, that do so; None: as many as the machine bears.
    """
    if _joined is None:
        return compute(lambda items: work_on(work, items, threads))
    me, count, client = _joined.process, _joined.count, _joined.client
    root = f"{ROOT}all/{turn}"
    rounds = itertools.count()

    def share(items: list[str]) -> list[str]:
        place = f"{root}/{next(rounds)}"
        client.key_value_set(place, json.dumps({"items": items}))
        found: dict[int, list[str]] = {0: work_on(work, items[::count], threads)}
        for process in range(1, count):
            answer = json.loads(client.blocking_key_value_get(f"{place}/{process}", FOREVER))
            if "error" in answer:
                raise _RAISED[answer["error"]](*answer["facts"])
            found[process] = answer["found"]
        return [found[number % count][number // count] for number in range(len(items))]

    if me == 0:
        value = compute(share)
        client.key_value_set(f"{root}/{next(rounds)}", json.dumps({"value": value}))
        return value
    while True:
        place = f"{root}/{next(rounds)}"
        asked = json.loads(client.blocking_key_value_get(place, FOREVER))
        if "value" in asked:
            return asked["value"]
        try:
            answer: dict[str, Any] = {"found": work_on(work, asked["items"][me::count], threads)}
        except OSError as error:
            answer = {"error": "OSError", "facts": [error.errno, error.strerror, error.filename]}
        except (UserError, ValueError) as error:
            answer = {"error": "UserError" if isinstance(error, UserError) else "ValueError", "facts": [str(error)]}
        client.key_value_set(f"{place}/{me}", json.dumps(answer))


_RAISED: dict[str, type[Exception]] = {kind.__name__: kind for kind in (OSError, UserError, ValueError)}


def work_on(work: Callable[[str], str], items: list[str], threads: int | None = None) -> list[str]:
    """Does some work on items in threads of this process; returns what it gave."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def main_first(work: Callable[[], T]) -> T:
    """Does the same in every process, in process 0 before all others: they find what it has built."""
    if _joined and _joined.process:
        barrier()
        return work()
    result = work()
    barrier()
    return result


def check_same(value: str, remedy: str) -> None:
    """Raises `UserError` with the remedy in a process whose value is not that of process 0."""
    if from_main(lambda: value) != value:
        raise UserError(remedy)


def begin(step: int) -> None:
    """Tells the watchdog that this process goes to work on a step."""
    if _watch:
        _watch.begin(step)


def progress() -> None:
    """Tells the watchdog that the devices have finished a step or a batch, or that the first is to come."""
    if _watch:
        _watch.progress()


def stop_waiting() -> None:
    """Tells the watchdog that no step is to be waited for any more."""
    if _watch:
        _watch.stop_waiting()


def is_alone() -> bool:
    """Whether no other process takes part."""
    return _joined is None
