"""Three exchanges of an expert group: output, every gradient and every drop against the token-by-token reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.exchange import expert_slices, sort_arrivals
from mixtral_jax.model.routing import choose_experts, device_quota, drop_beyond_quota, expert_capacity
from mixtral_jax.runtime import make_runtime
from tests import collectives, oracles
from tests.tiny import mesh_of, moe_layer, tiny_config

BATCH, SEQ, D_MODEL, D_FF, EXPERTS = 8, 6, 8, 12, 8
EXCHANGES = ["gather", "padded", "ragged"]
SCENARIOS = ["random", "experts without tokens", "all on one expert", "all on one device", "padding", "only padding"]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", collectives.ragged_all_to_all)


@functools.cache
def layer(
    k: int, exchange: str, dispatch: str, factor: float, axes: tuple[tuple[str, int], ...], experts="auto", rows="xla"
):
    """Output, dropped count and gradients as a compiled function of (arrays, valid, d_y)."""
    name = "capacity_factor" if dispatch == "capacity" else "buffer_factor"
    config = tiny_config(
        model={"d_model": D_MODEL, "d_ff": D_FF, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "num_layers": 1,
               "num_experts": EXPERTS, "num_experts_per_tok": k, "dispatch": dispatch, name: factor},
        kernels={"experts": experts},
    )  # fmt: skip
    runtime = dataclasses.replace(make_runtime(config, mesh_of(**dict(axes))), exchange=exchange, rows=rows)
    return moe_layer(config, runtime)


def example(scenario: str):
    """Arrays (x, router, w_gate, w_up, w_down), validity and the cotangent of the output."""
    rng = np.random.default_rng(1)
    shapes = [(BATCH, SEQ, D_MODEL), (D_MODEL, EXPERTS), *[(EXPERTS, D_MODEL, D_FF)] * 2, (EXPERTS, D_FF, D_MODEL)]
    arrays = [rng.standard_normal(shape).astype(np.float32) * 0.5 for shape in shapes]
    arrays[0][..., 0] = 1  # so that the router's first row is a bias
    if scenario == "experts without tokens":
        arrays[1][0, [0, 3, 7]] = -6
    if scenario == "all on one expert":
        arrays[1][0, 5] = 6
    if scenario == "all on one device":
        arrays[1][0, 2:4] = 9  # the experts of the second of four devices
    valid = np.ones((BATCH, SEQ), bool)
    if scenario == "padding":
        valid[0, 3:] = valid[1, :] = valid[6, 1:] = False
    if scenario == "only padding":
        valid[:] = False
    return arrays, valid, rng.standard_normal(shapes[0]).astype(np.float32)


def chosen(arrays, valid, k):
    """Experts of every assignment in numpy; EXPERTS where there is none."""
    indices, _ = choose_experts(jnp.asarray(arrays[0] @ arrays[1]), jnp.zeros(EXPERTS), k)
    return np.where(valid[..., None], indices, EXPERTS)


def which_run(experts, devices, quota):
    """[batch, seq, experts]: the assignments that run, one by one: positions first, then sequences, of every device."""
    ran = np.zeros((BATCH, SEQ, EXPERTS), bool)
    for rows in np.split(np.arange(BATCH), devices):
        sent = np.zeros(devices, int)
        for t in range(SEQ):
            for b in rows:
                for e in experts[b, t][experts[b, t] < EXPERTS]:
                    device = e // (EXPERTS // devices)
                    ran[b, t, e] = sent[device] < quota
                    sent[device] += ran[b, t, e]
    return ran


@functools.cache
def reference(scenario, k, ran):
    """Output and gradients where these assignments run, given as bytes."""
    arrays, _, d_y = example(scenario)
    which = np.frombuffer(ran, bool).reshape(BATCH, SEQ, EXPERTS)
    return oracles.value_and_pull(lambda *a: oracles.moe_dense(*a, k, which), arrays, d_y)


def check(run, scenario, k, ran):
    arrays, valid, d_y = example(scenario)
    y, dropped, grads = run(arrays, valid, d_y)
    expected, expected_grads = reference(scenario, k, ran.tobytes())
    assert oracles.error(y, expected) < 1e-5
    for name, grad, wanted in zip(("x", "router", "w_gate", "w_up", "w_down"), grads, expected_grads, strict=True):
        assert oracles.error(grad, wanted) < 1e-5, name
    assert dropped == valid.sum() * k - ran.sum()
    return float(dropped)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("k", [1, 3])  # fewer and more than the experts of a device
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_dropless_drops_nothing(exchange, k, scenario):
    arrays, valid, _ = example(scenario)
    ran = which_run(chosen(arrays, valid, k), 1, BATCH * SEQ * k)
    load = ran.sum(axis=(0, 1))
    assert check(layer(k, exchange, "dropless", 0.0, (("expert", 4),)), scenario, k, ran) == 0
    if scenario == "experts without tokens":
        assert not load[[0, 3, 7]].any()
    if scenario == "all on one expert":
        assert load[5] == BATCH * SEQ
    if scenario == "all on one device":
        assert load[2:4].sum() == BATCH * SEQ * min(k, 2)


@pytest.mark.parametrize("scenario", ["random", "all on one device", "padding"])
@pytest.mark.parametrize(("exchange", "devices"), [*((exchange, 4) for exchange in EXCHANGES), ("ragged", 1)])
def test_kernels_may_move_the_rows(exchange, devices, scenario):
    """Those for GPUs, step by step."""
    arrays, valid, _ = example(scenario)
    ran = which_run(chosen(arrays, valid, 3), 1, BATCH * SEQ * 3)
    run = layer(3, exchange, "dropless", 0.0, (("expert", devices),), rows="triton")
    assert check(run, scenario, 3, ran) == 0


@pytest.mark.parametrize(
    ("axes", "experts"),
    [((("expert", 8),), "grouped_blocks"), ((("fsdp", 2), ("expert", 2), ("tensor", 2)), "ragged_dot")],
    ids=str,
)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_expert_a_device_and_other_axes(exchange, axes, experts):
    arrays, valid, _ = example("padding")
    ran = which_run(chosen(arrays, valid, 2), 1, BATCH * SEQ * 2)
    check(layer(2, exchange, "dropless", 0.0, axes, experts), "padding", 2, ran)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("k", "factor"), [(1, 1.0), (2, 1.5)])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_what_overflows_a_buffer_is_dropped_and_counted(exchange, k, factor, scenario):
    arrays, valid, _ = example(scenario)
    tokens = BATCH * SEQ // 4
    quota = device_quota(tokens, k, EXPERTS, 4, factor)
    assert quota == -(-int(factor * tokens * k) // 4)
    ran = which_run(chosen(arrays, valid, k), 4, quota)
    dropped = check(layer(k, exchange, "dropless", factor, (("expert", 4),)), scenario, k, ran)
    if scenario == "all on one device":
        assert dropped == BATCH * SEQ * k - 4 * quota
    assert (dropped > 0) == (scenario != "only padding")


@pytest.mark.parametrize(("k", "rows"), [(1, 10), (2, 20), (3, 20)])
def test_a_device_has_room_for_what_can_come(k, rows):
    """A token chooses an expert once, so of ten tokens at most two times ten rows go to a device with two experts."""
    assert device_quota(10, k, EXPERTS, 4, 0.0) == device_quota(10, k, EXPERTS, 4, 99.0) == rows


def test_a_roomy_buffer_drops_nothing():
    arrays, valid, _ = example("all on one device")
    run = layer(2, "padded", "dropless", 4.0, (("expert", 4),))
    assert check(run, "all on one device", 2, which_run(chosen(arrays, valid, 2), 1, 1000)) == 0


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_capacity_drops_the_same_on_every_exchange(exchange, scenario):
    arrays, valid, _ = example(scenario)
    _, _, ran = oracles.moe_by_token(*arrays, 2, valid, expert_capacity(SEQ, 2, EXPERTS, 1.0))
    check(layer(2, exchange, "capacity", 1.0, (("expert", 4),)), scenario, 2, ran)


def test_a_later_token_takes_no_earlier_ones_room():
    experts = np.random.default_rng(0).integers(0, EXPERTS, (3, SEQ, 2))
    kept = np.asarray(drop_beyond_quota(jnp.asarray(experts), EXPERTS, 4, 5))
    for t in range(1, SEQ):
        other = experts.copy()
        other[1, t:] = (other[1, t:] + 3) % EXPERTS
        changed = np.asarray(drop_beyond_quota(jnp.asarray(other), EXPERTS, 4, 5))
        np.testing.assert_array_equal(changed[1, :t], kept[1, :t])
    assert (kept == EXPERTS).any()


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_slices_are_a_permutation_of_all_rows(seed, devices):
    """Moves rows in numpy as the collective's documentation says and finds them sorted by expert, then by device."""
    counts = np.random.default_rng(seed).integers(0, 4, (devices, 4)) * (
        np.random.default_rng(9).random((devices, 4)) < 0.7
    )
    plans = [expert_slices(jnp.asarray(counts), jnp.asarray(me)) for me in range(devices)]
    local = 4 // devices

    def move(rows, direction, sizes):
        out = [np.full(size, -1) for size in sizes]
        for source in range(devices):
            there = plans[source][direction]
            for i in range(4):
                target, back = i // local, source * local + i % local
                size = int(there.sizes[i])
                assert size == plans[target][direction].arriving[back]
                part = rows[source][int(there.offsets[i]) : int(there.offsets[i]) + size]
                assert (out[target][int(there.landing[i]) :][:size] == -1).all()
                out[target][int(there.landing[i]) : int(there.landing[i]) + size] = part
        return out

    # A row's number tells its expert, its source and its place.
    sent = [np.concatenate([100 * e + 10 * s + np.arange(counts[s, e]) for e in range(4)]) for s in range(devices)]
    arrived = move(sent, 0, counts.sum(axis=0).reshape(devices, local).sum(axis=1))
    np.testing.assert_array_equal(np.concatenate(arrived), np.sort(np.concatenate(sent)))
    returned = move(arrived, 1, counts.sum(axis=1))
    jax.tree.map(np.testing.assert_array_equal, returned, sent)


@pytest.mark.parametrize(
    "arriving", [[[2, 0, 1], [0, 0, 0], [1, 3, 0]], [[0, 0, 0]] * 3, [[4, 0, 0], [0, 4, 0], [0, 0, 4]]]
)
def test_padded_arrivals_are_sorted_by_expert(arriving):
    arriving, block = np.array(arriving), 4
    slot_of_row, row_of_slot = (np.asarray(a) for a in sort_arrivals(jnp.asarray(arriving), block))
    slots = [
        (e, s, s * block + arriving[s, :e].sum() + i) for s in range(3) for e in range(3) for i in range(arriving[s, e])
    ]
    expected = [slot for _, _, slot in sorted(slots)]
    np.testing.assert_array_equal(slot_of_row, expected + [12] * (12 - len(expected)))
    inverse = np.full(12, 12)
    inverse[expected] = np.arange(len(expected))
    np.testing.assert_array_equal(row_of_slot, inverse)
