"""Rates say what a device did: one whose steps take known times, with a host that runs ahead of it or waits for it."""

import json
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config_loading import load_config
from mixtral_jax.data.batch import Batch, padding
from mixtral_jax.hardware import PeakFlops
from mixtral_jax.training import rates, step_clock
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.trainer import Trainer
from tests.small_run import write_config

STEPS, STOP, BATCH, SEQ_LEN = 40, 23, 8, 32
COMPILES = 60.0  # seconds that the first step of a process takes more


class Device:
    """Does one step after the other; every thread has a time of its own, up to which it has waited."""

    load, gradients = np.full((2, 4), 0.25), np.ones(2)  # of routers

    def __init__(self, ahead: bool, done: int):
        self.ahead, self.done, self.free, self.thread = ahead, done, 0.0, threading.local()
        self.compiles, self.ready = COMPILES, {}

    def now(self) -> float:
        return getattr(self.thread, "time", 0.0)

    def spend(self, seconds: float) -> None:
        self.thread.time = self.now() + seconds

    def wait(self, metrics: dict) -> None:
        self.thread.time = max(self.now(), self.ready[int(metrics["loss"])])

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        self.done += 1
        self.free = self.ready[self.done] = max(self.now(), self.free) + took(self.done) + self.compiles
        self.compiles = 0.0
        metrics = {"loss": self.done, "skipped_in_a_row": 0, "expert_load": self.load}
        metrics["router_gradients"] = self.gradients
        if not self.ahead:
            self.wait(metrics)
        return state, {name: jnp.asarray(value) for name, value in metrics.items()}


def took(step: int) -> float:
    return 1 + step / 64


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains from a step to another on a device; evaluation and saving take their time, too."""
    path, config, report = tmp_path / "logs", write_config(tmp_path), Trainer._report
    path.mkdir()

    def run(ahead: bool, every: int, begin: int, end: int, peak: float = 1e12) -> dict[int, dict]:
        device = Device(ahead, begin)
        keys = (f"train.batch_size={BATCH}", "mesh.fsdp=8", f"train.steps={max(STEPS, end)}",
                f"train.stop_at_step={end}", f"train.log_every={every}", "train.eval_every=7",
                "checkpoint.every=9")  # fmt: skip
        made = Trainer(load_config(config, list(keys)), say=lambda text: None)
        made.data = SimpleNamespace(batch=lambda step, rows: padding(BATCH, SEQ_LEN), progress=lambda step: {})
        monkeypatch.setattr(step_clock, "time", SimpleNamespace(monotonic=device.now))
        monkeypatch.setattr(step_clock.jax, "block_until_ready", device.wait)
        monkeypatch.setattr(rates, "peak_flops", lambda *_: PeakFlops(peak, "made up"))
        monkeypatch.setattr(made.trainable, "step", device.step)
        monkeypatch.setattr(Trainer, "_report", lambda self, step, metrics, *more: (
            device.wait(metrics), report(self, step, metrics, *more)
        ))  # fmt: skip
        monkeypatch.setattr(Trainer, "_save", lambda *_: device.spend(50.0))
        monkeypatch.setattr(Trainer, "_evaluate", lambda *_: device.spend(300.0))
        zero = jnp.zeros((), jnp.int32)
        assert made._train(path, TrainState({}, {}, (), zero, zero, zero), begin)[1] == end
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line for line in lines}

    return run


@pytest.mark.parametrize("ahead", [True, False], ids=["host runs ahead", "host waits"])
@pytest.mark.parametrize("every", [1, 10])
def test_rates_are_those_of_whole_intervals_on_the_device(train, ahead, every):
    train(ahead, every, 0, STOP)
    lines = train(ahead, every, STOP, STEPS)
    assert list(lines) == sorted({1, *range(every, STEPS + 1, every), STEPS})
    for step, line in lines.items():
        steps = range(step - every + 1, step + 1)
        compiled = {1, STOP + 1} & set(steps)  # the first step of a process; what lies before it, another one did
        if step % every or compiled:
            assert not {"tokens_per_second", "model_flops_per_second", "mfu"} & set(line), step
        else:
            expected = every * BATCH * SEQ_LEN / sum(map(took, steps))
            assert line["tokens_per_second"] == pytest.approx(expected, rel=1e-9), step


def test_more_than_the_peak_is_said_at_length_once_and_shown_every_time(train, capsys):
    lines = train(True, 1, 0, 9, peak=1e3)
    assert all(line["mfu"] > 1 for step, line in lines.items() if step > 1)
    out = capsys.readouterr().out
    (warning,) = (line for line in out.splitlines() if "warning" in line and "MFU of" in line)
    assert "up to step 2, is more than a device can do" in warning
    assert "attention over whole rows of 32 tokens" in warning
    assert "made up" in warning
    shown = [line for line in out.splitlines() if line.startswith("train ") and "MFU" in line]
    assert len(shown) == 8
    assert all("more than there is" in line for line in shown)


def test_a_rate_below_the_peak_is_no_matter(train, capsys):
    train(True, 1, 0, 9)
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "more than there is" not in out


def test_a_router_that_collapses_is_named_in_the_log(train, monkeypatch, capsys):
    train(True, 10, 0, 60)
    assert "ROUTER" not in capsys.readouterr().out
    monkeypatch.setattr(Device, "load", np.array([[0.25] * 4, [0.5, 0, 0, 0.5]]))
    train(True, 10, 0, 60)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "ROUTER" in line)
    assert line == "step 50: ROUTER of layer 1: 2 of 4 experts take most of the tokens for 40 steps and more"


def test_routers_that_are_frozen_are_named_in_the_log(train, monkeypatch, capsys):
    monkeypatch.setattr(Device, "gradients", np.array([np.nan, 0]))
    train(True, 10, 0, 60)
    assert [line for line in capsys.readouterr().out.splitlines() if "ROUTER" in line] == [
        "step 50: ROUTER of layer 0: its gradient is not finite, so that no step learns, for 40 steps and more",
        "step 50: ROUTER of layer 1: no gradient reaches it for 40 steps and more",
    ]


def test_a_start_tells_where_its_time_went(monkeypatch):
    now = [3.0]
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    start = step_clock.StartClock(began=1.0)
    for part, seconds in (("devices", 1.0), ("data", 0.5)):
        now[0] += seconds
        start.end(part)
    start.begin_steps()
    now[0] += 7.0
    jax.monitoring.record_event_duration_secs(step_clock.COMPILED, 5.0)
    now[0] += 9.0
    assert start.first_step(now[0] - 8.75) == (
        "start took 10.8 s: imports 2.0, devices 1.0, data 0.5, compile 7.0, first step 0.2"
    )
    now[0] += 1.0
    jax.monitoring.record_event_duration_secs(step_clock.COMPILED, 5.0)  # nobody listens any more
    assert start._compiled == 11.5
