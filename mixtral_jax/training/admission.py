"""Admission of kernels: before a run starts on an accelerator, what was chosen must compute what the formulas say.

Compilers and kernels change with every release, and a wrong one trains a wrong model without a word. What was found is
kept beside the compiled programs, for as long as device, versions, kernels and shapes stay the same.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mixtral_jax import kernels
from mixtral_jax.config import Config, MeshConfig, UserError
from mixtral_jax.data.cache_files import write_file
from mixtral_jax.kernels.attention import attention
from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertWeights, expert_ffn
from mixtral_jax.kernels.grouped_blocks import choose_block_sizes
from mixtral_jax.kernels.permutation import RowMover, combine_rows, dispatch_rows
from mixtral_jax.precision import EXACT_PRODUCT, FULL
from mixtral_jax.runtime import CompilerOptions, Runtime
from mixtral_jax.sharding import axis_size, make_mesh
from mixtral_jax.whole_files import sealed, unsealed

# Largest ||kernel - reference|| / ||reference|| of an output or gradient. Rounding to bfloat16 gives some 0.005, to
# TF32 0.0005, all factors of the experts' products to 8 bits up to 0.08; a wrong mask, row or expert gives more.
LIMITS = {1: 0.15, 2: 0.02, 4: 0.002}  # by bytes of the type of products
MOST_EXPERTS = 4  # of a device; the float32 reference of more would crowd out the model
MOST_TOKENS, MOST_ROWS = 2048, 4096  # of attention and of the experts: widths are real, the rest need not be
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt", "libtpu",
            "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "qwix")  # fmt: skip

# The reference in XLA's first choice of products, and those of the library: to time all of them, or to compile products
# in full float32 of its own, takes longer than to multiply.
QUICKLY: CompilerOptions = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

Differences = dict[str, dict[str, float]]
Told = Callable[[str, float], None]  # what was done, and the seconds that it took


def admit_kernels(config: Config, runtime: Runtime, told: Told = lambda *_: None) -> str:
    """Compares attention and what becomes of tokens at the experts with float32 references, at widths of one device.

    Args:
        config: gives the shapes.
        runtime: gives mesh and kernels.
        told: hears of every program that is traced, compiled or run, from any thread.

    Returns:
        What was compared and the largest difference found, for people.

    Raises:
        UserError: a kernel differs by more than rounding; names it and the figures.
    """
    cases = _attention_case(config, runtime), _experts_case(config, runtime)
    kept, facts = _kept_in(), _facts(runtime, [case[-1] for case in cases])
    differences = _read(kept, facts)
    known = differences is not None
    if differences is None:
        names = f"attention: {runtime.attention}", f"experts: {runtime.experts}"
        with ThreadPoolExecutor() as pool:  # XLA compiles several programs at a time
            asked = [
                _differences(*case, runtime, pool, partial(_tell, told, name))
                for name, case in zip(names, cases, strict=True)
            ]
            differences = {name: answer() for name, answer in zip(names, asked, strict=True)}
    _check(differences, runtime)
    if kept and facts and not known:
        write_file(_file(kept, facts), sealed(json.dumps(differences).encode()))
    largest = max(value for found in differences.values() for value in found.values())
    when = "found before" if known else "forward and gradients"
    return f"kernels checked against float32, {when}: relative differences up to {largest:.1g}"


@contextlib.contextmanager
def _tell(told: Told, kernel: str, what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    told(f"{kernel}, {what}", time.perf_counter() - begin)


def _check(differences: Differences, runtime: Runtime) -> None:
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


def _kept_in() -> Path | None:
    """The directory of compiled programs, where there is one; see `compiled.keep_compiled`."""
    settings: Any = jax.config
    directory = settings.jax_compilation_cache_dir if settings.jax_enable_compilation_cache else None
    return Path(directory) if directory and "://" not in directory else None


def _facts(runtime: Runtime, shapes: list[Any]) -> dict[str, Any] | None:
    """All that a verdict depends on; None where the driver does not say its version."""
    device = jax.local_devices()[0]
    driver = _nvidia_driver() if device.platform == "gpu" else device.client.platform_version
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    digest = hashlib.sha256()
    for path in sorted(Path(next(iter(kernels.__path__))).rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    backends = runtime.attention, runtime.experts, runtime.rows, runtime.block_sizes
    facts = {
        "device": device.device_kind, "driver": driver, "versions": versions, "kernels": digest.hexdigest(),
        "backends": backends, "precision": str(runtime.precision), "shapes": shapes,
    }  # fmt: skip
    return json.loads(json.dumps(facts)) if driver else None


def _nvidia_driver() -> str:
    """The driver's version by NVIDIA's management library; empty where that is not there."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    text = ctypes.create_string_buffer(96)
    library.nvmlInit_v2()
    failed = library.nvmlSystemGetDriverVersion(text, len(text))
    library.nvmlShutdown()
    return "" if failed else text.value.decode()


def _file(directory: Path, facts: dict[str, Any]) -> Path:
    return directory / f"admitted-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]}"


def _read(directory: Path | None, facts: dict[str, Any] | None) -> Differences | None:
    """What was found for the same facts; None where there is nothing, or a file is not as it was written."""
    if directory is None or facts is None:
        return None
    try:
        found = unsealed(_file(directory, facts).read_bytes())
    except OSError:
        return None
    return None if found is None else json.loads(found)


Case = tuple[Callable[..., Array], Callable[..., Array], tuple[str, ...], Sequence[tuple[int, ...]]]


def _attention_case(config: Config, runtime: Runtime) -> Case:
    model, mesh = config.model, runtime.mesh
    seq_len = min(config.data.seq_len, MOST_TOKENS)
    heads, kv_heads = (n // axis_size(mesh, "heads") for n in (model.num_heads, model.num_kv_heads))
    # Documents of several lengths, and padding at the end.
    ends = [0, seq_len // 7, seq_len // 2, seq_len - seq_len // 16]
    ids = np.zeros((1, seq_len), np.int32)
    for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
        ids[:, start:end] = number
    shapes = [(1, seq_len, n, model.head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    real = ids[..., None, None] > 0
    one_device = make_mesh(MeshConfig(), jax.local_devices()[:1])

    def kernel(q: Array, k: Array, v: Array) -> Array:
        out = attention(q, k, v, jnp.asarray(ids), mesh=one_device, backend=runtime.attention)
        return jnp.where(real, out, 0)  # what padding sees is nobody's business

    def reference(q: Array, k: Array, v: Array) -> Array:
        place = jnp.arange(seq_len)
        seen = (place[:, None] >= place) & (ids[0][:, None] == ids[0])
        q = q.reshape(1, seq_len, kv_heads, heads // kv_heads, model.head_dim) * model.head_dim**-0.5
        scores = jnp.where(seen, jnp.einsum("bqkgh,btkh->bkgqt", q, k), -jnp.inf)
        out = jnp.einsum("bkgqt,btkh->bqkgh", jax.nn.softmax(scores, axis=-1), v)
        return jnp.where(real, out.reshape(1, seq_len, heads, model.head_dim), 0)

    return kernel, reference, ("output", "d_q", "d_k", "d_v"), shapes


def _experts_case(config: Config, runtime: Runtime) -> Case:
    model, mesh = config.model, runtime.mesh
    experts = min(MOST_EXPERTS, model.num_experts // axis_size(mesh, "experts"))
    d_ff = model.d_ff // axis_size(mesh, "d_ff")
    batch = config.train.batch_size // config.train.microbatches // axis_size(mesh, "batch")
    tokens = batch * config.data.seq_len // axis_size(mesh, "sequence")
    rows = min(tokens * model.num_experts_per_tok, MOST_ROWS)
    # A part of the buffer is empty, one expert has no rows and one has most, if there are so many; two choices a token,
    # of which those without a row are dropped.
    sizes = np.zeros(experts, np.int32)
    sizes[-1] = rows - rows // 8
    sizes[0] -= sizes.sum() - (rows - rows // 16)
    ends = np.cumsum(sizes).tolist()
    used, tokens = ends[-1], -(-rows // 2)
    place = np.random.default_rng(0).permutation(2 * tokens)
    row_of = np.where(place < used, place, rows).astype(np.int32).reshape(tokens, 2)
    source = np.full(rows, 2 * tokens, np.int32)
    source[:used] = np.argsort(place)[:used]
    w_in, w_out = (experts, model.d_model, d_ff), (experts, d_ff, model.d_model)
    x_shape = tokens, model.d_model
    shapes = [x_shape, (tokens, 2), w_in, w_in, w_out, x_shape]

    def kernel(x: Array, shares: Array, w_gate: Array, w_up: Array, w_down: Array) -> Array:
        blocks = runtime.block_sizes or choose_block_sizes(rows, experts)
        options = ExpertOptions(runtime.experts, blocks, runtime.interpret, runtime.precision.experts)
        maps = jnp.asarray(source), jnp.asarray(row_of), RowMover(runtime.rows, runtime.interpret)
        weights = ExpertWeights(w_gate, w_up, w_down)
        out = expert_ffn(dispatch_rows(x, *maps), jnp.asarray(sizes), weights, options)
        return combine_rows(out, shares, *maps)

    def reference(x: Array, shares: Array, w_gate: Array, w_up: Array, w_down: Array) -> Array:
        parts, sorted_x = [], x[source[:used] // 2]
        for expert, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            mine = sorted_x[start:end]
            parts.append((jax.nn.silu(mine @ w_gate[expert]) * (mine @ w_up[expert])) @ w_down[expert])
        out = jnp.concatenate([*parts, jnp.zeros_like(x[:1])])[np.minimum(row_of, used)]
        return jnp.einsum("tk,tkd->td", shares, out)

    return kernel, reference, ("output", "d_tokens", "d_shares", "d_w_gate", "d_w_up", "d_w_down"), shapes


def _differences(
    kernel: Callable[..., Array],
    reference: Callable[..., Array],
    names: tuple[str, ...],
    shapes: Sequence[tuple[int, ...]],
    runtime: Runtime,
    pool: ThreadPoolExecutor,
    timed: Callable[[str], contextlib.AbstractContextManager[None]],
) -> Callable[[], dict[str, float]]:
    """Compiles in the pool what then says relative differences of the output and of each gradient.

    The last shape is that of the output.
    """
    compute = runtime.precision.compute

    def value_and_pull(function: Callable[..., Array], arrays: list[Array]) -> tuple[Array, ...]:
        out, pull = jax.vjp(function, *arrays[:-1])
        return out, *pull(arrays[-1].astype(out.dtype))

    def make(key: Array) -> list[Array]:
        scales = [shape[1] ** -0.5 if len(shape) == 3 else 1.0 for shape in shapes]  # matrices of unit gain
        keys = jax.random.split(key, len(shapes))
        arrays = [
            scale * jax.random.normal(key, shape, FULL) for key, shape, scale in zip(keys, shapes, scales, strict=True)
        ]
        return [array.astype(compute) for array in arrays]

    def compare(found: tuple[Array, ...], arrays: list[Array]) -> list[Array]:
        with jax.default_matmul_precision(EXACT_PRODUCT.name.lower()):
            expected = value_and_pull(reference, [array.astype(FULL) for array in arrays])
        return [
            jnp.linalg.norm((a.astype(FULL) - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30)
            for a, b in zip(found, expected, strict=True)
        ]

    def compiled(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        with jax.default_device(jax.local_devices()[0]), timed(f"{what} traced"):
            traced = jax.jit(function, **options).lower(*arguments)

        def program() -> Any:
            with timed(f"{what} compiled"):
                return traced.compile()

        return pool.submit(program)

    quickly = QUICKLY if runtime.platform == "gpu" else None
    key, compute_kernel = jax.random.key(0), partial(value_and_pull, kernel)
    arrays = jax.eval_shape(make, key)
    making, computing = compiled("inputs", make, key), compiled("kernel", compute_kernel, arrays)
    found = arrays[-1], *arrays[:-1]  # the output, and a gradient of each input
    comparing = compiled("reference", compare, found, arrays, compiler_options=quickly)

    def answer() -> dict[str, float]:
        programs = [future.result() for future in (making, computing, comparing)]
        with timed("all run"):
            arrays = programs[0](key)
            differences = programs[2](programs[1](arrays), arrays)
            return {name: float(value) for name, value in zip(names, differences, strict=True)}

    return answer
