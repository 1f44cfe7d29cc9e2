"""What runs where: the mesh, the table of axes, the choice of kernels, and sentences for what cannot be."""

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from jax.sharding import PartitionSpec

from mixtral_jax.config import MeshConfig, UserError
from mixtral_jax.kernels import backends
from mixtral_jax.kernels.backends import BACKENDS, Target, choose, names
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import MESH_AXES, RULES, axis_size, make_mesh, spec
from tests.tiny import mesh_of, tiny_config, tiny_trainable

HOPPER = Target("gpu", full_compute=False, capability=9.0, d_model=512, d_ff=1792)


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
    ("operation", "chosen", "where"),
    [
        ("attention", "blockwise", Target("cpu", head_dim=64)),
        ("attention", "blockwise", Target("cpu", head_dim=64, matmul="mkl")),
        ("attention", "amx", Target("cpu", head_dim=256, matmul="amx")),
        ("attention", "blockwise", Target("cpu", head_dim=258, matmul="amx")),
        ("attention", "cudnn", Target("gpu", full_compute=False)),
        ("attention", "blockwise", Target("gpu")),  # cuDNN's attention has no float32
        ("attention", "splash", Target("tpu", full_compute=False)),
        ("experts", "grouped_blocks", Target("cpu")),
        ("experts", "mkl", Target("cpu", matmul="mkl")),
        ("experts", "amx", Target("cpu", matmul="amx")),
        ("experts", "triton", Target("gpu")),
        ("experts", "hopper", HOPPER),
        ("experts", "triton", replace(HOPPER, full_compute=True)),
        ("experts", "triton", replace(HOPPER, capability=10.0)),
        ("experts", "triton", replace(HOPPER, capability=8.0)),
        ("experts", "triton", replace(HOPPER, d_model=384)),
        ("experts", "triton", replace(HOPPER, d_ff=384)),
        ("experts", "triton", replace(HOPPER, expert_devices=2)),
        ("experts", "hopper", replace(HOPPER, eight_bit=True)),
        ("experts", "megablox", Target("tpu")),
        ("experts", "grouped_blocks", Target("cpu", matmul="mkl", eight_bit=True)),
        ("experts", "triton", Target("gpu", eight_bit=True)),
        ("experts", "megablox", Target("tpu", eight_bit=True)),
        ("exchange", "gather", Target("cpu")),
        ("exchange", "ragged", Target("gpu")),
        ("exchange", "ragged", Target("tpu")),
        ("matmul", "xla", Target("gpu")),
        ("matmul", "xla", Target("tpu")),
        ("rows", "triton", Target("gpu")),
        ("rows", "xla", Target("tpu")),
        ("rows", "xla", Target("cpu")),
        ("adamw", "xla", Target("gpu")),
        ("adamw", "xla", Target("cpu")),
        ("adamw", "fused", Target("cpu", matmul="mkl")),
        ("adamw", "xla", Target("cpu", matmul="mkl", full_moments=False)),
    ],
    ids=str,
)
def test_auto_takes_the_first_that_fits(operation, chosen, where):
    assert choose(operation, "auto", where) == chosen


@pytest.mark.parametrize("operation", BACKENDS)
def test_every_platform_has_every_operation(operation):
    for platform in ("cpu", "gpu", "tpu"):
        for flags in itertools.product([False, True], repeat=2):
            where = Target(platform, full_compute=flags[0], eight_bit=flags[1])
            assert choose(operation, choose(operation, "auto", where), where) in names(operation)


def test_the_table_names_modules_that_are_there():
    for backend in itertools.chain(*BACKENDS.values()):
        assert importlib.util.find_spec(f"mixtral_jax.kernels.{backend.module}"), backend


@pytest.mark.parametrize(
    ("operation", "name", "where", "sentence"),
    [
        ("attention", "amx", Target("cpu", matmul="mkl"),
         "needs kernels.matmul=amx: set both, or use auto or blockwise"),
        ("attention", "amx", Target("cpu", head_dim=300, matmul="amx"),
         "takes a model.head_dim of up to 256, not 300: use auto or blockwise"),
        ("attention", "cudnn", Target("cpu"), "does not run on cpu: use auto or blockwise"),
        ("attention", "splash", Target("gpu"), "does not run on gpu: use auto or blockwise"),
        ("attention", "cudnn", Target("gpu"),
         "does not compute in float32: set precision.compute=bfloat16, or use auto or blockwise"),
        ("experts", "megablox", Target("gpu"), "does not run on gpu: use auto or triton or ragged_dot"),
        ("experts", "hopper", replace(HOPPER, capability=8.0),
         "is for GPUs of compute capability 9.0, not 8.0: use auto or triton or ragged_dot"),
        ("experts", "hopper", replace(HOPPER, d_ff=1000), "takes model.d_model and a device's share of model.d_ff "
         "in steps of 256, not 512 and 1000: use auto or triton or ragged_dot"),
        ("experts", "triton", Target("tpu"), "does not run on tpu: use auto or megablox"),
        ("experts", "mkl", Target("cpu"), "needs kernels.matmul=mkl: set both, or use auto or grouped_blocks"),
        ("experts", "amx", Target("cpu", matmul="mkl"),
         "needs kernels.matmul=amx: set both, or use auto or mkl or grouped_blocks"),
        ("experts", "mkl", Target("cpu", matmul="mkl", eight_bit=True),
         "has no products of 8 bits: set precision.experts=compute, or use auto or grouped_blocks"),
        ("exchange", "ragged", Target("cpu"), "does not run on cpu: use auto or gather"),
        ("matmul", "mkl", Target("cpu", devices=2), "computes in float32 on one CPU device: use auto or xla"),
        ("matmul", "amx", Target("gpu"), "does not run on gpu: use auto or xla"),
    ],
    ids=str,
)  # fmt: skip
def test_a_backend_that_cannot_run_is_refused(operation, name, where, sentence):
    assert refusal(choose, operation, name, where) == f"kernels.{operation}={name} {sentence}"


def test_a_forced_kernel_is_checked_before_anything_runs():
    assert "kernels.attention=cudnn" in refusal(make_runtime, tiny_config(kernels={"attention": "cudnn"}), mesh_of())


def test_the_fastest_products_that_are_there_multiply_on_one_cpu_device_in_float32(monkeypatch):
    slow = {"mkl"} if backends.amd_with_avx512() else set()
    fastest = next((e for e in ("amx", "mkl") if backends.available(e) and e not in slow), "xla")
    assert make_runtime(tiny_config(), mesh_of()).matmul == fastest
    assert make_runtime(tiny_config(kernels={"matmul": "xla"}), mesh_of()).matmul == "xla"
    assert make_runtime(tiny_config(), mesh_of(fsdp=2)).matmul == "xla"
    assert make_runtime(tiny_config(precision={"compute": "bfloat16"}), mesh_of()).matmul == "xla"
    for there, amd, chosen in (({"amx", "mkl"}, False, "amx"), ({"mkl"}, False, "mkl"), (set(), False, "xla"),
                               ({"mkl"}, True, "xla")):  # fmt: skip
        monkeypatch.setattr(backends, "available", there.__contains__)
        monkeypatch.setattr(backends, "amd_with_avx512", lambda amd=amd: amd)
        assert make_runtime(tiny_config(), mesh_of()).matmul == chosen
    assert make_runtime(tiny_config(kernels={"matmul": "mkl"}), mesh_of()).matmul == "mkl"


@pytest.mark.parametrize(
    ("maker", "flags", "slow"),
    [("AuthenticAMD", "avx2 avx512f", True), ("AuthenticAMD", "avx2", False), ("GenuineIntel", "avx512f", False)],
)
def test_where_onemkl_is_slower_than_xla(tmp_path, maker, flags, slow):
    about = tmp_path / "cpuinfo"
    assert not backends.amd_with_avx512(about)
    backends.amd_with_avx512.cache_clear()
    about.write_text(f"vendor_id\t: {maker}\nflags\t\t: fpu {flags}\n")
    assert backends.amd_with_avx512(about) == slow


@pytest.mark.parametrize(("engine", "remedy"), [("mkl", "pip install mkl"), ("amx", "a processor with AMX")])
def test_products_that_cannot_be_had_are_refused(monkeypatch, engine, remedy):
    forced = tiny_config(kernels={"matmul": engine})
    assert "one CPU device" in refusal(make_runtime, forced, mesh_of(fsdp=2))
    monkeypatch.setattr(backends, "available", lambda _: False)
    assert remedy in refusal(make_runtime, forced, mesh_of())


def test_nothing_is_imported_that_does_not_run():
    """An accelerator's installation needs neither Numba nor oneMKL; pretraining has no use for a chat template."""
    script = """
import sys
sys.modules["numba"] = None
from mixtral_jax.data.pipeline import TrainingData
from mixtral_jax.training.step import Trainable
from tests.tiny import mesh_of, tiny_config, tiny_trainable, train
trainable = tiny_trainable(tiny_config("precision.compute=bfloat16"))
train(trainable, 1)
assert not [name for name in sys.modules if name.startswith(("mixtral_jax.kernels.cpu.", "mistral_common"))]
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_choice_is_told_in_a_line():
    runtime = make_runtime(tiny_config("precision.compute=bfloat16"), mesh_of(fsdp=2, expert=2))
    assert runtime.describe() == (
        f"4 x {jax.devices()[0].device_kind} (fsdp 2 x expert 2); attention: blockwise, experts: grouped_blocks, "
        "exchange: gather, compute: bfloat16, remat: none"
    )
