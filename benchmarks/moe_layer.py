"""One SwiGLU expert layer, forward and with both gradients, against a dense layer of the same active work.

    python -m benchmarks.moe_layer [--tokens 2048] [--d-model 512] [--layers 8x1792 32x448 128x112] [--dtype float32]
                                      [--experts compute int8 fp8]

The dense layer is the limit that a mixture could reach: the same products, in one piece, with nothing to route.
`products` are those of the experts alone, over rows that lie sorted. On an accelerator the defaults are Mixtral 8x7B's
layer in bfloat16, in the kernel that its platform gets: on CUDA the grouped one.
"""

import argparse
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Report, interleaved, median_ratio
from benchmarks.timing import normal
from mixtral_jax.config import PrecisionConfig
from mixtral_jax.kernels.backends import Target, available, choose, names
from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertWeights, expert_ffn
from mixtral_jax.kernels.grouped_blocks import choose_block_sizes
from mixtral_jax.kernels.permutation import combine_rows, dispatch_rows
from mixtral_jax.model.routing import dropless_plan
from mixtral_jax.precision import make_precision

SMALL = {"tokens": 2048, "d_model": 512, "layers": ["8x1792", "32x448", "128x112"], "dtype": "float32"}
MIXTRAL = {"tokens": 16384, "d_model": 4096, "layers": ["8x14336"], "dtype": "bfloat16"}


def main(arguments: list[str] | None = None) -> None:
    platform = jax.devices()[0].platform
    engines = [engine for engine in ("amx", "mkl") if platform == "cpu" and available(engine)]
    backends = [*engines, choose("experts", "auto", Target(platform))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--d-model", type=int)
    parser.add_argument("--per-token", type=int, default=2, help="experts per token")
    parser.add_argument("--layers", nargs="+", help="experts x d_ff")
    parser.add_argument("--backends", nargs="+", default=backends, choices=names("experts"))
    parser.add_argument("--block-sizes", type=int, nargs="+", help="rows of `grouped_blocks`, largest first")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--experts", nargs="+", default=["compute"], choices=("compute", "int8", "fp8"),
                        help="factors of the products, as of precision.experts")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10)
    parser.set_defaults(**(SMALL if platform == "cpu" else MIXTRAL))
    options = parser.parse_args(arguments)

    report = Report(
        f"expert layer, {options.tokens} tokens x {options.per_token} experts, d_model {options.d_model}, "
        f"{options.dtype}, uneven loads",
        "GFLOP/s = 6 * tokens * per token * d_model * d_ff forward (three times that with gradients) / median seconds; "
        "of dense = seconds of a dense layer of the same work / seconds",
    )
    for layer in options.layers:
        experts, d_ff = (int(part) for part in layer.split("x"))
        work = pieces(options, experts, d_ff)
        seconds = interleaved(work, options.rounds)
        useful = 6 * options.tokens * options.per_token * options.d_model * d_ff
        for name, taken in seconds.items():
            kind, what = name.split(", ")
            flops = useful * (3 if what == "gradients" else 1)
            report.add(
                experts=experts, d_ff=d_ff, layer=kind, work=what,
                gflops_a_second=flops / statistics.median(taken) / 1e9,
                of_dense=median_ratio(seconds[f"dense, {what}"], taken),
            )  # fmt: skip
    report.show()


def pieces(options: argparse.Namespace, experts: int, d_ff: int):
    """Compiled forward passes and gradients of the dense layer and of every backend, by name."""
    tokens, d, k = options.tokens, options.d_model, options.per_token
    rng = np.random.default_rng(0)

    def array(*shape):
        return normal(shape, options.dtype, 0, 0.05)

    x, d_y = array(tokens, d), array(tokens, d)
    weights = array(experts, d, d_ff), array(experts, d, d_ff), array(experts, d_ff, d)
    # The busiest expert has about 1.5 times the mean load.
    popularity = 1 + 0.5 * np.cos(np.pi * np.arange(experts) / max(1, experts - 1))
    chosen = np.stack([rng.choice(experts, k, replace=False, p=popularity / popularity.sum()) for _ in range(tokens)])
    routing, shares = jnp.asarray(chosen, jnp.int32), jnp.full((tokens, k), 1 / k)
    wide = array(d, k * d_ff), array(d, k * d_ff), array(k * d_ff, d)

    def dense(x, w_gate, w_up, w_down):
        return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down

    blocks = tuple(options.block_sizes or choose_block_sizes(tokens * k, experts))
    interpret = jax.devices()[0].platform == "cpu"

    def products(backend, factors):
        eight_bit = make_precision(PrecisionConfig(experts=factors)).experts

        def layer(rows, *w):
            sizes = jnp.bincount(routing.reshape(-1), length=experts)
            return expert_ffn(rows, sizes, ExpertWeights(*w), ExpertOptions(backend, blocks, interpret, eight_bit))

        return layer

    def mixture(run):
        def layer(x, *w):
            plan = dropless_plan(routing, experts, tokens * k)
            rows = run(dispatch_rows(x, plan.source, plan.row_of), *w)
            return combine_rows(rows, shares, plan.source, plan.row_of)

        return layer

    work = {}
    sorted_rows, d_rows = array(tokens * k, d), array(tokens * k, d)
    layers = {"dense": (dense, x, wide, d_y)}
    for backend, factors in itertools.product(options.backends, options.experts):
        name = backend if factors == "compute" else f"{backend} {factors}"
        run = products(backend, factors)
        layers[name] = (mixture(run), x, weights, d_y)
        layers[f"{name} products"] = (run, sorted_rows, weights, d_rows)
    for name, (layer, rows, w, d_out) in layers.items():
        forward = jax.jit(layer)
        gradients = jax.jit(lambda rows, *w, layer=layer, d_out=d_out: jax.vjp(layer, rows, *w)[1](d_out))
        work[f"{name}, forward"] = lambda f=forward, rows=rows, w=w: f(rows, *w)
        work[f"{name}, gradients"] = lambda g=gradients, rows=rows, w=w: g(rows, *w)
    return work


if __name__ == "__main__":
    main()
