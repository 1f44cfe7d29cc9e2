"""A loss spike: what counts as one, and a run that goes back and leaves batches out, over restarts."""

import dataclasses
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.config_loading import load_config, replace
from mixtral_jax.hardware import PeakFlops
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.training import rates, spikes
from mixtral_jax.training.spikes import KEPT, Rollbacks
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import Trainable
from mixtral_jax.training.trainer import Trainer
from tests.small_run import write_config


def seen(losses, most=3):
    """What was seen of losses, the first one that is a spike included."""
    watch = Rollbacks(None)
    for step, loss in enumerate(losses, 1):
        watch.look(step, float(loss), most)
        if watch.spike:
            break
    return watch


@pytest.mark.parametrize("seed", range(2))
def test_noise_a_fall_and_what_is_not_finite_are_no_spikes(seed):
    draw = np.random.default_rng(seed)
    steps = np.arange(1000)
    falls = 2 + 9 * np.exp(-steps / 100) + 0.05 * draw.standard_normal(1000)
    falls[draw.integers(1000, size=20)] = draw.choice([np.nan, np.inf], 20)
    assert seen(falls).spike is None
    assert seen(np.full(1000, 2.0) + 1e-6 * draw.standard_normal(1000)).spike is None
    assert seen([1.0] * (spikes.FEWEST - 1) + [100.0]).spike is None  # too few to tell


def test_a_spike_is_above_median_and_deviation_of_the_window():
    early, late = [50.0] * spikes.WINDOW, [3.0, 4.0, 5.0, 6.0] * (spikes.WINDOW // 4)
    assert seen([*early, *late, 14.5]).spike is None  # 4.5 and ten times 1
    assert seen([*early, *late, 14.6]).spike == (2 * spikes.WINDOW + 1, 14.6, 14.5)
    flat = [2.0] * spikes.WINDOW
    assert seen([*flat, 2.19]).spike is None
    assert seen([*flat, 2.21]).spike.bound == pytest.approx(2.2)


def test_what_a_checkpoint_remembers_decides_as_if_nothing_had_ended():
    draw = np.random.default_rng(0)
    losses = [float(np.float32(loss)) for loss in 5 + 0.1 * draw.standard_normal(200)]
    first = seen(losses)
    meta = json.loads(json.dumps({KEPT: first.describe([(3, 9)])}))
    again = Rollbacks(meta)
    assert again.skipped == [(3, 9)]
    for watch in (first, again):
        watch.look(201, 5.8, 1)
    assert first.spike == again.spike is not None
    back = Rollbacks(meta, again.count + 1)  # of which the checkpoint does not know
    assert (back.count, back.spike, back.describe([])["losses"]) == (1, None, losses[-spikes.WINDOW :])
    with pytest.raises(UserError, match=r"step 201 is 5.8, a spike above 5\.\d+, and the run went back 1 times alr"):
        back.look(201, 5.8, 1)


class Nothing(Architecture):
    """A model of one number."""

    def __init__(self):
        pass

    def init(self, seed):
        return {"taken": jnp.full((), 7, jnp.uint32)}


class Toy(Trainable):
    """Stands for a model: its state is what batches it has taken, in order, and some batches are spikes."""

    def __init__(self, bad):
        self.architecture, self.bad, self.number = Nothing(), bad, {}

    def host_rows(self):
        return slice(0, 8)

    def put(self, batch, rows):
        return batch

    def start(self, arrays):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(arrays, {"bias": zero}, {"count": zero}, zero, zero, zero)

    def abstract(self):
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        state = self.start(self.architecture.init(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)

    def step(self, state, batch):
        seen = batch.tokens.tobytes()
        taken = jnp.uint32(zlib.crc32(seen, int(state.params["taken"])))
        loss = 500.0 if self.number[seen] in self.bad else 5.0
        metrics = {"loss": jnp.float32(loss), "skipped_in_a_row": state.skipped, "expert_load": jnp.full((2, 4), 0.25)}
        return dataclasses.replace(state, params={"taken": taken}, step=state.step + 1), metrics


class Runs:
    """Trainers of a toy in several directories."""

    def __init__(self, place, monkeypatch):
        self.config, self.said = write_config(place), []
        monkeypatch.setattr(spikes, "FEWEST", 2)
        monkeypatch.setattr(rates, "peak_flops", lambda *_: PeakFlops(1e12, "made up"))

    def trainer(self, name, bad=(), skipped=(), **train):
        keys = ("train.batch_size=8", "mesh.fsdp=8", "train.eval_every=0", "checkpoint.every=4", "train.steps=9",
                "train.max_rollbacks=2", f"run_dir={self.config.parent / name}")  # fmt: skip
        made = Trainer(replace(load_config(self.config, list(keys)), train=train), say=self.said.append)
        made.trainable, open_text = Toy(bad), made._open_text

        def opened(beginning):
            open_text(beginning)
            numbers = {made.data.batch(number).tokens.tobytes(): number for number in range(20)}
            if not made.data.skipped:  # else the numbers are of what is left
                self.numbers = numbers
            made.trainable.number = self.numbers
            made.data.skipped += skipped

        made._open_text = opened
        return made

    def lines(self, name):
        """The log without what time decides."""
        timed = ("goodput", "memory", "model_flops", "mfu", "tokens_per", "device")
        text = (self.config.parent / name / "metrics.jsonl").read_text()
        return [
            {name: value for name, value in json.loads(line).items() if not name.startswith(timed)}
            for line in text.splitlines()
        ]


@pytest.mark.drills
def test_a_run_goes_back_and_is_then_one_that_never_saw_the_batches(tmp_path, monkeypatch):
    runs = Runs(tmp_path, monkeypatch)
    # Batch 2 before any checkpoint: all anew from batch 3. Batch 8 in step 6, after the checkpoint of step 4.
    first = runs.trainer("disturbed", {2, 8}, stop_at_step=6)
    assert first.run().step == 6
    assert first.goodput._seconds["lost"] > 0
    assert [text.partition("; ")[2] for text in runs.said if "is a spike" in text] == [
        "back to step 0, without batches 1 to 3", "back to step 4, without batches 8 to 9",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"the loss of step 8 is .* went back 2 times already \(train.max_rollbacks\)"):
        runs.trainer("disturbed", {2, 8, 12}).run()
    last = runs.trainer("disturbed", {2, 8})
    outcome = last.run()

    undisturbed = runs.trainer("calm", skipped=[(0, 3), (7, 9)], max_rollbacks=0)
    expected = undisturbed.run()
    assert outcome.finished
    jax.tree.map(np.testing.assert_array_equal, outcome.state.parts, expected.state.parts)
    lines = runs.lines("disturbed")
    assert lines == runs.lines("calm")
    assert [line["skipped_batches"] for line in lines] == [3] * 4 + [5] * 5
    metas = [run.checkpoints.read_meta(9) for run in (last, undisturbed)]
    assert metas[0][KEPT]["count"] == 2
    assert metas[0]["training_tokens"] == metas[1]["training_tokens"]
