"""Pitfalls of sharding, looked for in the compiled training step's bytes."""

import functools

import jax
import pytest

from mixtral_jax.config_loading import replace
from mixtral_jax.planning.collectives import find_collectives
from mixtral_jax.planning.compile import bytes_per_device
from mixtral_jax.planning.hlo import parse
from tests.tiny import mesh_of, tiny_config, tiny_trainable

COMPUTE = 4  # bytes of an element: the tiny model computes in float32


@functools.cache
def step(layers=2, exchange="gather", microbatches=1, **sizes):
    """The compiled step's module, its collectives, memory and trainable."""
    config = tiny_config(f"kernels.exchange={exchange}", f"train.microbatches={microbatches}", "train.batch_size=16")
    config = replace(config, model={"num_layers": layers}, train={"remat": "full"})
    trainable = tiny_trainable(config, mesh_of(**sizes))
    compiled = trainable.step.lower(trainable.abstract(), trainable.abstract_batch()).compile()
    module = parse(compiled.as_text())
    return find_collectives(module, trainable.architecture.runtime.mesh), compiled.memory_analysis(), trainable


MESHES = [
    {"fsdp": 8},
    {"fsdp": 4, "expert": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
]
named = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: " ".join(f"{k}{v}" for k, v in sizes.items()))


def kinds(found):
    return sorted((c.kind, c.axes) for c in found)


@pytest.mark.parametrize("sizes", MESHES[2:], ids=str)
def test_operations_do_not_multiply_with_layers(sizes):
    few, many = step(layers=2, **sizes)[0], step(layers=5, **sizes)[0]
    assert kinds(few) == kinds(many)


def test_bytes_grow_by_the_same_for_every_layer():
    moved = [sum(c.runs * c.moved for c in step(layers=layers, **MESHES[2])[0]) for layers in (2, 5, 8)]
    assert moved[1] - moved[0] > 0
    # Statistics of the routers, [layers, experts], are summed in one operation: hence not to the byte.
    assert moved[2] - moved[1] == pytest.approx(moved[1] - moved[0], rel=1e-2)


@named
def test_nothing_of_the_state_is_held_twice(sizes):
    _, memory, trainable = step(**sizes)
    state = trainable.abstract()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    copies = sizes.get("data", 1)
    # Routers, norms and counters are small and whole everywhere.
    small = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.sharding.is_fully_replicated)
    assert bytes_per_device(state) == (whole - small) / (8 // copies) + small
    assert small < 0.06 * whole
    batch = bytes_per_device(trainable.abstract_batch())
    assert memory.argument_size_in_bytes == pytest.approx(bytes_per_device(state) + batch, rel=0.01)
    assert memory.alias_size_in_bytes == pytest.approx(bytes_per_device(state), rel=0.01)


@named
def test_no_device_collects_the_experts_of_others(sizes):
    found, _, trainable = step(**sizes)
    model, ways = trainable.config.model, sizes.get("expert", 1)
    own = COMPUTE * model.num_experts // ways * model.d_model * model.d_ff // sizes.get("tensor", 1)
    weights = [c for c in found if c.kind == "all-gather" and c.axes == ("fsdp",)]
    assert weights
    assert max(c.payload for c in weights) == own
    # What crosses `expert` are tokens, and weights that are not experts'.
    tokens = COMPUTE * 16 * trainable.config.data.seq_len // (8 // sizes.get("tensor", 1)) * model.d_model * ways
    others = COMPUTE * model.vocab_size * model.d_model
    assert all(c.payload <= max(tokens, others) for c in found if "expert" in c.axes)


@pytest.mark.parametrize(("sizes", "microbatches"), [*((sizes, 1) for sizes in MESHES), (MESHES[3], 2)], ids=str)
def test_gradients_of_experts_are_scattered_not_summed_whole(sizes, microbatches):
    found, _, trainable = step(microbatches=microbatches, **sizes)
    model = trainable.config.model
    expert = model.num_experts // sizes.get("expert", 1) * model.d_model * model.d_ff // sizes.get("tensor", 1)
    scattered = [c for c in found if c.kind == "reduce-scatter" and c.axes == ("fsdp",)]
    # Without an `expert` axis those of embedding and head go over the same devices.
    tables = 0 if "expert" in sizes else 2 * model.vocab_size * model.d_model
    expected = microbatches * COMPUTE * (3 * expert * model.num_layers + tables)
    assert sum(c.payload * c.runs for c in scattered) == pytest.approx(expected, rel=0.01)
    # What is summed whole (by this compiler: attention) is less than an expert matrix, the embedding or the head.
    summed = [c for c in found if c.kind == "all-reduce" and "fsdp" in c.axes and "data" not in c.axes]
    attention = COMPUTE * 4 * model.d_model * model.d_model
    assert max(c.payload for c in summed) <= attention < COMPUTE * 3 * expert


def test_an_exchange_moves_the_rows_of_tokens_there_and_back():
    found, _, trainable = step(fsdp=4, expert=2, exchange="padded")
    config = trainable.config
    tokens = 16 * config.data.seq_len // 8
    blocks = COMPUTE * 2 * tokens * min(config.model.num_experts_per_tok, 2) * config.model.d_model
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert {c.payload for c in exchanges} == {blocks}
    # There and back: forward, again for the backward pass, and backward.
    assert sum(c.runs for c in exchanges) == 6 * config.model.num_layers
