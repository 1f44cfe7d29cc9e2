"""Kernels are admitted when they compute what the references do, and refused with the figures when they do not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.kernels.gpu import triton_rows
from mixtral_jax.runtime import make_runtime
from mixtral_jax.training import admission
from tests.tiny import mesh_of, tiny_config

SHAPES = {"d_model": 128, "num_heads": 1, "num_kv_heads": 1, "head_dim": 128}


@pytest.fixture(autouse=True)
def nothing_found_before(monkeypatch):
    monkeypatch.setattr(admission, "_kept_in", lambda: None)


def admit(*overrides, attention="blockwise", experts="grouped_blocks", **mesh):
    kernels = [f"kernels.attention={attention}", f"kernels.experts={experts}"]
    config = tiny_config("data.seq_len=128", *kernels, *overrides, model=SHAPES)
    return admission.admit_kernels(config, make_runtime(config, mesh_of(**mesh)))


@pytest.mark.parametrize(("compute", "mesh"), [("float32", {}), ("bfloat16", {"expert": 2, "fsdp": 2})], ids=str)
def test_kernels_for_tpu_are_admitted(compute, mesh):
    said = admit(f"precision.compute={compute}", attention="splash", experts="megablox", **mesh)
    assert float(said.split()[-1]) < (0.02 if compute == "bfloat16" else 1e-4)


@pytest.mark.parametrize("experts", ["int8", "fp8"])
def test_products_of_8_bits_are_held_to_what_their_rounding_gives(monkeypatch, experts):
    eight_bit = ("precision.compute=bfloat16", f"precision.experts={experts}")
    assert 0.005 < float(admit(*eight_bit, experts="megablox").split()[-1]) < 0.1
    halved = wrong(admission.expert_ffn, gradient_of_weights_halved, "megablox")
    monkeypatch.setattr(admission, "expert_ffn", halved)
    with pytest.raises(UserError, match="megablox does not compute what it should"):
        admit(*eight_bit, experts="megablox")


def test_the_grouped_kernel_for_gpus_is_admitted():
    assert float(admit("precision.compute=bfloat16", experts="triton").split()[-1]) < 0.02


def test_kernels_that_move_rows_are_admitted_and_wrong_ones_are_not(monkeypatch):
    config = tiny_config("precision.compute=bfloat16", "kernels.experts=grouped_blocks", model=SHAPES)
    runtime = dataclasses.replace(make_runtime(config, mesh_of()), rows="triton")
    told = {}
    assert float(admission.admit_kernels(config, runtime, told.__setitem__).split()[-1]) < 0.02
    stages = [*(f"{part} {what}" for part in ("inputs", "kernel", "reference") for what in ("traced", "compiled"))]
    kernels = "attention: blockwise", "experts: grouped_blocks"
    assert set(told) == {f"{kernel}, {stage}" for kernel in kernels for stage in (*stages, "all run")}
    assert min(told.values()) > 0

    real = triton_rows.combine_gradients

    def swapped(*arrays):
        d_rows, d_weights = real(*arrays)
        return d_rows, d_weights[:, ::-1]

    monkeypatch.setattr(triton_rows, "combine_gradients", swapped)
    with pytest.raises(UserError, match=r"experts=grouped_blocks does not .*d_shares 0\.\d"):
        admission.admit_kernels(config, runtime)


def wrong(real, fix, backend):
    """A kernel that goes wrong under one backend."""

    def kernel(*arrays, **settings):
        used = settings["backend"] if settings else arrays[-1].backend
        return fix(real, *arrays, **settings) if used == backend else real(*arrays, **settings)

    return kernel


def across_documents(real, q, k, v, ids, **settings):
    return real(q, k, v, jnp.ones_like(ids), **settings)


def one_expert_for_all(real, rows, sizes, weights, options):
    return real(rows, jnp.zeros_like(sizes).at[0].set(jnp.sum(sizes)), weights, options)


def gradient_of_weights_halved(real, rows, sizes, weights, options):
    halved = jax.tree.map(lambda w: w / 2 + jax.lax.stop_gradient(w / 2), weights)
    return real(rows, sizes, halved, options)


def not_finite(real, *arrays):
    return real(*arrays).at[0, 0].set(jnp.nan)


@pytest.mark.parametrize(
    ("name", "backend", "fix", "figure"),
    [
        ("attention", "splash", across_documents, "output"),
        ("expert_ffn", "megablox", one_expert_for_all, "output"),
        ("expert_ffn", "megablox", gradient_of_weights_halved, "d_w_up 0.5"),
        ("expert_ffn", "megablox", not_finite, "output nan"),
    ],
)
def test_a_wrong_kernel_stops_the_run_with_its_figures(monkeypatch, name, backend, fix, figure):
    monkeypatch.setattr(admission, name, wrong(getattr(admission, name), fix, backend))
    with pytest.raises(UserError, match=f"{backend} does not compute what it should.*{figure}"):
        admit("precision.compute=bfloat16", **{"attention" if name == "attention" else "experts": backend})


def test_what_was_found_is_kept_for_the_same_device_kernels_and_shapes(monkeypatch, tmp_path):
    monkeypatch.setattr(admission, "_kept_in", lambda: tmp_path)
    bfloat16 = "precision.compute=bfloat16"
    said = admit(bfloat16)
    kept = next(tmp_path.iterdir())
    monkeypatch.setattr(admission, "_differences", None)  # nothing is computed
    assert admit(bfloat16).split()[-1] == said.split()[-1]
    with pytest.raises(TypeError):
        admit("precision.compute=float32")
    with pytest.raises(TypeError):
        admit(bfloat16, "train.batch_size=4")

    good = kept.read_bytes()
    for damaged in (good[:-9], good.replace(b"0.00", b"0.01", 1), b"[]", b""):
        assert damaged != good
        kept.write_bytes(damaged)
        with pytest.raises(TypeError):
            admit(bfloat16)
    kept.write_bytes(good)
    monkeypatch.setattr(admission, "PACKAGES", ("numpy",))
    with pytest.raises(TypeError):
        admit(bfloat16)


def test_a_wrong_kernel_is_not_kept_as_good(monkeypatch, tmp_path):
    monkeypatch.setattr(admission, "_kept_in", lambda: tmp_path)
    monkeypatch.setattr(admission, "expert_ffn", wrong(admission.expert_ffn, not_finite, "grouped_blocks"))
    with pytest.raises(UserError):
        admit("precision.compute=bfloat16")
    assert not list(tmp_path.iterdir())
