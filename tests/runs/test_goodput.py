"""The account of a run's time over its starts, with a clock that stands still in between."""

import json
import math
from types import SimpleNamespace

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.runs import goodput


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so: `now` by the wall, `pass_` in a process."""
    times = SimpleNamespace(wall=1e9, steady=5.0)
    fake = SimpleNamespace(time=lambda: times.wall, monotonic=lambda: times.steady)
    monkeypatch.setattr(goodput, "time", fake)

    def after(seconds):
        times.wall += seconds
        times.steady += seconds

    return SimpleNamespace(after=after, times=times)


def spent(account):
    account.share()
    return {name: seconds for name, seconds in account._seconds.items() if seconds}


def test_every_second_is_counted_once(tmp_path, clock):
    account = goodput.Goodput(tmp_path, 0, 30.0)

    def batches():
        for number in range(3):
            clock.after(2)
            yield number

    for _ in account.waiting(batches()):
        clock.after(10)
    account.compiled(8.0)
    with account.part("saves"):
        clock.after(1)
    with account.part("evaluation"):
        clock.after(4)
    found = spent(account)
    assert found == {"steps": 22, "start": 30, "compile": 8, "data": 6, "saves": 1, "evaluation": 4}
    assert account.share() == 22 / math.fsum(found.values())
    assert account.text() == (
        "goodput 31.0% of 0:01:11 in 1 start: steps 0:00:22, start 0:00:30, compile 0:00:08, data 0:00:06, "
        "evaluation 0:00:04, saves 0:00:01"
    )


@pytest.mark.drills
def test_a_restart_counts_what_was_lost_and_how_long_nothing_ran(tmp_path, clock):
    first = goodput.Goodput(tmp_path, 0, 10.0)
    clock.after(50)
    first.keep(5)
    clock.after(20)
    first.share()  # written; then the process is killed 7 seconds later, and 100 seconds pass
    clock.after(107)
    clock.after(15)  # the next start takes 15 until here
    second = goodput.Goodput(tmp_path, 5, 15.0)
    clock.after(3)
    assert spent(second) == {"steps": 53, "start": 25, "lost": 20, "down": 107}
    assert "in 2 starts" in second.text()
    # Before the first checkpoint all is lost; and again with what was lost before.
    third = goodput.Goodput(tmp_path, 0, 0.0)
    assert spent(third)["lost"] == 20 + 50
    assert "steps" not in spent(third)


@pytest.mark.drills
def test_to_go_back_loses_what_a_restart_would(tmp_path, clock):
    account = goodput.Goodput(tmp_path, 0, 10.0)
    for step in range(1, goodput.MARKS + 3):  # of the first ones is not known any more when they were
        clock.after(1)
        account.keep(step)
    clock.after(20)
    with account.part("start"):
        clock.after(3)
        account.go_back(goodput.MARKS)
    assert spent(account) == {"steps": goodput.MARKS, "start": 13, "lost": 22}
    assert spent(goodput.Goodput(tmp_path, goodput.MARKS, 0.0)) == spent(account)
    account.go_back(1)
    assert spent(account) == {"start": 13, "lost": goodput.MARKS + 22}


@pytest.mark.drills
def test_a_clock_that_is_set_back_takes_nothing_away(tmp_path, clock):
    goodput.Goodput(tmp_path, 0, 10.0)
    clock.times.wall -= 1e6
    assert spent(goodput.Goodput(tmp_path, 0, 5.0)) == {"start": 15}


@pytest.mark.drills
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seconds": 3}', "\0" * 90])
def test_what_is_no_account_begins_a_new_one(tmp_path, clock, content):
    (tmp_path / goodput.FILE).write_text(content)
    assert spent(goodput.Goodput(tmp_path, 3, 5.0)) == {"start": 5}
    assert json.loads((tmp_path / goodput.FILE).read_text())["starts"] == 1


@pytest.mark.drills
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(goodput, "write_whole", full)
    with pytest.raises(UserError, match=r"cannot write .*goodput.json: No space left on device; .* newest checkpoint"):
        goodput.Goodput(tmp_path, 0, 0.0)
