"""The watchdog without processes: threads around one store, each of which stands for a process."""

import threading
import time

import pytest

from mixtral_jax.distributed import watchdog as module
from mixtral_jax.distributed.watchdog import Watchdog

# A thread ends by the exception that stands in for the end of its process.
pytestmark = [pytest.mark.drills, pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")]

HEARTBEAT = 2.0  # seconds, of which a loaded machine may take some


class Store:
    """The coordination service's key-value store, in memory."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise RuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in list(self.values.items()) if name.startswith(key)]


class Frozen(Store):
    """What a process sees that has been cut off: a store that takes nothing."""

    def key_value_set(self, key, value, allow_overwrite=False):
        pass


@pytest.fixture
def group(monkeypatch):
    """Makes watchdogs of a group; leaving, which ends the process, ends the thread alone, and is noted."""
    left: dict[str, int] = {}
    made: list[Watchdog] = []

    def leave(code):
        left[threading.current_thread().name.removeprefix("main of ")] = code
        raise SystemExit

    monkeypatch.setattr(module.os, "_exit", leave)

    def make(count, *, step_timeout=60.0, stores=None):
        shared = Store()
        for process in range(count):
            store = (stores or {}).get(process, shared)
            dog = Watchdog(store, process, count, heartbeat_timeout=HEARTBEAT, step_timeout=step_timeout)
            dog._thread.name = str(process)
            made.append(dog)
            dog.start()
        return made, left

    yield make
    for dog in made:
        dog._stopped.set()
        if not dog._leaving.locked():  # whoever comes second to leave waits for the process to end, here for ever
            dog._thread.join()


def wait_until_left(left, *processes):
    deadline = time.monotonic() + 30
    while set(left) != {str(process) for process in processes}:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_a_healthy_group_goes_on(group):
    dogs, left = group(3, step_timeout=2.0)
    for step in range(6):
        for dog in dogs:
            dog.begin(step)
            dog.progress()
        time.sleep(HEARTBEAT / 3)
    assert left == {}


def test_a_process_without_signs_of_life_is_named_and_the_others_leave(group, capfd):
    dogs, left = group(3)
    time.sleep(HEARTBEAT / 2)
    dogs[2]._stopped.set()
    wait_until_left(left, 0, 1)
    assert set(left.values()) == {75}
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert len(set(lines)) == 1
    assert lines[0].startswith("error: process 2 on ")
    assert "gave no sign of life for 2 seconds" in lines[0]
    assert "the same command again" in lines[0]


def test_the_one_that_is_behind_is_blamed_for_a_hang(group, capfd):
    dogs, left = group(3, step_timeout=1.0)
    for process, step in enumerate((7, 5, 7)):
        dogs[process].begin(step)
        dogs[process].progress()
    wait_until_left(left, 0, 1, 2)
    assert set(left.values()) == {75}
    for line in capfd.readouterr().err.splitlines():
        assert "no step was finished in 1 seconds" in line
        assert "process 1 on " in line
        assert "hangs in or before step 5" in line


def test_before_the_first_step_and_after_the_last_nothing_is_late(group):
    dogs, left = group(2, step_timeout=HEARTBEAT / 2)
    for dog in dogs:
        dog.progress()
        dog.stop_waiting()
    time.sleep(HEARTBEAT)
    assert left == {}


def test_a_mistake_is_told_by_process_0_alone_whoever_made_it(group, capfd):
    dogs, left = group(3)
    time.sleep(HEARTBEAT / 2)
    threading.Thread(target=dogs[1].end_all, args=(2, "the file is missing"), name="main of 1", daemon=True).start()
    wait_until_left(left, 0, 1, 2)
    assert set(left.values()) == {2}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: the file is missing (process 1 on ")


def test_a_mistake_of_all_is_told_once(group, capfd):
    dogs, left = group(2)
    for number, dog in enumerate(dogs):
        end = {"target": dog.end_all, "args": (2, "the mesh is wrong"), "name": f"main of {number}"}
        threading.Thread(**end, daemon=True).start()
    wait_until_left(left, 0, 1)
    assert set(left.values()) == {2}
    assert capfd.readouterr().err == "error: the mesh is wrong\n"


def test_the_first_reason_holds(group, capfd):
    dogs, left = group(2)
    dogs[0]._announce(module.Verdict(2, "the first", 0))
    dogs[0]._announce(module.Verdict(75, "the second", 0))
    wait_until_left(left, 0, 1)
    assert set(left.values()) == {2}
    assert capfd.readouterr().err == "error: the first\n"


def test_what_cannot_reach_the_store_is_lost(group, capfd):
    cut_off = Frozen()
    dogs, left = group(2, stores={1: cut_off})
    dogs[0].client.values["mixtral_jax/alive/1"] = "1 0 elsewhere"
    wait_until_left(left, 0)
    assert "process 1 on elsewhere" in capfd.readouterr().err
