"""What is counted in small compiled programs against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.planning.collectives import find_collectives
from mixtral_jax.planning.hlo import parse
from mixtral_jax.planning.network import network_time
from mixtral_jax.planning.work import count_work
from tests.planning.fakes import fake_topology
from tests.tiny import mesh_of

KIB = 1024


def module_of(function, *shapes, mesh=None, specs=None):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if mesh is not None:
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("fsdp"), check_vma=False)
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        arguments = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in zip(arguments, shardings, strict=True)
        ]
    return parse(jax.jit(function).lower(*arguments).compile().as_text())


def repeated(body, times):
    return lambda x: jax.lax.fori_loop(0, times, lambda _, y: body(y), x)


@pytest.mark.parametrize(
    ("kind", "body", "payload", "moved"),
    [
        # Every device holds 1 KiB; a group is 4 devices.
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[:256] * 2, 4 * KIB, 3 * KIB),
        ("all-reduce", lambda x: jax.lax.psum(x, "fsdp") * 0.1, KIB, 2 * KIB * 3 / 4),
        ("reduce-scatter", lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), 4), KIB, KIB * 3 / 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True) * 2, KIB, KIB * 3 / 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), KIB, KIB),
    ],
)
@pytest.mark.parametrize("times", [1, 7])
def test_bytes_and_runs_of_collectives(kind, body, payload, moved, times):
    mesh = mesh_of(fsdp=4, tensor=2)
    module = module_of(repeated(body, times), (4 * 256,), mesh=mesh, specs=(PartitionSpec("fsdp"),))
    found = [c for c in find_collectives(module, mesh) if c.kind == kind]
    assert {c.axes for c in found} == {("fsdp",)}
    assert sum(c.runs * c.payload for c in found) == times * payload
    assert sum(c.runs * c.moved for c in found) == times * moved
    assert all(c.kind == kind for c in find_collectives(module, mesh))


def test_asynchronous_forms_and_the_reduce_scatter_of_tpu_programs():
    text = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%scattering (p: bf16[64]) -> bf16[8] {
  %p = bf16[64]{0} parameter(0)
  %all-reduce.1 = bf16[64]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %cut = bf16[8]{0} dynamic-slice(%all-reduce.1, %p), dynamic_slice_sizes={8}
}
ENTRY %main (x: bf16[64]) -> bf16[8] {
  %x = bf16[64]{0} parameter(0)
  %start = (bf16[64]{0}, bf16[512]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %done = bf16[512]{0} all-gather-done(%start)
  %both = ((bf16[64]{0}, bf16[64]{0}), (bf16[8]{0}, bf16[8]{0})) reduce-scatter-start(%x, %x), replica_groups=[1,8]<=[8]
  %alone = bf16[64]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %f = bf16[8]{0} fusion(%x), kind=kCustom, calls=%scattering
}
"""
    found = {c.name: (c.kind, c.payload) for c in find_collectives(parse(text), mesh_of(fsdp=8))}
    assert found == {
        "start": ("all-gather", 1024), "both": ("reduce-scatter", 256), "all-reduce.1": ("reduce-scatter", 128)
    }  # fmt: skip


def test_transfers_between_slices_are_collectives():
    text = """ENTRY %main (x: bf16[64]) -> bf16[64] {
  %x = bf16[64]{0} parameter(0)
  ROOT %s = (bf16[64]{0}, u32[], token[]) send(%x, %x), channel_id=1, is_host_transfer=true, frontend_attributes={KIND}
}
"""
    topology = fake_topology("v5p:4x4x4", slices=2)
    mesh = Mesh(np.array(topology.devices).reshape(2, 64), ("data", "fsdp"))
    for name, kind, payload in (("ALL_REDUCE", "all-reduce", 128), ("ALL_GATHER", "all-gather", 256)):
        (found,) = find_collectives(parse(text.replace("KIND", f'_xla_megascale_transfer_type="{name}"')), mesh)
        assert (found.kind, found.payload, found.axes, len(found.groups)) == (kind, payload, ("data",), 64)
        near, far = network_time(found, topology)
        assert (near, far) == (0, found.moved / 6.25e9)


def work_of(function, *shapes, turns=1):
    module = module_of(function, *shapes)
    return count_work(parse_again(module, turns), attention_product=0.0, expert_rows=0.0)


def parse_again(module, turns):
    return type(module)(module.computations, module.entry, turns)


def test_products_in_loops_count_every_turn():
    work = work_of(lambda x, w: jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ w), x), (64, 32), (32, 32))
    assert work.flops == 5 * 2 * 64 * 32 * 32


def test_loops_whose_turns_depend_on_data_count_as_told():
    def function(x, w):
        return jax.lax.fori_loop(0, x[0, 0].astype(int), lambda _, y: jnp.tanh(y @ w), x)

    assert work_of(function, (64, 32), (32, 32)).flops == 2 * 64 * 32 * 32
    assert work_of(function, (64, 32), (32, 32), turns=3).flops == 3 * 2 * 64 * 32 * 32
    assert module_of(function, (64, 32), (32, 32)).data_dependent_loops == 1


def test_a_slice_of_a_stack_in_a_loop_does_not_read_the_stack_every_turn():
    layers, size = 16, 128
    scan = lambda x, stack: jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, stack)[0]  # noqa: E731
    traffic = work_of(scan, (8, size), (layers, size, size)).memory_bytes
    stack = 4 * layers * size * size
    assert stack <= traffic < 5 * stack  # counting the stack in every turn would be 16 times


def test_a_convolution_that_is_a_product_counts_the_taps_inside():
    text = """ENTRY %main (l: bf16[64,32,1], r: bf16[32,8,16]) -> bf16[64,8,16] {
  %l = bf16[64,32,1]{2,1,0} parameter(0)
  %r = bf16[32,8,16]{2,1,0} parameter(1)
  ROOT %c = bf16[64,8,16]{2,1,0} convolution(%l, %r), window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_i0o->b0f
}
"""
    assert count_work(parse(text), attention_product=0.0, expert_rows=0.0).dense == 2 * 64 * 32 * 8 * 16


def test_kernels_count_by_formula():
    text = """ENTRY %main (l: bf16[64,32], r: bf16[1,32,16]) -> bf16[64,16] {
  %l = bf16[64,32]{1,0} parameter(0)
  %r = bf16[1,32,16]{2,1,0} parameter(1)
  %splash_mha_dkv_1 = bf16[64,32]{1,0} custom-call(%l), custom_call_target="tpu_custom_call"
  %ragged-dot-none.1 = bf16[64,16]{1,0} custom-call(%l, %r), custom_call_target="tpu_custom_call"
  %gmm.1 = bf16[64,16]{1,0} custom-call(%l, %r), custom_call_target="tpu_custom_call"
  ROOT %tgmm.1 = bf16[1,32,16]{2,1,0} custom-call(%l, %l), custom_call_target="tpu_custom_call"
}
"""
    work = count_work(parse(text), attention_product=100.0, expert_rows=10.0)
    assert (work.attention, work.grouped) == (400.0, 3 * 2 * 10 * 32 * 16)


def test_kernels_of_gpus_count_by_formula_and_unusual_branches_not_at_all():
    text = """%flash (a: bf16[64,32]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  ROOT %f = bf16[64,32]{1,0} custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
}
%blocks (b: bf16[64,32]) -> bf16[64,32] {
  %b = bf16[64,32]{1,0} parameter(0)
  %g = (bf16[64,32]{1,0}, u8[0]{0}) custom-call(%b), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %d = bf16[64,32]{1,0} negate(%b), metadata={op_name="jit(f)/cond/branch_0_fun/unusual/neg"}
}
ENTRY %main (l: bf16[64,32], r: bf16[1,32,16], p: pred[]) -> bf16[64,16] {
  %l = bf16[64,32]{1,0} parameter(0)
  %r = bf16[1,32,16]{2,1,0} parameter(1)
  %p = pred[] parameter(2)
  %c = bf16[64,32]{1,0} conditional(%p, %l, %l), true_computation=%flash, false_computation=%blocks
  %g = (bf16[64,32]{1,0}, u8[0]{0}) custom-call(%c), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"
  %pallas_call.2 = bf16[1,32,16]{2,1,0} custom-call(%l, %l), custom_call_target="x", backend_config={name = "tgmm"}
  %swiglu = bf16[64,32]{1,0} custom-call(%l, %l), custom_call_target="x", backend_config={name = "swiglu"}
  %unfilled = bf16[64,16]{1,0} custom-call(%l, %r, %l, %r), backend_config={name = "gmm_unfilled"}
  ROOT %pallas_call.1 = bf16[64,16]{1,0} custom-call(%l, %r), custom_call_target="x", backend_config={name = "gmm"}
}
"""
    work = count_work(parse(text), attention_product=100.0, expert_rows=10.0)
    assert (work.attention, work.grouped) == (700.0, 4 * 2 * 10 * 32 * 16)  # unfilled makes two products
    # Padding rows are neither read nor written, but for the zeros of gmm; the flash call and the next take all.
    somebody = 2 * 10 * (2 * 32 + 3 * 32 + (2 * 32 + 16) + 32) + 2 * 32 * 16 * (1 + 2 + 1) + 2 * 64 * 16
    assert work.memory_bytes == somebody + 2 * 2 * 2 * 64 * 32


def test_kernels_for_hopper_count_by_formula_and_read_the_experts_of_a_layer():
    text = """ENTRY %main (b: s32[8], x: bf16[64,32], w: bf16[6,32,16]) -> bf16[2,32,16] {
  %b = s32[8]{0} parameter(0)
  %x = bf16[64,32]{1,0} parameter(1)
  %w = bf16[6,32,16]{2,1,0} parameter(2)
  %y = (bf16[64,16]{1,0}, bf16[64,16]{1,0}, bf16[64,16]{1,0}) custom-call(%b, %x, %w, %w), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/hopper_gated/mpmd_map"}
  %g = bf16[64,16]{1,0} get-tuple-element(%y), index=0
  %z = bf16[64,32]{1,0} custom-call(%b, %g, %w), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/hopper_gmm/mpmd_map"}
  %d = bf16[2,32,16]{2,1,0} custom-call(%b, %z, %g), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/hopper_tgmm/mpmd_map"}
  ROOT %e = bf16[6,32,16]{2,1,0} custom-call(%b, %z, %g, %w), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/hopper_tgmm/mpmd_map"}
}
"""  # noqa: E501
    work = count_work(parse(text), attention_product=0.0, expert_rows=10.0, experts=2)
    assert work.grouped == (2 + 1 + 1 + 1) * 2 * 10 * 32 * 16
    sums = 10 * (32 + 16) + 2 * 32 * 16  # new, and written in a stack of all layers': the same
    products = 10 * (32 + 3 * 16) + 2 * 2 * 32 * 16, 10 * 16 + 2 * 32 * 16 + 64 * 32, sums, sums
    assert work.memory_bytes == 4 * 4 * 8 + 2 * sum(products)


def test_arrays_in_a_core_s_own_memory_are_not_traffic():
    text = """ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %near = f32[256]{0:T(256)S(1)} negate(%x)
  ROOT %y = f32[256]{0} add(%near, %near)
}
"""
    assert count_work(parse(text), attention_product=0.0, expert_rows=0.0).memory_bytes == 2 * 1024
