"""Causal attention from 512 to 32,768 tokens, forward and with gradients, beside torch where it is installed.

    python -m benchmarks.attention [--lengths 512 2048 8192 32768] [--packed 1024] [--backends amx blockwise]

The number of tokens is the same at every length; with `--packed N` documents of N tokens share the rows, and attention
stays inside each of them. Torch's kernel takes no documents, so it has no rows there.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Report, interleaved, median_ratio
from mixtral_jax.config import MeshConfig, PrecisionConfig
from mixtral_jax.kernels.attention import attention
from mixtral_jax.kernels.backends import choose, names
from mixtral_jax.precision import make_precision
from mixtral_jax.runtime import target
from mixtral_jax.sharding import make_mesh

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=2048, help="of all rows together, at least one row")
    parser.add_argument("--packed", type=int, help="tokens of a document; default: a row is one document")
    parser.add_argument("--backends", nargs="+", choices=names("attention"), help="default: what auto chooses")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    report = Report(
        f"attention, {HEADS} heads on {KV_HEADS} of keys and values, head_dim {HEAD_DIM}, {options.dtype}",
        "GFLOP/s = 4 * tokens * (document / 2) * heads * head_dim forward (three times that with gradients) / median "
        "seconds; vs torch = torch's seconds / seconds",
    )
    for length in options.lengths:
        work = pieces(options, length)
        seconds = interleaved(work, options.rounds)
        rows = max(1, options.tokens // length)
        useful = 4 * rows * length * (min(options.packed or length, length) / 2) * HEADS * HEAD_DIM
        for name, taken in seconds.items():
            kind, what = name.split(", ")
            peer = seconds.get(f"torch, {what}")
            report.add(
                length=length, rows=rows, kernel=kind, work=what,
                milliseconds=1e3 * statistics.median(taken),
                gflops_a_second=useful * (3 if what == "gradients" else 1) / statistics.median(taken) / 1e9,
                vs_torch=median_ratio(peer, taken) if peer else None,
            )  # fmt: skip
    report.show()


def pieces(options: argparse.Namespace, length: int) -> dict[str, Callable[[], Any]]:
    """Compiled forward passes and gradients by name."""
    rows = max(1, options.tokens // length)
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        rng.standard_normal((rows, length, heads, HEAD_DIM)).astype(np.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    document = np.arange(length) // (options.packed or length) + 1
    segment_ids = jnp.asarray(np.tile(document, (rows, 1)), jnp.int32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    precision = make_precision(PrecisionConfig(compute=options.dtype))
    platform = mesh.devices.flat[0].platform
    matmul = choose("matmul", "auto", target(platform, mesh.size, precision))
    auto = choose("attention", "auto", target(platform, mesh.size, precision, HEAD_DIM, matmul))
    work: dict[str, Callable[[], Any]] = {}
    for backend in options.backends or [auto]:
        arrays = [jnp.asarray(x, options.dtype) for x in (q, k, v, d_out)]

        def run(q, k, v, backend=backend):
            return attention(q, k, v, segment_ids, mesh=mesh, backend=backend)

        forward, gradients = jax.jit(run), jax.jit(lambda q, k, v, d, run=run: jax.vjp(run, q, k, v)[1](d))
        work[f"{backend}, forward"] = lambda f=forward, a=arrays: f(*a[:3])
        work[f"{backend}, gradients"] = lambda g=gradients, a=arrays: g(*a)
    if importlib.util.find_spec("torch") and not options.packed:
        work |= torch_pieces(options.dtype, q, k, v, d_out)
    return work


def torch_pieces(dtype: str, *arrays: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same in torch, on its own layout [rows, heads, length, head_dim]."""
    import torch

    q, k, v, d_out = (torch.tensor(x.swapaxes(1, 2), dtype=getattr(torch, dtype)).contiguous() for x in arrays)

    def forward():
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).shape

    def gradients():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True).backward(d_out)

    return {"torch, forward": forward, "torch, gradients": gradients}


if __name__ == "__main__":
    main()
