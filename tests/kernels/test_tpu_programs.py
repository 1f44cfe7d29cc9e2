"""The fast path of TPUs, compiled without one for shapes of the shipped configs: the chosen experts' work alone."""

import functools
import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.config import MeshConfig, PrecisionConfig
from mixtral_jax.kernels.attention import attention
from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertWeights, expert_ffn
from mixtral_jax.precision import make_precision
from mixtral_jax.sharding import make_mesh

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler of TPUs")
CHIPS = ["v5p:2x2x1", "v6e:2x2"]


@functools.cache
def one_chip(topology: str) -> NamedSharding:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nobody's chip is taken: only its compiler is used
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return NamedSharding(make_mesh(MeshConfig(), devices[:1]), PartitionSpec())


def compiled(topology, function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=one_chip(topology)) for shape, dtype in shapes]
    return jax.jit(function).lower(*arrays).compile()


@pytest.mark.parametrize(("experts", "topology"), [("compute", CHIPS[0]), ("int8", CHIPS[0]), ("fp8", CHIPS[1])])
def test_expert_products_are_those_of_the_rows(experts, topology):
    """A dense program would multiply every row with every expert in some product."""
    eight_bit = make_precision(PrecisionConfig(experts=experts)).experts
    rows, d_model, d_ff, local_experts = 4096, 4096, 14336, 8
    bf16, weights = jnp.bfloat16, (local_experts, d_model, d_ff)

    def gradients(x, sizes, *w):
        def run(x, *w):
            return jnp.sum(
                expert_ffn(x, sizes, ExpertWeights(*w), ExpertOptions("megablox", eight_bit=eight_bit)).astype(
                    jnp.float32
                )
                ** 2
            )

        return jax.grad(run, argnums=(0, 1, 2, 3))(x, *w)

    shapes = [((rows, d_model), bf16), ((local_experts,), jnp.int32), (weights, bf16), (weights, bf16)]
    program = compiled(topology, gradients, *shapes, ((local_experts, d_ff, d_model), bf16))
    products = 3 * 3 * 2 * rows * d_model * d_ff  # three matrices; forward and two gradients
    assert products <= program.cost_analysis()["flops"] < 1.02 * products
    assert program.as_text().count("tpu_custom_call") >= 9


@pytest.mark.parametrize("topology", CHIPS)
def test_attention_of_packed_rows_compiles_and_is_linear_in_memory(topology):
    length, heads, kv_heads, head_dim = 8192, 32, 8, 128

    def gradients(q, k, v, ids):
        def run(*a):
            out = attention(*a, ids, mesh=one_chip(topology).mesh, backend="splash")
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(run, argnums=(0, 1, 2))(q, k, v)

    shapes = [((1, length, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    program = compiled(topology, gradients, *shapes, ((1, length), jnp.int32))
    assert "tpu_custom_call" in program.as_text()
    scores = length * length * heads * 2
    arrays = sum(math.prod(shape) for shape, _ in shapes) * 2
    assert program.memory_analysis().temp_size_in_bytes < min(scores, 12 * arrays)
