"""The training step: microbatches, skipped updates, balancing by bias, float types."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import CheckpointConfig
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.training.losses import Counts, compute_losses, count
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import Trainable
from tests import oracles
from tests.tiny import tiny_architecture, tiny_batch, tiny_config, tiny_trainable
from tests.training.by_hand import LOSSES, figures_by_hand

# Large coefficients, so that a mistake in the router's losses shows.
# Adam's first step divides each gradient by itself, which magnifies rounding near zero: a larger eps avoids that.
LOUD = ("losses.load_balance=0.5", "losses.router_z=0.1", "model.init_std=0.1", "optimizer.eps=1e-3")


@functools.cache
def trainable(*overrides: str) -> Trainable:
    return tiny_trainable(tiny_config(*overrides))


@functools.cache
def initial():
    """Arrays of the tiny model, on the host."""
    return jax.tree.map(np.asarray, tiny_architecture(tiny_config(*LOUD)).init(0))


def begin(step: Trainable):
    abstract = step.architecture.abstract()
    return step.start(jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), initial(), abstract))


def host(tree):
    return jax.tree.map(np.array, tree)


def one_step(*overrides: str, batch=None):
    """State and metrics after the first step, on the host."""
    step = trainable(*overrides)
    return host(step.step(begin(step), step.put(tiny_batch(step.config) if batch is None else batch)))


def first_moment(state):
    """After one step: 0.1 times the clipped gradient."""
    return next(part for part in state.opt_state if hasattr(part, "mu")).mu


def largest_error(tree, reference) -> float:
    return max(jax.tree.leaves(jax.tree.map(oracles.error, tree, reference)))


@pytest.mark.parametrize(("parts", "dispatch"), [(2, "dropless"), (4, "capacity")])
def test_microbatches_give_the_same_update(parts, dispatch):
    """Rows of the batch differ in documents, padding and targets, so a mean of means would not do."""
    options = (*LOUD, "kernels.matmul=xla", f"model.dispatch={dispatch}", "model.capacity_factor=0.7")
    whole, whole_metrics = one_step(*options)
    split, split_metrics = one_step(*options, f"train.microbatches={parts}")
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-5, err_msg=name)
    assert largest_error(first_moment(split), first_moment(whole)) < 1e-5
    for new, reference in zip(jax.tree.leaves(split.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(new, reference, rtol=0, atol=2.5e-7)  # two steps of float32 near 1


def test_a_batch_is_cut_into_parts_of_rows_that_lie_apart():
    """As many as asked for, each with rows of every device."""
    parts = trainable(*LOUD, "train.microbatches=2")._split(jnp.arange(8)[:, None])
    np.testing.assert_array_equal(parts[..., 0], [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_balancing_every_microbatch_asks_for_something_else():
    _, whole = one_step(*LOUD, "train.microbatches=4")
    _, apart = one_step(*LOUD, "train.microbatches=4", "losses.balance_over=microbatch")
    np.testing.assert_allclose(apart["cross_entropy"], whole["cross_entropy"], rtol=1e-6)
    assert 1e-5 < abs(apart["load_balance_loss"] / whole["load_balance_loss"] - 1) < 0.1


def test_the_losses_are_those_worked_out_by_hand():
    step = trainable(*LOUD)
    batch = step.put(tiny_batch(step.config))
    assert 0 < batch.loss_mask.sum() < (batch.segment_ids > 0).sum() < batch.tokens.size, "padding, and a ragged mask"
    expected = figures_by_hand(step.architecture, jax.tree.map(jnp.asarray, initial()), batch)
    _, metrics = one_step(*LOUD)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    total = expected["cross_entropy"] + 0.5 * expected["load_balance_loss"] + 0.1 * expected["router_z_loss"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(2e-3)  # the first of 5 steps to 1e-2


def test_a_part_of_a_batch_counts_for_its_share_of_the_whole():
    """Denominators are those that are given, not those of the part."""
    step = trainable(*LOUD)
    batch = step.put(tiny_batch(step.config))
    arrays = jax.tree.map(jnp.asarray, initial())
    expected = figures_by_hand(step.architecture, arrays, batch)
    whole = count(batch)
    twice = Counts(2 * whole.targets, 2 * whole.tokens)
    losses, _ = compute_losses(step.architecture.bind(arrays), batch, twice, None, step.config.losses)
    for found, name in zip(losses[1:4], LOSSES, strict=True):
        assert found == pytest.approx(expected[name] / 2, rel=1e-5)


def test_the_norm_of_the_gradient_is_the_slope_along_it():
    options = (*LOUD, "model.num_experts_per_tok=4", "optimizer.clip_norm=0.5")  # no choice of experts that may change
    step = trainable(*options)
    batch = step.put(tiny_batch(step.config))
    state, metrics = one_step(*options)
    direction = jax.tree.map(lambda moment: moment / (0.1 * 0.5), first_moment(state))  # the clipped norm is 0.5
    assert np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(direction))) == pytest.approx(1, rel=1e-5)

    def loss(way):
        params = jax.tree.map(lambda x, d: jnp.asarray(x + way * d), initial()["params"], direction)
        found = figures_by_hand(step.architecture, {**initial(), "params": params}, batch)
        return found["cross_entropy"] + 0.5 * found["load_balance_loss"] + 0.1 * found["router_z_loss"]

    assert metrics["grad_norm"] > 0.5
    assert metrics["grad_norm"] == pytest.approx((loss(0.01) - loss(-0.01)) / 0.02, rel=2e-3)


@pytest.mark.drills
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_an_infinite_gradient_or_loss_alone_skips_the_update(what):
    class Infinite(Trainable):
        def _gradients(self, arrays, batch):
            grads, losses, *rest = super()._gradients(arrays, batch)
            if what == "loss":
                return grads, losses._replace(total=jnp.inf * losses.total), *rest
            return {**grads, "lm_head": grads["lm_head"].at[0, 0].set(jnp.inf)}, losses, *rest

    config = tiny_config(*LOUD, "losses.selection_bias_rate=0.1")
    step = Infinite(tiny_architecture(config), config)
    before = host(begin(step))
    after, metrics = host(step.step(begin(step), step.put(tiny_batch(config))))
    assert np.isfinite(metrics["loss"]) == (what == "gradient")
    assert np.isfinite(metrics["grad_norm"]) == (what == "loss")
    assert (metrics["skipped_updates"], metrics["skipped_in_a_row"], after.step) == (1, 1, 1)
    for part in ("params", "opt_state", "selection_bias"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))


def test_what_is_padding_does_not_matter():
    """Neither tokens of padding nor targets outside the mask reach the loss or a gradient."""
    config = tiny_config(*LOUD)
    batch = tiny_batch(config)
    padding = batch.segment_ids == 0
    assert padding.any()
    other = dataclasses.replace(
        batch,
        tokens=np.where(padding, 1, batch.tokens).astype(np.int32),
        targets=np.where(batch.loss_mask, batch.targets, 2).astype(np.int32),
    )
    state, metrics = one_step(*LOUD)
    state_other, metrics_other = one_step(*LOUD, batch=other)
    jax.tree.map(np.testing.assert_array_equal, (state, metrics), (state_other, metrics_other))


def test_a_batch_without_targets_updates_without_nan():
    empty = jax.tree.map(np.zeros_like, tiny_batch(tiny_config(*LOUD)))
    state, metrics = one_step(*LOUD, batch=empty)
    assert metrics["loss"] == 0
    assert metrics["skipped_updates"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@pytest.mark.drills
def test_a_non_finite_loss_skips_the_update_and_training_recovers():
    step = trainable(*LOUD, "losses.selection_bias_rate=0.1")
    batch = tiny_batch(step.config)
    state = host(step.step(begin(step), step.put(batch))[0])
    healthy = state.params["embedding"].copy()
    state.params["embedding"][batch.tokens[0, 0]] = np.inf
    poisoned = host(state)
    for row in (1, 2):
        state, metrics = host(step.step(jax.tree.map(jnp.asarray, state), step.put(batch)))
        assert not np.isfinite(metrics["loss"])
        assert (metrics["skipped_updates"], metrics["skipped_in_a_row"]) == (row, row)
        assert state.step == 1 + row
        for part in ("params", "opt_state", "selection_bias"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(poisoned, part))
    state.params["embedding"] = healthy
    after, metrics = host(step.step(jax.tree.map(jnp.asarray, state), step.put(batch)))
    assert np.isfinite(metrics["loss"])
    assert (metrics["skipped_updates"], metrics["skipped_in_a_row"]) == (2, 0)
    assert np.any(after.params["embedding"] != healthy)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


def test_the_bias_rises_for_idle_experts_and_falls_for_busy_ones():
    options = (*LOUD, "losses.selection_bias_rate=0.1")
    state, metrics = one_step(*options)
    (bias,) = jax.tree.leaves(state.selection_bias)
    load = metrics["expert_load"]
    assert np.abs(load - 1 / 4).max() > 0.01
    np.testing.assert_allclose(bias, 0.1 * np.sign(1 / 4 - load))
    # The bias took no part in this step: everything else is as without it.
    plain, _ = one_step(*LOUD)
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    assert not any(np.any(x) for x in jax.tree.leaves(plain.selection_bias))


def test_the_bias_alone_balances_the_load():
    step = trainable("optimizer.learning_rate=1e-12", "losses.load_balance=0", "losses.selection_bias_rate=0.01")
    arrays = initial()
    router = arrays["params"]["layers"]["moe"]["router"]
    arrays = {**arrays, "params": jax.tree.map(lambda x: x * 5 if x is router else x, arrays["params"])}
    state, violations = step.start(jax.tree.map(jnp.asarray, arrays)), []
    batch = step.put(tiny_batch(step.config))
    for _ in range(40):
        state, metrics = step.step(state, batch)
        violations.append(float(metrics["max_violation"]))
    assert violations[0] > 0.3
    assert violations[-1] < violations[0] / 2


@pytest.mark.parametrize(
    "options",
    [
        ("precision.compute=bfloat16",),
        ("precision.compute=bfloat16", "precision.params=bfloat16", "precision.gradients=bfloat16",
         "precision.optimizer=bfloat16", "train.microbatches=2"),
    ],
    ids=["compute", "everything"],
)  # fmt: skip
def test_bfloat16_trains_and_its_gradients_are_near(options):
    state, metrics = one_step(*LOUD, *options)
    reference, reference_metrics = one_step(*LOUD)
    near = jax.tree.map(
        lambda a, b: np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b), first_moment(state), first_moment(reference)
    )
    assert max(jax.tree.leaves(near)) < 0.1
    assert metrics["cross_entropy"] == pytest.approx(reference_metrics["cross_entropy"], rel=5e-3)
    step = trainable(*LOUD, *options)
    types = jax.tree.map(lambda x: x.dtype, step.abstract())
    assert vars(jax.tree.map(lambda x: x.dtype, state)) == vars(types), "a step changes the types of the state"
    state, losses = begin(step), []
    for seed in range(15):
        state, metrics = step.step(state, step.put(tiny_batch(step.config, seed)))
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.8 * losses[0]


def test_the_abstract_state_is_the_state():
    step = trainable(*LOUD)
    state = begin(step)
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), step.abstract())
    assert vars(jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)) == vars(described)


def test_dropped_assignments_are_counted():
    _, metrics = one_step(*LOUD, "model.dispatch=capacity", "model.capacity_factor=0.7")
    assert 0 < metrics["dropped_share"] < 0.5
    _, metrics = one_step(*LOUD)
    assert metrics["dropped_share"] == 0


def test_the_state_is_overwritten_in_place():
    """Nothing of it is copied first: that would take its memory again, and the time to move it."""
    trainable = tiny_trainable(tiny_config())
    batch = trainable.put(tiny_batch(trainable.config))
    program = trainable.step.lower(trainable.abstract(), batch).compile().as_text()
    assert "%state" in program
    assert not re.findall(r"= f32\S+ copy\(%state\S*\)", program)


def test_a_stored_state_keeps_its_names(tmp_path):
    """Checkpoints of earlier versions hold a dictionary with these; what is stored must not depend on our classes."""
    names = {"params", "selection_bias", "opt_state", "step", "skipped", "skipped_in_a_row"}
    step = trainable(*LOUD)
    state = begin(step)
    assert set(state.parts) == names
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, {name: getattr(state, name) for name in names}, {}, {})
    checkpoints.wait()
    stored = {f"{name}/{leaf}" for name, leaves in checkpoints.read_meta(1)["arrays"].items() for leaf in leaves}
    assert {"step/value", "params/embedding", "opt_state/1/mu/layers/moe/w_gate", "opt_state/1/count"} <= stored
    restored = TrainState(**checkpoints.restore(1, step.abstract().parts))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
