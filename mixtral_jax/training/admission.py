"""Admission of kernels: before a run starts on an accelerator, what was chosen must compute what the formulas say.

Compilers and kernels change with every release, and a wrong one trains a wrong model without a word.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mixtral_jax.config import Config, MeshConfig, UserError
from mixtral_jax.kernels.attention import attention
from mixtral_jax.kernels.blocked import choose_block_sizes
from mixtral_jax.kernels.expert_ffn import expert_ffn
from mixtral_jax.precision import EXACT_PRODUCT, FULL
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import axis_size, make_mesh

# Largest ||kernel - reference|| / ||reference|| of an output or gradient. Rounding to bfloat16 gives some 0.005, to
# TF32 0.0005, all factors of the experts' products to 8 bits up to 0.08; a wrong mask, row or expert gives more.
LIMITS = {1: 0.15, 2: 0.02, 4: 0.002}  # by bytes of the type of products
MOST_EXPERTS = 4  # of a device; the float32 reference of more would crowd out the model


def admit_kernels(config: Config, runtime: Runtime) -> str:
    """Compares attention and expert products with float32 references, at the shapes of one device.

    Args:
        config: gives the shapes.
        runtime: gives mesh and kernels.

    Returns:
        What was compared and the largest difference found, for people.

    Raises:
        UserError: a kernel differs by more than rounding; names it and the figures.
    """
    differences = {
        f"attention: {runtime.attention}": _attention_differences(config, runtime),
        f"experts: {runtime.experts}": _expert_differences(config, runtime),
    }
    precision = runtime.precision
    for kernel, found in differences.items():
        products = precision.experts or precision.compute if kernel.startswith("experts") else precision.compute
        limit = LIMITS[jnp.dtype(products).itemsize]
        worst = max(found, key=lambda name: found[name] if math.isfinite(found[name]) else math.inf)
        if not found[worst] <= limit:  # so written, it is also true of nan
            figures = ", ".join(f"{name} {value:.2g}" for name, value in found.items())
            key, name = kernel.split(": ")
            raise UserError(
                f"kernels.{key}={name} does not compute what it should on this device: relative differences from "
                f"float32 are {figures}, at most {limit} is allowed; choose another kernels.{key} or version of JAX"
            )
    largest = max(value for found in differences.values() for value in found.values())
    return f"kernels checked against float32, forward and gradients: relative differences up to {largest:.1g}"


def _attention_differences(config: Config, runtime: Runtime) -> dict[str, float]:
    model, mesh = config.model, runtime.mesh
    seq_len = config.data.seq_len
    heads, kv_heads = (n // axis_size(mesh, "heads") for n in (model.num_heads, model.num_kv_heads))
    # Documents of several lengths, and padding at the end.
    ends = [0, seq_len // 7, seq_len // 2, seq_len - seq_len // 16]
    ids = np.zeros((1, seq_len), np.int32)
    for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
        ids[:, start:end] = number
    shapes = [(1, seq_len, n, model.head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    real = jnp.asarray(ids[..., None, None] > 0)

    one_device = make_mesh(MeshConfig(), jax.local_devices()[:1])

    def run(backend: Any, q: Array, k: Array, v: Array) -> Array:
        out = attention(q, k, v, jnp.asarray(ids), mesh=one_device, backend=backend)
        return jnp.where(real, out, 0)  # what padding sees is nobody's business

    kernel, reference = partial(run, runtime.attention), partial(run, "blockwise")
    return _differences(kernel, reference, shapes, ("output", "d_q", "d_k", "d_v"), runtime)


def _expert_differences(config: Config, runtime: Runtime) -> dict[str, float]:
    model, mesh = config.model, runtime.mesh
    experts = min(MOST_EXPERTS, model.num_experts // axis_size(mesh, "experts"))
    d_ff = model.d_ff // axis_size(mesh, "d_ff")
    batch = config.train.batch_size // config.train.microbatches // axis_size(mesh, "batch")
    tokens = batch * config.data.seq_len // axis_size(mesh, "sequence")
    rows = tokens * model.num_experts_per_tok
    # A part of the buffer is empty, one expert has no rows and one has most, if there are so many.
    sizes = np.zeros(experts, np.int32)
    sizes[-1] = rows - rows // 8
    sizes[0] -= sizes.sum() - (rows - rows // 16)
    used = jnp.arange(rows)[:, None] < int(sizes.sum())
    w_in, w_out = (experts, model.d_model, d_ff), (experts, d_ff, model.d_model)
    shapes = [(rows, model.d_model), w_in, w_in, w_out, (rows, model.d_model)]

    def run(backend: Any, eight_bit: Any, *arrays: Array) -> Array:
        blocks = runtime.block_sizes or choose_block_sizes(rows, experts)
        interpret = runtime.platform == "cpu"
        settings = {"backend": backend, "block_sizes": blocks, "interpret": interpret, "eight_bit": eight_bit}
        out = expert_ffn(arrays[0], jnp.asarray(sizes), *arrays[1:], **settings)
        return jnp.where(used, out, 0)

    kernel, reference = partial(run, runtime.experts, runtime.precision.experts), partial(run, "blocked", None)
    return _differences(kernel, reference, shapes, ("output", "d_rows", "d_w_gate", "d_w_up", "d_w_down"), runtime)


def _differences(
    kernel: Callable[..., Array],
    reference: Callable[..., Array],
    shapes: Sequence[tuple[int, ...]],
    names: tuple[str, ...],
    runtime: Runtime,
) -> dict[str, float]:
    """Relative differences of the output and of each gradient; the last shape is that of the output."""
    compute = runtime.precision.compute

    def value_and_pull(function: Callable[..., Array], arrays: list[Array]) -> tuple[Array, ...]:
        out, pull = jax.vjp(function, *arrays[:-1])
        return out, *pull(arrays[-1].astype(out.dtype))

    @jax.jit
    def compare(arrays: list[Array]) -> list[Array]:
        arrays = [array.astype(compute) for array in arrays]
        found = value_and_pull(kernel, arrays)
        with jax.default_matmul_precision(EXACT_PRODUCT.name.lower()):
            expected = value_and_pull(reference, [array.astype(FULL) for array in arrays])
        return [
            jnp.linalg.norm((a.astype(FULL) - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30)
            for a, b in zip(found, expected, strict=True)
        ]

    keys = jax.random.split(jax.random.key(0), len(shapes))
    scales = [shape[1] ** -0.5 if len(shape) == 3 else 1.0 for shape in shapes]  # matrices of unit gain
    with jax.default_device(jax.local_devices()[0]):
        arrays = [
            scale * jax.random.normal(key, shape, FULL) for key, shape, scale in zip(keys, shapes, scales, strict=True)
        ]
        return {name: float(value) for name, value in zip(names, compare(arrays), strict=True)}
