"""Training on any mesh equals training on one device: the first step on every mesh of up to eight, then curves."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from mixtral_jax.config import Config
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import MESH_AXES, RULES
from mixtral_jax.training.mesh_check import LIMIT, differences, first_step, initial_arrays, reduced
from mixtral_jax.training.step import Trainable
from tests import collectives, oracles
from tests.tiny import mesh_of, tiny_architecture, tiny_batch, tiny_config, tiny_trainable, train

DISPATCH = {
    "dropless": (),
    "capacity": ("model.dispatch=capacity", "model.capacity_factor=0.8"),  # some assignments are dropped
}
# One device multiplies as each of several does.
OPTIONS = ("losses.load_balance=0.1", "losses.router_z=0.01", "model.init_std=0.1", "kernels.matmul=xla")
# Measured, relative: the curves at most 2.4e-7, on losses that fall from 4.5 to 1.4.
TOLERANCE = 2e-6


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh, and how tokens reach the experts there."""

    mesh: tuple[int, ...]  # along MESH_AXES
    dispatch: str
    microbatches: int
    exchange: str

    def __str__(self) -> str:
        axes = [f"{name}{size}" for name, size in zip(MESH_AXES, self.mesh, strict=True) if size > 1]
        return "-".join([*axes, self.dispatch, f"microbatches{self.microbatches}", self.exchange])

    def pairs(self) -> set[tuple[str, ...]]:
        """Which two things come together; an exchange needs several devices along `expert`."""
        axes = [name for name, size in zip(MESH_AXES, self.mesh, strict=True) if size > 1]
        exchange = [self.exchange] if "expert" in axes else []
        return set(itertools.combinations([*axes, self.dispatch, f"microbatches{self.microbatches}", *exchange], 2))


MESHES = [sizes for sizes in itertools.product(range(1, 9), repeat=len(MESH_AXES)) if 2 <= math.prod(sizes) <= 8]
CASES = [
    Case(sizes, ("dropless", "capacity")[i % 2], 1 + i // 2 % 2, ("gather", "padded", "ragged")[i % 3])
    for i, sizes in enumerate(MESHES)
]
PAIRS = set().union(*(case.pairs() for case in CASES))


def spread_sample() -> list[Case]:
    """A few cases in which every pair occurs."""
    found, left = [], set(PAIRS)
    while left:
        found.append(max(CASES, key=lambda case: len(case.pairs() & left)))
        left -= found[-1].pairs()
    return found


SAMPLE = spread_sample()


@functools.cache
def small(unit: int, dispatch: str, microbatches: int) -> Config:
    """A model of which everything divides over `unit` devices."""
    many = {"num_heads": 128, "num_kv_heads": 64, "num_experts": 64}
    options = (*OPTIONS, *DISPATCH[dispatch], f"train.microbatches={microbatches}")
    parts = dict.fromkeys(RULES, unit) | {"sequence": 2 * unit}
    return reduced(tiny_config(*options, model=many), parts)


@functools.cache
def initial_of(unit: int):
    config = small(unit, "dropless", 1)
    return initial_arrays(config, make_runtime(config, mesh_of()))


@functools.cache
def alone(unit: int, *options):
    config = small(unit, *options)
    return first_step(config, make_runtime(config, mesh_of()), initial_of(unit))


def test_every_pair_of_axes_and_options_occurs():
    assert len(MESHES) == 95
    options = {("dropless", "capacity"), ("microbatches1", "microbatches2"), ("gather", "padded", "ragged")}
    wanted = set(itertools.combinations(MESH_AXES, 2))
    wanted |= {pair for values in options for pair in itertools.product(MESH_AXES, values)}
    wanted |= {pair for two in itertools.combinations(options, 2) for pair in itertools.product(*two)}
    assert {frozenset(pair) for pair in wanted} == {frozenset(pair) for pair in PAIRS}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in SAMPLE else (pytest.mark.slow, pytest.mark.meshes)) for case in CASES],
    ids=str,
)
def test_the_first_step_is_that_of_one_device(monkeypatch, case):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", collectives.ragged_all_to_all)
    devices = math.prod(case.mesh)
    unit = {2: 8, 4: 8, 8: 8, 3: 6, 6: 6}.get(devices, devices)
    which = unit, case.dispatch, case.microbatches
    config = small(*which)
    runtime = make_runtime(config, mesh_of(**dict(zip(MESH_AXES, case.mesh, strict=True))))
    step = first_step(config, dataclasses.replace(runtime, exchange=case.exchange), initial_of(unit))
    assert not [each for each in differences(step, alone(*which)) if not each.relative <= LIMIT]
    assert (step["dropped_share"] > 0) == (case.dispatch == "capacity")


@functools.cache
def initial():
    """Parameters and selection bias, on the host."""
    return jax.tree.map(np.asarray, tiny_architecture(tiny_config(*OPTIONS)).init(0))


def gradient_of(config: Config, arrays, mesh: dict[str, int]):
    """Gradients, losses and the routers' sums of one batch, on the host."""
    trainable = Trainable(Architecture(config.model, make_runtime(config, mesh_of(**mesh))), config)
    arrays = jax.device_put(arrays, trainable.architecture.shardings())
    grads, losses, sums, _ = jax.jit(trainable._gradients)(arrays, trainable.put(tiny_batch(config)))
    return jax.tree.map(np.asarray, (grads, losses, sums))


def assert_close(actual, expected, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert oracles.error(a, b) < tolerance, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_a_long_row_over_eight_devices():
    model = {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 32, "init_std": 0.1}
    config = tiny_config(model=model, data={"seq_len": 4096}, train={"batch_size": 1}, kernels={"matmul": "xla"})
    arrays = jax.tree.map(np.asarray, tiny_architecture(config).init(0))
    # A norm's scale sums 4,096 tokens, in an order of each processor's own: 4.5e-6 where 256 bits are added at once.
    assert_close(gradient_of(config, arrays, {"context": 8}), gradient_of(config, arrays, {}), tolerance=1e-5)


def test_evaluation_over_split_sequences():
    config, results = tiny_config(*OPTIONS), []
    for mesh in ({}, {"data": 2, "context": 2}):
        architecture = tiny_architecture(config, mesh_of(**mesh))
        arrays = jax.device_put(initial(), architecture.shardings())
        batch = tiny_batch(config)
        scores = make_scorer(architecture)(arrays)(batch)
        mask = batch.loss_mask
        results.append((scores.nats[mask], scores.greedy[mask]))
    (nats, greedy), (split_nats, split_greedy) = results
    np.testing.assert_allclose(split_nats, nats, rtol=2e-6)
    np.testing.assert_array_equal(split_greedy, greedy)


@functools.cache
def curve(dispatch: str, mesh: tuple[tuple[str, int], ...], parts: int = 1):
    """Metrics of 20 steps, stacked."""
    config = tiny_config(*OPTIONS, *DISPATCH[dispatch], f"train.microbatches={parts}")
    _, history = train(tiny_trainable(config, mesh_of(**dict(mesh))), 20)
    return {name: np.stack([metrics[name] for metrics in history]) for name in history[0]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dispatch", "mesh", "parts"),
    [
        ("dropless", {"context": 2, "expert": 2, "tensor": 2}, 2),
        ("capacity", {"fsdp": 2, "expert": 2, "tensor": 2}, 1),
    ],
    ids=str,
)
def test_the_loss_curve_is_that_of_one_device(dispatch, mesh, parts):
    alone, sharded = curve(dispatch, ()), curve(dispatch, tuple(mesh.items()), parts)
    for name in ("loss", "cross_entropy", "load_balance_loss", "router_z_loss", "dropped_share", "expert_load"):
        np.testing.assert_allclose(sharded[name], alone[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    assert alone["loss"][-1] < 0.8 * alone["loss"][0]
    assert (alone["dropped_share"].min() > 0) == (dispatch == "capacity")


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 8}], ids=str)
def test_initial_parameters_are_bitwise_those_of_one_device(mesh):
    config = tiny_config()
    alone, sharded = (tiny_architecture(config, mesh_of(**sizes)).init(3) for sizes in ({}, mesh))
    jax.tree.map(np.testing.assert_array_equal, alone, sharded)


def test_every_device_holds_its_part_alone():
    step = tiny_trainable(tiny_config(), mesh_of(fsdp=2, expert=2, tensor=2))
    state = step.start(step.architecture.init(0))
    for tree in (state.params, next(part for part in state.opt_state if hasattr(part, "mu")).mu):
        w_gate = tree["layers"]["moe"]["w_gate"]
        assert w_gate.shape == (2, 4, 32, 48)
        assert {shard.data.shape for shard in w_gate.addressable_shards} == {(2, 2, 16, 24)}
        assert len({str(shard.index) for shard in w_gate.addressable_shards}) == 8
