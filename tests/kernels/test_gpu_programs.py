"""The fast path of CUDA GPUs, compiled without one: grouped products, flash attention, ragged exchanges."""

import collections
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.config import PrecisionConfig
from mixtral_jax.kernels.attention import attention
from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertWeights, expert_ffn
from mixtral_jax.kernels.permutation import RowMover, combine_rows, dispatch_rows
from mixtral_jax.planning.compile import compile_step
from mixtral_jax.planning.hlo import Module, parse
from mixtral_jax.planning.topology import describe_topology
from mixtral_jax.planning.work import count_work
from mixtral_jax.precision import make_precision
from mixtral_jax.sharding import MESH_AXES
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin, the compiler of GPUs"
)


@functools.cache
def one_gpu(name: str) -> NamedSharding:
    device = describe_topology(f"{name}:1x1").devices[:1]
    return NamedSharding(Mesh(np.array(device).reshape([1] * len(MESH_AXES)), MESH_AXES), PartitionSpec())


def compiled(gpu, function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=one_gpu(gpu)) for shape, dtype in shapes]
    return jax.jit(function).lower(*arrays).compile()


def kernels(module: Module) -> collections.Counter:
    """How often a program calls each kernel, loops counted and unusual branches not."""
    found = collections.Counter()
    for name, computation in module.computations.items():
        for instruction in computation.values():
            ours = re.search(r'[{ ]name = "(\w+)"|\b(hopper_\w+)\b', instruction.attributes)
            kernel = ours[1] or ours[2] if ours else instruction.attribute("custom_call_target").strip('"')
            if instruction.opcode == "custom-call":
                found[kernel] += module.runs[name]
    return found


def products_of(called: collections.Counter) -> tuple[int, int]:
    """Products with rows on the left, of which the gradient of the rows adds up two in one call, and sums over rows."""
    sums = called["tgmm"] + called["hopper_tgmm"]
    rows = called["gmm"] + called["gmm_unfilled"] + called["hopper_gmm"] + 2 * called["hopper_gated"]
    return rows + sums // 3, sums


@pytest.mark.parametrize(
    ("gpu", "backend", "dtype"),
    [("h100", "hopper", jnp.bfloat16), ("h100", "triton", jnp.bfloat16), ("h100", "triton", jnp.float32),
     ("b200", "triton", jnp.bfloat16), ("b200", "triton", jnp.float32), ("a100", "triton", jnp.bfloat16),
     ("h200", "hopper", jnp.bfloat16)],
)  # fmt: skip
def test_expert_products_are_those_of_the_rows(gpu, backend, dtype):
    """XLA's own grouped product multiplies every row with every expert's matrix."""
    rows, used, d_model, d_ff, experts = 4096, 1000, 4096, 14336, 8

    @jax.shard_map(mesh=one_gpu(gpu).mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    def both(x, sizes, *w):
        options = ExpertOptions(backend)
        out, pull = jax.vjp(lambda x, *w: expert_ffn(x, sizes, ExpertWeights(*w), options), x, *w)
        return out, pull(out)

    w_in, w_out = ((experts, d_model, d_ff), dtype), ((experts, d_ff, d_model), dtype)
    program = compiled(gpu, both, ((rows, d_model), dtype), ((experts,), jnp.int32), w_in, w_in, w_out)
    module = parse(program.as_text())
    called = kernels(module)
    assert products_of(called) == (3 + 3, 3)
    work = count_work(module, attention_product=0.0, expert_rows=float(used))
    assert (work.dense, work.grouped) == (0, 9 * 2 * used * d_model * d_ff)
    inner = 2 * rows * d_ff * dtype.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < 5 * inner  # no row is there once an expert


@pytest.mark.parametrize("gpu", ["h100", "b200", "a100"])
@pytest.mark.parametrize(
    ("d_model", "k", "dtype"), [(4096, 2, jnp.bfloat16), (512, 2, jnp.float32), (6144, 4, jnp.bfloat16)]
)
def test_rows_are_moved_by_one_kernel_each(gpu, d_model, k, dtype):
    tokens, padding, mover = 2048, 1016, RowMover("triton")
    rows, whole = tokens * k + padding, {"in_specs": PartitionSpec(), "out_specs": PartitionSpec()}

    @jax.shard_map(mesh=one_gpu(gpu).mesh, **whole, check_vma=False)
    def spread(x, source, row_of):
        return dispatch_rows(x, source, row_of, mover)

    @jax.shard_map(mesh=one_gpu(gpu).mesh, **whole, check_vma=False)
    def pull(out, weights, source, row_of, d_y):
        return jax.vjp(lambda *a: combine_rows(*a, source, row_of, mover), out, weights)[1](d_y)[:2]

    x, out, maps = (
        ((tokens, d_model), dtype),
        ((rows, d_model), dtype),
        [(n, jnp.int32) for n in [(rows,), (tokens, k)]],
    )
    size = dtype.dtype.itemsize * d_model
    for name, function, arrays, moved in (
        ("spread_rows", spread, [x, *maps], tokens + rows),
        ("combine_gradients", pull, [out, ((tokens, k), jnp.float32), *maps, x], tokens + 2 * rows),
    ):
        program = compiled(gpu, function, *arrays)
        module = parse(program.as_text())
        assert kernels(module) == {name: 1}
        assert {i.opcode for i in module.computations[module.entry].values()} <= {
            "parameter",
            "custom-call",
            "tuple",
            "get-tuple-element",
        }
        assert program.memory_analysis().temp_size_in_bytes == 0
        work = count_work(module, attention_product=0.0, expert_rows=float(tokens * k))
        assert 1 <= work.memory_bytes / (moved * size) < 1.01
        assert work.flops == 0


@pytest.mark.parametrize(("experts", "element"), [("fp8", "f8e4m3fn"), ("int8", "s8")])
def test_hopper_multiplies_in_8_bits_what_was_rounded_in_few_passes(experts, element):
    """Factors lie with the side together that is summed, so most are needed in two orders: both come from one pass."""
    rows, d_model, d_ff, num_experts, dtype = 8192, 2048, 4096, 8, jnp.bfloat16
    eight_bit = make_precision(PrecisionConfig(experts=experts)).experts

    @jax.shard_map(mesh=one_gpu("h100").mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    def both(x, sizes, d_out, *w):
        options = ExpertOptions("hopper", eight_bit=eight_bit, row_multiple=128)
        out, pull = jax.vjp(lambda x, *w: expert_ffn(x, sizes, ExpertWeights(*w), options), x, *w)
        return out, pull(d_out)

    w_in, w_out = ((num_experts, d_model, d_ff), dtype), ((num_experts, d_ff, d_model), dtype)
    x = ((rows, d_model), dtype)
    text = compiled("h100", both, x, ((num_experts,), jnp.int32), x, w_in, w_in, w_out).as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line and "hopper_" in line]
    assert len(calls) == 3 + 3 + 3
    types = {i.name: i.shapes[0].dtype for c in parse(text).computations.values() for i in c.values() if i.shapes}
    for line in calls:
        names = re.findall(r"%([\w.-]+)", line.split("custom-call(")[1].split(")")[0])
        assert sum(types[name] == element for name in names) == 2, line
    assert not re.search(rf"(bf16|f32)\[({d_ff}|{d_model}),{rows}\]\{{1,0\}}", text[text.index("ENTRY") :])
    # What is rounded by rows is not transposed and back, which took eight times as long on a card.
    bodies = re.findall(r"\n%fused\S* \(.*?\n}", text, re.DOTALL)
    assert not [body for body in bodies if " gather(" in body and " transpose(" in body]


@pytest.mark.parametrize("seq_len", [4096, 16384])
def test_attention_of_packed_rows_is_flash_and_linear_in_memory(seq_len):
    rows, heads, kv_heads, head_dim = 2, 32, 8, 128

    def both(q, k, v, ids, d_out):
        out, pull = jax.vjp(lambda *a: attention(*a, ids, mesh=one_gpu("h100").mesh, backend="cudnn"), q, k, v)
        return out, pull(d_out)

    shapes = [((rows, seq_len, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    program = compiled("h100", both, *shapes, ((rows, seq_len), jnp.int32), shapes[0])
    text = program.as_text()
    called = kernels(parse(text))
    assert (called["__cudnn$fmhaSoftmax"], called["__cudnn$fmhaSoftmaxBackward"]) == (1, 1)
    assert not re.search(rf"\[[\d,]*{seq_len},{seq_len}[\d,]*\]", text)
    assert program.memory_analysis().temp_size_in_bytes < 6 * rows * seq_len * heads * head_dim * 2
    # What cuDNN takes and gives lies as the model has it: nothing is transposed on the usual way.
    usual = [name for name, times in parse(text).runs.items() if times]
    results = [i for name in usual for i in parse(text).computations[name].values() if i.opcode == "conditional"]
    assert len(results) == 2
    layouts = [re.search(rf"^ *%{i.name} = (.*?) conditional", text, re.MULTILINE)[1] for i in results]
    assert all("{3,2,1,0}" in layout and "{3,1,2,0}" not in layout for layout in layouts)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_step_uses_the_kernels_alone_and_moves_rows_by_ragged_exchanges_and_gathers(remat):
    """The whole training step for 8 H100, every size another one."""
    config = tiny_config(
        model={"d_model": 256, "d_ff": 640, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "num_layers": 3},
        data={"seq_len": 384},
        mesh={"fsdp": 4, "expert": 2},
        precision={"compute": "bfloat16"},
        train={"remat": remat},
    )
    program = compile_step(config, describe_topology("h100:1x8"))
    runtime = program.runtime
    assert (runtime.attention, runtime.experts, runtime.exchange) == ("cudnn", "triton", "ragged")
    module = parse(program.text)
    layers, again = config.model.num_layers, remat == "full"
    called = kernels(module)
    assert products_of(called) == (layers * (6 + 3 * again), layers * 3)
    assert called["__cudnn$fmhaSoftmax"] == layers * (1 + again)
    assert called["__cudnn$fmhaSoftmaxBackward"] == layers
    assert (called["spread_rows"], called["combine_gradients"]) == (layers * (1 + again), layers)
    assert not re.search(rf"\[[\d,]*{config.data.seq_len},{config.data.seq_len}[\d,]*\]", program.text)
    products = [
        instruction.shapes[0].dims
        for name, computation in module.computations.items()
        if module.runs[name]
        for instruction in computation.values()
        if instruction.opcode == "dot"
    ]
    assert products
    assert not [dims for dims in products if config.model.d_ff in dims], "a product of experts besides the kernels"

    runs = collections.Counter()
    for name, computation in module.computations.items():
        for instruction in computation.values():
            runs[instruction.opcode.removesuffix("-start")] += module.runs[name]
            if instruction.opcode == "scatter" and module.runs[name] and instruction.shapes[0].dtype != "s32":
                assert config.model.vocab_size in instruction.shapes[0].dims, "rows are summed by scattering"
    # There and back; forward, backward, and what is computed again.
    assert runs["ragged-all-to-all"] == config.model.num_layers * (4 + 2 * (remat == "full"))


def test_one_gpu_reads_the_experts_and_writes_their_gradients_where_they_lie():
    config = tiny_config(
        model={"d_model": 256, "d_ff": 512, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "num_layers": 2},
        precision={"compute": "bfloat16"},
    )
    program = compile_step(config, describe_topology("h100:1x1"))
    assert (program.runtime.experts, program.runtime.remat) == ("hopper", "none")
    module = parse(program.text)
    called = kernels(module)
    assert products_of(called) == (config.model.num_layers * 6, config.model.num_layers * 3)
    assert called["spread_rows"] == called["combine_gradients"] == config.model.num_layers
    runs = [
        module.runs[name]
        for name, computation in module.computations.items()
        for instruction in computation.values()
        if instruction.opcode == "custom-call" and "/hopper_gated/" in instruction.source
    ]
    assert runs == [1, 1]  # no loop over layers
    whole = rf"bf16\[{2 * config.model.num_experts},256,512\]"
    assert len(re.findall(rf"hopper_gated.*{whole}|{whole}.*hopper_gated", program.text)) == 2
    # Each layer's product writes into the stack of all; nothing puts layers together or copies them.
    sums = [line for line in program.text.splitlines() if "hopper_tgmm" in line and "custom-call(" in line]
    assert len(sums) == 2 * 3
    assert all(
        "output_to_operand_aliasing" in line and f"bf16[{2 * config.model.num_experts}," in line for line in sums
    )
    stacks = {(2, config.model.num_experts, *sides) for sides in ((256, 512), (512, 256))}
    moved = [
        instruction.name
        for name, computation in module.computations.items()
        for instruction in computation.values()
        if module.runs[name] and instruction.opcode in ("copy", "concatenate", "dynamic-update-slice")
        if instruction.shapes[0].dims in stacks
    ]
    assert not moved


@pytest.mark.parametrize(("gpu", "experts"), [("a100", "triton"), ("b200", "triton")])
def test_the_step_compiles_for_every_generation(gpu, experts):
    """What `auto` takes; before Hopper cuDNN's attention has a mask, and another name."""
    config = tiny_config(
        model={"d_model": 256, "d_ff": 512, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "num_layers": 1},
        data={"seq_len": 256},
        mesh={"data": 2, "fsdp": 2},
        precision={"compute": "bfloat16"},
    )
    program = compile_step(config, describe_topology(f"{gpu}:2x2"))
    assert (program.runtime.attention, program.runtime.experts) == ("cudnn", experts)
    called = kernels(parse(program.text))
    assert products_of(called) == (6, 3)
    assert called["spread_rows"] == called["combine_gradients"] == 1
    assert called["__cudnn$fmhaScaleBiasSoftmaxBackward" if gpu == "a100" else "__cudnn$fmhaSoftmaxBackward"] == 1
