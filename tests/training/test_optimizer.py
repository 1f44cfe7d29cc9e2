"""AdamW against its equations, what decays, and the schedules at their key steps."""

import functools
import math
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import OptimizerConfig, UserError
from mixtral_jax.kernels.adamw import global_norm
from mixtral_jax.precision import make_precision
from mixtral_jax.training.optimizer import Gradients, decay_mask, make_optimizer, make_schedule, update
from tests.tiny import mesh_of, tiny_architecture, tiny_config


def rates(steps, **changes):
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **changes), steps)
    return [float(schedule(step)) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_warm_up_starts_above_zero_and_reaches_the_peak(schedule, warmup):
    values = rates(50, schedule=schedule, warmup_steps=warmup)
    np.testing.assert_allclose(values[:warmup], 2 * np.arange(1, warmup + 1) / max(1, warmup), rtol=1e-6)
    assert max(values) == pytest.approx(2)
    assert values[max(0, warmup - 1)] == pytest.approx(2)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_last_step_runs_at_the_final_ratio(schedule, warmup):
    values = rates(50, schedule=schedule, warmup_steps=warmup, final_learning_rate_ratio=0.25)
    assert values[-1] == pytest.approx(0.5)
    assert values[-2] > 0.5


def test_cosine_is_half_way_in_the_middle():
    values = rates(21, schedule="cosine", warmup_steps=0, final_learning_rate_ratio=0.0)
    assert values[10] == pytest.approx(1)
    assert values[5] == pytest.approx(1 + math.cos(math.pi / 4), rel=1e-5)


def test_wsd_is_flat_and_then_linear():
    values = rates(50, schedule="wsd", warmup_steps=10, decay_steps=20, final_learning_rate_ratio=0.0)
    np.testing.assert_allclose(values[9:30], 2, rtol=1e-6)
    np.testing.assert_allclose(values[30:], 2 * (1 - np.arange(1, 21) / 20), atol=1e-6)


def test_wsd_decays_over_a_fifth_unless_told():
    values = rates(50, schedule="wsd", warmup_steps=10)
    assert values[39] == pytest.approx(2)
    assert values[40] < 2


def test_constant_stays():
    np.testing.assert_allclose(rates(50, schedule="constant", warmup_steps=10)[9:], 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"warmup_steps": 50}, "optimizer.warmup_steps=50 leaves nothing of train.steps=50: lower it"),
        (
            {"schedule": "wsd", "warmup_steps": 10, "decay_steps": 41},
            "optimizer.warmup_steps=10 + optimizer.decay_steps=41 exceed train.steps=50: lower one",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(changes, sentence):
    with pytest.raises(UserError) as error:
        make_schedule(OptimizerConfig(**changes), 50)
    assert str(error.value) == sentence


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_what_is_not_set_never_contradicts_what_is(schedule):
    for steps in (1, 2, 9, 60, 999, 1000, 5000):
        make_schedule(OptimizerConfig(schedule=schedule), steps)
        make_schedule(OptimizerConfig(schedule=schedule, warmup_steps=steps - 1), steps)
        make_schedule(OptimizerConfig(schedule=schedule, decay_steps=steps), steps)
    # A warm-up of six steps: the sixth is the first at the peak; later 100, as it always was.
    np.testing.assert_allclose(rates(60, schedule=schedule)[:6], 2 * np.arange(1, 7) / 6, rtol=1e-6)
    assert rates(1000, schedule=schedule)[:100] == rates(1000, schedule=schedule, warmup_steps=100)[:100]


def test_matrices_decay_and_norm_scales_never():
    mask = decay_mask(tiny_architecture(tiny_config()).axes()["params"])
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        assert decays == (path[-1].key != "scale"), path


def adamw(config, params, grads_of_steps, learning_rate):
    """The equations of arXiv 1711.05101 with clipping, in numpy."""
    mean = {k: np.zeros_like(v) for k, v in params.items()}
    square = {k: np.zeros_like(v) for k, v in params.items()}
    for t, grads in enumerate(grads_of_steps, 1):
        norm = math.sqrt(sum(np.sum(g**2) for g in grads.values()))
        factor = min(1, config.clip_norm / norm) if config.clip_norm else 1
        for k, g in grads.items():
            mean[k] = config.beta1 * mean[k] + (1 - config.beta1) * g * factor
            square[k] = config.beta2 * square[k] + (1 - config.beta2) * (g * factor) ** 2
            step = mean[k] / (1 - config.beta1**t) / (np.sqrt(square[k] / (1 - config.beta2**t)) + config.eps)
            decay = config.weight_decay * params[k] if params[k].ndim > 1 else 0
            wide = k == "router" and config.router_width
            rate = learning_rate * min(1, config.router_width / len(params[k])) if wide else learning_rate
            params[k] = params[k] - rate * (step + decay)
    return params


ADAMW = ["xla", pytest.param("fused", marks=pytest.mark.skipif(not find_spec("numba"), reason="Numba is not there"))]


@pytest.mark.parametrize("backend", ADAMW)
@pytest.mark.parametrize(("clip_norm", "router_width"), [(0.0, 512), (0.5, 0), (1e6, 2000)])
def test_steps_equal_the_equations(backend, clip_norm, router_width):
    """Four steps, the second of which is not finite, over arrays of less and of more than a block."""
    config = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.3, router_width=router_width)
    rng = np.random.default_rng(0)
    axes = {"matrix": (None, None), "router": (None, None), "scale": (None,)}
    shapes = {"matrix": (300, 701), "router": (1500, 3), "scale": (7,)}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    grads = [{k: rng.standard_normal(v.shape) * 3**t for k, v in params.items()} for t in range(4)]
    expected = adamw(config, dict(params), [grads[0], *grads[2:]], 0.1)
    grads[1]["scale"][3] = np.nan
    actual = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = make_optimizer(config, make_precision(tiny_config().precision), axes).init(actual)
    step = jax.jit(functools.partial(update, config, axes, backend=backend))
    for t, g in enumerate(grads):
        g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        norm = global_norm(jax.tree.leaves(g), backend=backend)
        before, gradients = (actual, state), Gradients(g, norm, jnp.isfinite(norm))
        actual, state = step(jnp.float32(0.1), gradients, *before)
        assert jax.tree.structure((actual, state)) == jax.tree.structure(before)
        if t == 1:
            jax.tree.map(np.testing.assert_array_equal, (actual, state), before)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ADAMW)
def test_the_norm_of_arrays_of_every_size(backend):
    """A single number beside it counts at both ends of a block."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((1,), (63,), (64, 3), (1 << 14,), (300, 701))]
    for place in (0, 1 << 14, -1):
        arrays[-1].reshape(-1)[place] = 1e3
    expected = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in arrays))
    norm = jax.jit(functools.partial(global_norm, backend=backend))
    np.testing.assert_allclose(norm(arrays), expected, rtol=1e-6)
    arrays[2][5, 2] = np.inf
    assert not np.isfinite(norm(arrays))


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_the_types_of_the_moments_are_the_table_s(params, first):
    config = tiny_config(precision={"params": params, "optimizer": first})
    arch = tiny_architecture(config, mesh_of())
    optimizer = make_optimizer(config.optimizer, arch.runtime.precision, arch.axes()["params"])
    state = jax.eval_shape(optimizer.init, arch.abstract()["params"])
    adam = next(part for part in state if hasattr(part, "nu"))
    assert {x.dtype.name for x in jax.tree.leaves(adam.mu)} == {first}
    assert {x.dtype.name for x in jax.tree.leaves(adam.nu)} == {"float32"}
