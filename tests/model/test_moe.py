"""The mixture layer against a reference that goes token by token: output and every gradient, every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.kernels import backends
from mixtral_jax.model.expert_parallel import at_multiples
from mixtral_jax.model.moe import MoE
from mixtral_jax.model.routing import choose_experts, dropless_plan, expert_capacity
from mixtral_jax.runtime import make_runtime
from tests import oracles
from tests.tiny import LIMITS, by_engine, mesh_of, moe_layer, tiny_config

BATCH, SEQ, D_MODEL, D_FF, EXPERTS = 3, 11, 8, 12, 4
ROOMY = ("capacity", "auto", 0, float(EXPERTS))
KERNELS = [
    ("dropless", "grouped_blocks", 1, 1.0),
    ("dropless", "grouped_blocks", 5, 1.0),
    ("dropless", "grouped_blocks", 0, 1.0),
    ("dropless", "ragged_dot", 0, 1.0),
    ("dropless", "megablox", 0, 1.0),
    ("dropless", "triton", 0, 1.0),
    by_engine("amx", ("dropless", "amx", 0, 1.0)),
    by_engine("mkl", ("dropless", "mkl", 0, 1.0)),
    ROOMY,
]
TIGHT = [("capacity", "auto", 0, factor) for factor in (0.3, 1.0)]
SCENARIOS = ["random", "an expert without tokens", "all on one expert", "padding", "only padding"]


@functools.cache
def layer(k: int, dispatch: str, experts: str, block_size: int, factor: float):
    """Output, dropped count and gradients of one variant, as a compiled function of (arrays, valid, d_y)."""
    config = tiny_config(
        model={"d_model": D_MODEL, "d_ff": D_FF, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "num_layers": 1,
               "num_experts": EXPERTS, "num_experts_per_tok": k, "dispatch": dispatch, "capacity_factor": factor},
        kernels={"experts": experts, "block_size": block_size,
                 "matmul": experts if experts in ("amx", "mkl") else "xla"},
    )  # fmt: skip
    return moe_layer(config, make_runtime(config, mesh_of()))


def example(scenario: str):
    """Arrays (x, router, w_gate, w_up, w_down), validity and the cotangent of the output."""
    rng = np.random.default_rng(1)
    shapes = [(BATCH, SEQ, D_MODEL), (D_MODEL, EXPERTS), *[(EXPERTS, D_MODEL, D_FF)] * 2, (EXPERTS, D_FF, D_MODEL)]
    arrays = [rng.standard_normal(shape).astype(np.float32) * 0.5 for shape in shapes]
    arrays[0][..., 0] = 1  # so that the router's first row is a bias
    if scenario == "an expert without tokens":
        arrays[1][0, 2] = -6
    if scenario == "all on one expert":
        arrays[1][0, 1] = 6
    valid = np.ones((BATCH, SEQ), bool)
    if scenario == "padding":
        valid[0, 7:] = valid[1, :] = False
    if scenario == "only padding":
        valid[:] = False
    return arrays, valid, rng.standard_normal(shapes[0]).astype(np.float32)


@functools.cache
def reference(k, scenario, capacity):
    """Output, drops, what ran, and gradients, of two references that agree."""
    arrays, valid, d_y = example(scenario)
    expected, dropped, ran = oracles.moe_by_token(*arrays, k, valid, capacity)
    dense, grads = oracles.value_and_pull(lambda *a: oracles.moe_dense(*a, k, ran), arrays, d_y)
    assert oracles.error(dense, expected) < 1e-12, "the two references differ"
    return expected, dropped, ran, grads


def check(variant, k, scenario, capacity=None) -> tuple[float, np.ndarray]:
    arrays, valid, d_y = example(scenario)
    y, dropped, grads = layer(k, *variant)(arrays, valid, d_y)
    expected, expected_dropped, ran, expected_grads = reference(k, scenario, capacity)
    limit = max(1e-5, LIMITS.get(variant[1], 0))
    assert oracles.error(y, expected) < limit
    assert dropped == expected_dropped
    for name, grad, wanted in zip(("x", "router", "w_gate", "w_up", "w_down"), grads, expected_grads, strict=True):
        assert oracles.error(grad, wanted) < limit, name
    return float(dropped), ran.sum(axis=(0, 1))


def check_dropless(variant, k, scenario):
    dropped, load = check(variant, k, scenario)
    assert dropped == 0
    if scenario == "an expert without tokens" and k < EXPERTS:
        assert load[2] == 0
    if scenario == "all on one expert":
        assert load[1] == BATCH * SEQ


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("variant", KERNELS, ids=str)
def test_equals_the_reference(variant, scenario):
    check_dropless(variant, 2, scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("k", [1, EXPERTS])
@pytest.mark.parametrize("variant", [KERNELS[1], ROOMY], ids=str)
def test_other_numbers_of_experts_a_token(variant, k, scenario):
    check_dropless(variant, k, scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_expert_may_begin_at_a_multiple(monkeypatch, scenario):
    of_table = backends.find
    monkeypatch.setattr(
        "mixtral_jax.model.moe.find", lambda *names: dataclasses.replace(of_table(*names), row_multiple=8)
    )
    check(("dropless", "grouped_blocks", 6, 1.0), 2, scenario)


@pytest.mark.parametrize("experts", [[[0, 2], [2, 1], [2, 0]], [[3, 3]], [[1, 3], [3, 3], [1, 1], [1, 1], [1, 1]]])
def test_a_plan_moved_to_multiples_holds_the_same_assignments(experts):
    flat = np.asarray(experts).ravel()
    plan = dropless_plan(jnp.asarray(experts), 3, flat.size)  # expert 3 is nobody
    moved = jax.tree.map(np.asarray, at_multiples(plan, 4))
    np.testing.assert_array_equal(moved.group_sizes, -(-np.bincount(flat, minlength=4)[:3] // 4) * 4)
    ends = np.cumsum(moved.group_sizes)
    filled = np.full(len(moved.source), flat.size)
    for assignment, row in enumerate(moved.row_of.ravel()):
        if flat[assignment] == 3:
            assert row == len(moved.source)
        else:
            assert ends[flat[assignment]] - moved.group_sizes[flat[assignment]] <= row < ends[flat[assignment]]
            filled[row] = assignment
    np.testing.assert_array_equal(moved.source, filled)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("variant", TIGHT, ids=str)
def test_a_full_expert_drops_later_tokens_of_the_sequence(variant, k, scenario):
    capacity = expert_capacity(SEQ, k, EXPERTS, variant[-1])
    dropped, load = check(variant, k, scenario, capacity)
    assert load.max() <= BATCH * capacity
    assert (dropped > 0) == (scenario != "only padding")


@pytest.mark.parametrize(
    ("seq_len", "k", "experts", "factor", "rows"),
    [(16, 2, 4, 1.0, 8), (16, 2, 4, 1.25, 10), (11, 2, 4, 1.0, 6), (16, 2, 4, 4.0, 16), (2, 1, 8, 1.0, 1)],
)
def test_capacity_is_the_balanced_load_times_the_factor(seq_len, k, experts, factor, rows):
    assert expert_capacity(seq_len, k, experts, factor) == rows


@pytest.mark.parametrize("variant", [KERNELS[1], KERNELS[3], TIGHT[1]], ids=str)
def test_the_order_of_the_experts_does_not_matter(variant):
    arrays, valid, d_y = example("random")
    order = np.array([2, 0, 3, 1])
    permuted = [arrays[0], arrays[1][:, order], *[w[order] for w in arrays[2:]]]
    y, dropped, _ = layer(2, *variant)(arrays, valid, d_y)
    y_permuted, dropped_permuted, _ = layer(2, *variant)(permuted, valid, d_y)
    np.testing.assert_allclose(y, y_permuted, rtol=0, atol=2e-6)
    assert dropped == dropped_permuted


def test_padding_returns_zero_and_its_content_reaches_nothing():
    arrays, valid, d_y = example("padding")
    y, _, grads = layer(2, *KERNELS[0])(arrays, valid, d_y)
    other = [np.where(valid[..., None], arrays[0], np.float32(7)), *arrays[1:]]
    y_other, _, grads_other = layer(2, *KERNELS[0])(other, valid, d_y)
    assert not np.any(np.asarray(y)[~valid])
    jax.tree.map(np.testing.assert_array_equal, (y, grads), (y_other, grads_other))


def test_the_selection_bias_moves_the_choice_and_not_the_weights():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    indices, weights = choose_experts(logits, jnp.array([0.0, -1.0, 0.0, 0.0]), 2)
    np.testing.assert_array_equal(indices, [[0, 2]])
    np.testing.assert_allclose(weights, jax.nn.softmax(jnp.array([[2.0, 0.0]])), rtol=1e-6)
    slope = jax.grad(lambda b: choose_experts(logits, b, 2)[1][0, 0])(jnp.zeros(4))
    assert not np.any(slope)


def test_the_router_multiplies_in_full_float32_on_every_platform():
    """Accelerators round the factors of float32 products to fewer bits unless they are told not to."""
    config = tiny_config(precision={"compute": "bfloat16"})
    moe = MoE(config.model, make_runtime(config, mesh_of()), rngs=nnx.Rngs(0))
    x, bias = jnp.zeros((1, 4, 32), jnp.bfloat16), jnp.zeros(4)
    program = jax.jit(lambda x: choose_experts(moe(x, jnp.ones((1, 4), bool))[1].router_logits, bias, 2)).lower(x)
    products = [line for line in program.as_text().splitlines() if "dot_general" in line and "xbf16" not in line]
    assert len(products) >= 2
    assert all("HIGHEST" in product for product in products), products
