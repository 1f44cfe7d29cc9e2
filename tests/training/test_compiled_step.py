"""What the compiled training step must not do: move more than it should, or hold what other devices hold."""

import collections
import dataclasses
import functools
import os
import re

import jax
import numpy as np
import pytest

from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import make_mesh
from mixtral_jax.training.step import Trainable
from tests.tiny import mesh_of, tiny_config

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
D_MODEL, D_FF = 40, 56  # no other size of the model is one of these


def compile_step(trainable: Trainable):
    return trainable.step.lower(trainable.abstract(), trainable.abstract_batch()).compile()


@functools.cache
def step(exchange: str, num_experts: int = 4):
    """The program for two devices along `fsdp` and two along `expert`."""
    model = {"d_model": D_MODEL, "d_ff": D_FF, "head_dim": 10, "num_experts": num_experts}
    config = tiny_config(model=model)
    runtime = dataclasses.replace(make_runtime(config, mesh_of(fsdp=2, expert=2)), exchange=exchange)
    return compile_step(Trainable(Architecture(config.model, runtime), config))


def collective_shapes(program) -> list[tuple[str, tuple[int, ...]]]:
    """Operation and shape of everything that a collective returns; an entry for each array."""
    found = []
    for line in program.as_text().splitlines():
        match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if match:
            for dims in re.findall(r"\w+\[([\d,]*)\]", match.group(1)):
                found.append((match.group(2), tuple(int(n) for n in dims.split(",") if n)))
    return found


@pytest.mark.parametrize("exchange", ["gather", "padded"])
def test_collectives_do_not_grow_with_the_experts(exchange):
    """With the layers neither: `tests/planning/test_step_programs.py`."""
    counts = [collections.Counter(name for name, _ in collective_shapes(step(exchange, experts))) for experts in (4, 8)]
    assert counts[0] == counts[1]
    assert counts[0]["all-gather"]
    assert bool(counts[0]["all-to-all"]) == (exchange == "padded")


@pytest.mark.parametrize("exchange", ["gather", "padded"])
def test_a_device_gathers_its_own_experts_weights_once_a_direction(exchange):
    weights = [(name, shape) for name, shape in collective_shapes(step(exchange)) if {D_MODEL, D_FF} <= set(shape)]
    gathered = collections.Counter(shape for name, shape in weights if name == "all-gather")
    # Of the four experts, the two of this device: gate and up, then down; forward and again for the backward pass.
    assert gathered == {(2, D_MODEL, D_FF): 4, (2, D_FF, D_MODEL): 2}
    # Sums of whole gradients would be twice the traffic and need the memory.
    assert not [shape for name, shape in weights if name == "all-reduce"]
    scattered = collections.Counter(
        shape for name, shape in collective_shapes(step(exchange)) if name == "reduce-scatter"
    )
    assert scattered[(2, D_MODEL // 2, D_FF)] == 2
    assert scattered[(2, D_FF, D_MODEL // 2)] == 1


@pytest.mark.parametrize("exchange", ["gather", "padded"])
def test_no_device_sees_all_router_logits(exchange):
    rows, seq_len = 8, 32
    assert not [shape for _, shape in collective_shapes(step(exchange)) if shape[:2] == (rows, seq_len)]


def test_keys_and_values_of_whole_sequences_are_gathered_once_a_direction_and_not_kept():
    config = tiny_config(model={"d_model": D_MODEL, "head_dim": 10})
    runtime = make_runtime(config, mesh_of(context=2))
    shapes = collective_shapes(compile_step(Trainable(Architecture(config.model, runtime), config)))
    gathered = [shape for name, shape in shapes if name == "all-gather" and shape[-2:] == (2, 10)]
    assert gathered == [(8, 32, 2, 10)] * 4
    assert not [shape for name, shape in shapes if shape[-2:] == (4, 10) and 32 in shape], "queries move"


def test_the_optimizer_state_is_split_like_the_parameters():
    program, shares = step("gather"), collections.Counter()
    leaves = [
        jax.tree_util.tree_leaves_with_path(tree[0].opt_state) for tree in (program.output_shardings, program.out_info)
    ]
    for (path, sharding), (_, array) in zip(*leaves, strict=True):
        shares[getattr(path[-1], "key", "")] += array.size // np.prod(sharding.shard_shape(array.shape))
    moments = 2  # of each parameter
    assert {name: shares[name] for name in ("w_gate", "w_up", "w_down")} == dict.fromkeys(
        ("w_gate", "w_up", "w_down"), moments * 4
    )
    assert {name: shares[name] for name in ("wq", "wo", "embedding", "lm_head")} == dict.fromkeys(
        ("wq", "wo", "embedding", "lm_head"), moments * 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 2])
def test_the_step_compiles_for_tpu_with_ragged_exchanges_and_splash(context):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs that are not there, is not installed")
    from jax.experimental import topologies

    # Only the compiler is used: no chip is looked for, and none is taken from another process.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    config = tiny_config(
        model={"d_model": 256, "d_ff": 256, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128},
        data={"seq_len": 512},
        mesh={"fsdp": 4 // context, "expert": 2, "context": context},
        precision={"compute": "bfloat16"},
    )
    runtime = make_runtime(config, make_mesh(config.mesh, devices))
    assert (runtime.attention, runtime.exchange) == ("splash", "ragged")
    program = compile_step(Trainable(Architecture(config.model, runtime), config))
    counts = collections.Counter(name for name, _ in collective_shapes(program))
    assert counts["ragged-all-to-all"] == 4  # there and back, forward and backward
    assert "splash" in program.as_text()
