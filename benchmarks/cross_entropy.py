"""Cross-entropy over a vocabulary, with both gradients: in chunks, from whole logits, and in torch.

python -m benchmarks.cross_entropy [--tokens 2048] [--d-model 512] [--vocab 32000] [--chunks 256 512 2048]
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Report, interleaved
from mixtral_jax.config import MeshConfig, PrecisionConfig
from mixtral_jax.kernels.backends import choose
from mixtral_jax.kernels.cross_entropy import cross_entropy_sums
from mixtral_jax.precision import make_precision
from mixtral_jax.runtime import target
from mixtral_jax.sharding import make_mesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 2048])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, options.tokens, options.d_model)).astype(np.float32)
    head = (rng.standard_normal((options.d_model, options.vocab)) * 0.02).astype(np.float32)
    targets = rng.integers(options.vocab, size=(1, options.tokens)).astype(np.int32)
    arrays = jnp.asarray(x, options.dtype), jnp.asarray(head, options.dtype)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    mask = jnp.ones(targets.shape, bool)
    precision = make_precision(PrecisionConfig(params=options.dtype, compute=options.dtype))
    backend = choose("matmul", "auto", target(mesh.devices.flat[0].platform, mesh.size, precision))

    def chunked(chunk):
        settings: dict[str, Any] = {"mesh": mesh, "backend": backend, "chunk": chunk}
        return lambda x, head: cross_entropy_sums(x, head, jnp.asarray(targets), mask, **settings).nats

    def whole(x, head):
        logits = jnp.einsum("bsd,dv->bsv", x, head, preferred_element_type=jnp.float32)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], axis=-1))

    losses = {**{f"chunks of {chunk}": chunked(chunk) for chunk in options.chunks}, "whole logits": whole}
    programs = {name: jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile() for name, loss in losses.items()}
    work: dict[str, Callable[[], Any]] = {
        name: lambda program=program: program(*arrays) for name, program in programs.items()
    }
    if importlib.util.find_spec("torch"):
        work["torch"] = torch_piece(options.dtype, x[0], head, targets[0])

    report = Report(
        f"cross-entropy and gradients, {options.tokens} tokens, d_model {options.d_model}, {options.vocab} pieces, "
        f"{options.dtype}",
        "GFLOP/s = 6 * tokens * d_model * pieces / median seconds; temporaries by the compiler, outputs left out",
    )
    useful = 6 * options.tokens * options.d_model * options.vocab
    for name, taken in interleaved(work, options.rounds).items():
        memory = programs[name].memory_analysis().temp_size_in_bytes / 2**20 if name in programs else None
        seconds = statistics.median(taken)
        report.add(way=name, milliseconds=1e3 * seconds, gflops_a_second=useful / seconds / 1e9, temporaries_MiB=memory)
    report.show()


def torch_piece(dtype: str, x: np.ndarray, head: np.ndarray, targets: np.ndarray) -> Callable[[], Any]:
    """The same with torch's product and cross_entropy."""
    import torch

    a = torch.tensor(x, dtype=getattr(torch, dtype))
    w = torch.tensor(head.T.copy(), dtype=getattr(torch, dtype))
    t = torch.tensor(targets, dtype=torch.long)

    def run():
        inputs = [z.detach().requires_grad_() for z in (a, w)]
        logits = torch.nn.functional.linear(*inputs)
        torch.nn.functional.cross_entropy(logits.float(), t, reduction="sum").backward()

    return run


if __name__ == "__main__":
    main()
