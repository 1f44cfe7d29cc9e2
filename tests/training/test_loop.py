"""The loop in one process: batches reach the devices ahead of their step, and no step waits for another's metrics."""

import dataclasses
import json
import math
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.config_loading import load_config, replace
from mixtral_jax.data.pipeline import TrainingData
from mixtral_jax.distributed import processes
from mixtral_jax.training.starting_point import StartingPoint
from mixtral_jax.training.step import Trainable
from mixtral_jax.training.trainer import IN_FLIGHT, Trainer
from tests.small_run import write_config
from tests.training.by_hand import figures_by_hand

STEPS = 9
KEYS = ("train.batch_size=8", "mesh.fsdp=8", f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=100")


@pytest.fixture
def trainer(tmp_path):
    return Trainer(load_config(write_config(tmp_path), list(KEYS)), say=lambda text: None)


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_steps_go_out_before_metrics_come_in_and_batches_are_placed_ahead(trainer, monkeypatch):
    events, beats, placed = [], [], [threading.Event() for _ in range(STEPS)]
    put, step, report = Trainable.put, trainer.trainable.step, Trainer._report

    def note_put(self, batch, rows=None):
        assert threading.current_thread().name.startswith("prefetch")
        result = put(self, batch, rows)
        placed[next(number for number, event in enumerate(placed) if not event.is_set())].set()
        return result

    def note_step(state, batch):
        assert beats, "a hang in the first step would go unnoticed"
        number = sum(kind == "step" for kind, _ in events)
        if number + 1 < STEPS:  # the thread must get there while this one is busy with a step
            assert placed[number + 1].wait(60), f"the batch after step {number + 1} is not on the devices"
        events.append(("step", number + 1))
        return step(state, batch)

    def note_report(self, number, metrics, seconds):
        events.append(("report", number))
        report(self, number, metrics, seconds)

    monkeypatch.setattr(processes, "progress", lambda: beats.append(1))
    monkeypatch.setattr(Trainable, "put", note_put)
    monkeypatch.setattr(trainer.trainable, "step", note_step)
    monkeypatch.setattr(Trainer, "_report", note_report)
    outcome = trainer.run()

    assert outcome.finished
    for number in range(1, STEPS - IN_FLIGHT + 1):
        assert events.index(("report", number)) == events.index(("step", number + IN_FLIGHT)) + 1
    assert [number for kind, number in events if kind == "report"] == list(range(1, STEPS + 1))
    assert not prefetching()


@pytest.mark.drills
def test_a_loader_that_fails_ends_the_run_with_its_sentence_and_leaves_no_thread(trainer, monkeypatch):
    make = TrainingData.batch

    def fail(self, step, rows=None):
        if step == 3:
            raise UserError("the disk is gone: mount it")
        return make(self, step, rows)

    monkeypatch.setattr(TrainingData, "batch", fail)
    with pytest.raises(UserError, match=r"^the disk is gone: mount it$"):
        trainer.run()
    assert not prefetching()


def test_metrics_are_sent_for_ahead_where_they_will_be_read(trainer, monkeypatch):
    metrics, sent = {"loss": jnp.zeros(()), "skipped_in_a_row": jnp.zeros(())}, []
    monkeypatch.setattr(type(metrics["loss"]), "copy_to_host_async", lambda value: sent.append(value))
    trainer.config = replace(trainer.config, train={"log_every": 5})
    for step, logged in ((1, True), (2, False), (STEPS, True)):
        sent.clear()
        trainer._fetch(step, metrics)
        assert [value is metrics["loss"] for value in sent] == [True, False][not logged :]


@pytest.mark.drills
def test_the_run_ends_with_the_last_of_so_many_steps_that_were_not_finite(trainer, monkeypatch):
    trainer.config = replace(trainer.config, train={"max_nonfinite_steps": 3})
    first = StartingPoint.first_state

    def poisoned(self, *given):
        state, step = first(self, *given)
        params = {**state.params, "embedding": state.params["embedding"] * np.nan}
        return dataclasses.replace(state, params=params), step

    monkeypatch.setattr(StartingPoint, "first_state", poisoned)
    with pytest.raises(UserError, match=r"^the loss was not finite in 3 steps in a row, up to step 3: lower"):
        trainer.run()
    assert trainer.checkpoints.steps() == []
    assert not prefetching()


@pytest.mark.drills
def test_a_first_batch_that_is_waited_for_is_not_counted_as_compilation_too(trainer, monkeypatch):
    put, slow = Trainable.put, iter([3.0])

    def put_slowly(self, batch, rows=None):
        time.sleep(next(slow, 0))
        return put(self, batch, rows)

    monkeypatch.setattr(Trainable, "put", put_slowly)
    trainer.run()
    seconds = trainer.goodput._seconds
    assert seconds["data"] > 2.9
    assert seconds["steps"] > 0
    assert 0 < seconds["compile"] == pytest.approx(trainer.start.parts["compile"])
    assert trainer.start.parts["data"] > 2.9


@pytest.mark.drills
def test_a_clock_that_jumps_changes_neither_steps_nor_the_account(trainer, monkeypatch):
    now, report, ahead = time.time, Trainer._report, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + ahead[0])

    def jump(self, step, metrics, seconds):
        report(self, step, metrics, seconds)
        ahead[0] = (0, 1e8, -1e8)[step % 3]

    monkeypatch.setattr(Trainer, "_report", jump)
    trainer.config = replace(trainer.config, train={"stop_at_step": 4})
    trainer.run()
    again = Trainer(replace(trainer.config, train={"stop_at_step": None}), say=str)
    outcome = again.run()
    assert outcome.finished
    lines = [json.loads(line) for line in (Path(trainer.config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(0 < line["goodput"] <= 1 for line in lines)
    assert all(seconds >= 0 for seconds in again.goodput._seconds.values())


def test_every_figure_of_the_log_is_worked_out_by_hand(trainer):
    trainer.config = replace(trainer.config, train={"stop_at_step": 1})
    outcome = trainer.run()
    run_dir = Path(trainer.config.run_dir)
    (line,) = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    config, architecture = trainer.config, trainer.trainable.architecture
    batch = trainer.data.batch(0)
    expected = figures_by_hand(architecture, architecture.init(config.seed), trainer.trainable.put(batch))
    moment = next(part for part in outcome.state.opt_state if hasattr(part, "mu")).mu
    norm = 10 * math.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(moment)))  # 0.1 of the clipped gradient
    expected |= {
        "step": 1,
        "loss": expected["cross_entropy"] + 0.02 * expected["load_balance_loss"] + 0.001 * expected["router_z_loss"],
        "learning_rate": 1e-2 / 2,  # the first of two steps of warm-up
        "skipped_updates": 0,
        "dropped_share": 0,
        "tokens_seen/words": (batch.segment_ids > 0).sum(),
        "share/words": 1,
        "epoch/words": 8 / trainer.data._rows[0].count,
    }
    assert norm == pytest.approx(min(line.pop("grad_norm"), config.optimizer.clip_norm), rel=1e-5)
    assert 0 < line.pop("goodput") < 1
    memory = {name: line.pop(name) for name in list(line) if name.startswith("memory")}
    assert all(0 < value < 1000 for value in memory.values())
    assert set(line) == set(expected)  # rates: tests/training/test_step_clock.py
    for name, value in expected.items():
        np.testing.assert_allclose(line[name], value, rtol=1e-5, err_msg=name)
    meta = trainer.checkpoints.read_meta(1)
    assert meta["training_tokens"] == line["tokens_seen/words"]
