"""One SwiGLU expert layer, forward and with both gradients, against a dense layer of the same active work.

    python -m benchmarks.moe_layer [--tokens 2048] [--d-model 512] [--layers 8x1792 32x448 128x112] [--dtype float32]
                                      [--experts compute int8 fp8]

The dense layer is the limit that a mixture could reach: the same products, in one piece, with nothing to route.
"""

import argparse
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Report, interleaved, median_ratio
from mixtral_jax.config import PrecisionConfig
from mixtral_jax.kernels.blocked import choose_block_sizes
from mixtral_jax.kernels.expert_ffn import expert_ffn
from mixtral_jax.kernels.permutation import combine_rows, dispatch_rows
from mixtral_jax.model.routing import dropless_plan
from mixtral_jax.precision import make_precision

BACKENDS = ("blocked", "ragged_dot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--per-token", type=int, default=2, help="experts per token")
    parser.add_argument("--layers", nargs="+", default=["8x1792", "32x448", "128x112"], help="experts x d_ff")
    parser.add_argument("--backends", nargs="+", default=["blocked"], choices=BACKENDS)
    parser.add_argument("--block-size", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--experts", nargs="+", default=["compute"], choices=("compute", "int8", "fp8"),
                        help="factors of the products, as of precision.experts")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()

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
        return jnp.asarray(rng.standard_normal(shape) * 0.05, options.dtype)

    x, d_y = array(tokens, d), array(tokens, d)
    weights = array(experts, d, d_ff), array(experts, d, d_ff), array(experts, d_ff, d)
    # The busiest expert has about 1.5 times the mean load.
    popularity = 1 + 0.5 * np.cos(np.pi * np.arange(experts) / max(1, experts - 1))
    chosen = np.stack([rng.choice(experts, k, replace=False, p=popularity / popularity.sum()) for _ in range(tokens)])
    routing, shares = jnp.asarray(chosen, jnp.int32), jnp.full((tokens, k), 1 / k)
    wide = array(d, k * d_ff), array(d, k * d_ff), array(k * d_ff, d)

    def dense(x, w_gate, w_up, w_down):
        return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down

    def mixture(backend, factors):
        blocks = (options.block_size,) if options.block_size else choose_block_sizes(tokens * k, experts)
        eight_bit = make_precision(PrecisionConfig(experts=factors)).experts

        def layer(x, w_gate, w_up, w_down):
            plan = dropless_plan(routing, experts, tokens * k)
            rows = dispatch_rows(x, plan.source, plan.row_of)
            rows = expert_ffn(rows, plan.group_sizes, w_gate, w_up, w_down, backend=backend,
                              block_sizes=blocks, eight_bit=eight_bit)  # fmt: skip
            return combine_rows(rows, shares, plan.source, plan.row_of)

        return layer

    work = {}
    layers = {"dense": (dense, wide)}
    for backend, factors in itertools.product(options.backends, options.experts):
        layers[backend if factors == "compute" else f"{backend} {factors}"] = (mixture(backend, factors), weights)
    for name, (layer, w) in layers.items():
        forward = jax.jit(layer)
        gradients = jax.jit(lambda *a, layer=layer: jax.vjp(layer, *a)[1](d_y))
        work[f"{name}, forward"] = lambda f=forward, w=w: f(x, *w)
        work[f"{name}, gradients"] = lambda g=gradients, w=w: g(x, *w)
    return work


if __name__ == "__main__":
    main()
