"""What runs where: the mesh, the table of axes, the choice of kernels, and sentences for what cannot be."""

import jax
import pytest
from jax.sharding import PartitionSpec

from mixtral_jax import runtime
from mixtral_jax.config import MeshConfig, PrecisionConfig, UserError
from mixtral_jax.kernels.cpu.matmul import ENGINES, available
from mixtral_jax.precision import make_precision
from mixtral_jax.runtime import choose_attention, choose_exchange, choose_experts, make_runtime
from mixtral_jax.sharding import MESH_AXES, RULES, axis_size, make_mesh, spec
from tests.tiny import mesh_of, tiny_config, tiny_trainable


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


def test_the_mesh_takes_the_rest():
    assert dict(make_mesh(MeshConfig(expert=2)).shape) == dict(zip(MESH_AXES, (1, 4, 2, 1, 1), strict=True))


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=1), MeshConfig(data=16)])
def test_a_mesh_of_another_size_is_refused(config):
    sentence = refusal(make_mesh, config)
    assert "there are 8: change a mesh size, or set one to -1 to take the rest" in sentence
    assert f"data={config.data} * " in sentence


def test_the_table_names_axes_of_the_mesh():
    assert {name for axes in RULES.values() for name in axes} <= set(MESH_AXES)
    assert axis_size(mesh_of(data=2, expert=2), "batch") == 4


def test_specs_come_from_the_table():
    assert spec(("batch", "sequence", None)) == PartitionSpec(("data", "fsdp", "expert"), "context", None)
    assert spec(("layers", "experts", "expert_d_model", "d_ff")) == PartitionSpec(None, "expert", "fsdp", "tensor")
    with pytest.raises(ValueError, match="unknown logical axis 'hidden': the table has batch, "):
        spec(("hidden",))
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        spec(("heads", "d_ff"))


@pytest.mark.parametrize(
    ("changes", "sizes", "sentence"),
    [
        ({"train": {"batch_size": 6}}, {"data": 2, "expert": 2},
         "train.batch_size / train.microbatches is 6, which does not divide over the 4 devices of mesh.data * "
         "mesh.fsdp * mesh.expert: make it a multiple of 4 or change the mesh"),
        ({"train": {"microbatches": 4}}, {"fsdp": 4},
         "train.batch_size / train.microbatches is 2, which does not divide over the 4 devices of mesh.data * "
         "mesh.fsdp * mesh.expert: make it a multiple of 4 or change the mesh"),
        ({"data": {"seq_len": 31}}, {"context": 2},
         "data.seq_len is 31, which does not divide into two chunks for each of the 2 devices of mesh.context: "
         "make it a multiple of 4 or change the mesh"),
        ({"model": {"num_experts": 3}}, {"expert": 2},
         "model.num_experts is 3, which does not divide over the 2 devices of mesh.expert: "
         "make it a multiple of 2 or change the mesh"),
        ({}, {"tensor": 4},
         "model.num_kv_heads is 2, which does not divide over the 4 devices of mesh.tensor: "
         "make it a multiple of 4 or change the mesh"),
    ],
)  # fmt: skip
def test_shapes_that_the_mesh_does_not_divide_are_refused(changes, sizes, sentence):
    assert refusal(tiny_trainable, tiny_config(**changes), mesh_of(**sizes)) == sentence


@pytest.mark.parametrize(
    ("platform", "products", "compute", "head_dim", "backend"),
    [
        ("cpu", "xla", "float32", 64, "blockwise"),
        ("cpu", "mkl", "float32", 64, "blockwise"),
        ("cpu", "amx", "float32", 256, "amx"),
        ("cpu", "amx", "float32", 258, "blockwise"),
        ("gpu", "xla", "bfloat16", 64, "cudnn"),
        ("gpu", "xla", "float32", 64, "blockwise"),  # cuDNN's attention has no float32
        ("tpu", "xla", "bfloat16", 64, "splash"),
    ],
)
def test_auto_chooses_by_platform_type_and_products(platform, products, compute, head_dim, backend):
    precision = make_precision(PrecisionConfig(compute=compute))
    assert choose_attention("auto", platform, products, precision, head_dim) == backend


@pytest.mark.parametrize(
    ("backend", "platform", "products", "sentence"),
    [
        ("amx", "cpu", "mkl",
         "kernels.attention=amx needs kernels.products=amx: set both, or use auto or blockwise"),
        ("amx", "cpu", "amx",
         "kernels.attention=amx takes a model.head_dim of up to 256, not 300: use auto or blockwise"),
        ("cudnn", "cpu", "xla", "kernels.attention=cudnn does not run on cpu: use auto or blockwise"),
        ("splash", "gpu", "xla", "kernels.attention=splash does not run on gpu: use auto or blockwise"),
        ("cudnn", "gpu", "xla",
         "kernels.attention=cudnn does not compute in float32: set precision.compute=bfloat16, or use auto"),
    ],
)  # fmt: skip
def test_a_kernel_that_cannot_run_is_refused(backend, platform, products, sentence):
    assert refusal(choose_attention, backend, platform, products, make_precision(PrecisionConfig()), 300) == sentence


def test_a_forced_kernel_is_checked_before_anything_runs():
    assert "kernels.attention=cudnn" in refusal(make_runtime, tiny_config(kernels={"attention": "cudnn"}), mesh_of())


@pytest.mark.parametrize(
    ("platform", "products", "experts", "backend"),
    [
        ("cpu", "xla", "compute", "blocked"),
        ("cpu", "mkl", "compute", "mkl"),
        ("cpu", "amx", "compute", "amx"),
        ("gpu", "xla", "compute", "triton"),
        ("tpu", "xla", "compute", "megablox"),
        ("cpu", "mkl", "int8", "blocked"),
        ("gpu", "xla", "fp8", "ragged_dot"),
        ("tpu", "xla", "int8", "megablox"),
    ],
)
def test_auto_chooses_the_experts_products(platform, products, experts, backend):
    assert choose_experts("auto", platform, products, make_precision(PrecisionConfig(experts=experts))) == backend


@pytest.mark.parametrize(("backend", "platform"), [("megablox", "gpu"), ("triton", "tpu")])
def test_a_grouped_kernel_of_another_platform_is_refused(backend, platform):
    sentence = f"kernels.experts={backend} does not run on {platform}: use auto, ragged_dot or blocked"
    assert refusal(choose_experts, backend, platform, "xla", make_precision(PrecisionConfig())) == sentence


@pytest.mark.parametrize(
    ("backend", "products", "experts", "sentence"),
    [
        ("mkl", "xla", "compute", "kernels.experts=mkl needs kernels.products=mkl: set both, or use auto"),
        ("amx", "mkl", "compute", "kernels.experts=amx needs kernels.products=amx: set both, or use auto"),
        ("mkl", "mkl", "int8", "kernels.experts=mkl has no products of 8 bits: use auto, or precision.experts=compute"),
    ],
)
def test_experts_by_host_products_are_refused_where_these_do_not_multiply(backend, products, experts, sentence):
    precision = make_precision(PrecisionConfig(experts=experts))
    assert refusal(choose_experts, backend, "cpu", products, precision) == sentence


def test_the_fastest_products_that_are_there_multiply_on_one_cpu_device_in_float32(monkeypatch):
    fastest = next((engine for engine in ENGINES if available(engine)), "xla")
    assert make_runtime(tiny_config(), mesh_of()).products == fastest
    assert make_runtime(tiny_config(kernels={"products": "xla"}), mesh_of()).products == "xla"
    assert make_runtime(tiny_config(), mesh_of(fsdp=2)).products == "xla"
    assert make_runtime(tiny_config(precision={"compute": "bfloat16"}), mesh_of()).products == "xla"
    for there, chosen in (({"amx", "mkl"}, "amx"), ({"mkl"}, "mkl"), (set(), "xla")):
        monkeypatch.setattr(runtime, "available", there.__contains__)
        assert make_runtime(tiny_config(), mesh_of()).products == chosen


@pytest.mark.parametrize(("engine", "remedy"), [("mkl", "pip install mkl"), ("amx", "a processor with AMX")])
def test_products_that_cannot_be_had_are_refused(monkeypatch, engine, remedy):
    forced = tiny_config(kernels={"products": engine})
    assert "one CPU device" in refusal(make_runtime, forced, mesh_of(fsdp=2))
    monkeypatch.setattr(runtime, "available", lambda _: False)
    assert remedy in refusal(make_runtime, forced, mesh_of())


@pytest.mark.parametrize(("platform", "exchange"), [("cpu", "gather"), ("gpu", "ragged"), ("tpu", "ragged")])
def test_auto_chooses_the_exchange_by_platform(platform, exchange):
    assert choose_exchange("auto", platform) == exchange


def test_an_exchange_that_the_platform_lacks_is_refused():
    sentence = "kernels.exchange=ragged does not run on cpu: use auto, padded or gather"
    assert refusal(make_runtime, tiny_config(kernels={"exchange": "ragged"}), mesh_of(expert=2)) == sentence


def test_the_choice_is_told_in_a_line():
    runtime = make_runtime(tiny_config("precision.compute=bfloat16"), mesh_of(fsdp=2, expert=2))
    assert runtime.describe() == (
        f"4 x {jax.devices()[0].device_kind} (fsdp 2 x expert 2); attention: blockwise, experts: blocked, "
        "exchange: gather, compute: bfloat16, remat: none"
    )
