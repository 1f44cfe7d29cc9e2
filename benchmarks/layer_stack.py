"""A stack of Mixtral's decoder layers, forward and with gradients, against the rate of one dense product.

    python -m benchmarks.layer_stack [--layers 4] [--rows 4] [--seq-len 4096] [--packed 1024] [--remat none]

The shapes are Mixtral 8x7B's unless flags say otherwise, on one device, in the kernels that its platform gets. Useful
FLOPs are `metrics.flops_per_token` without the output matrix: nothing recomputed, and the causal half of attention,
whatever the documents. MFU is against the device's peak by its data sheet, where `hardware.CHIPS` has it.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Report, interleaved, median_ratio
from mixtral_jax.config import Config, DataConfig, KernelsConfig, MeshConfig, ModelConfig, PrecisionConfig, TrainConfig
from mixtral_jax.hardware import find_chip
from mixtral_jax.metrics import flops_per_token
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import make_mesh

VOCAB = 256  # the tables are not part of the stack


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "rows": 4, "seq-len": 4096, "d-model": 4096, "d-ff": 14336, "heads": 32, "kv-heads": 8,
             "head-dim": 128, "experts": 8, "per-token": 2, "rounds": 10}  # fmt: skip
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--packed", type=int, help="tokens of a document; default: a row is one document")
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--kernel", default="auto", help="kernels.experts")
    parser.add_argument("--attention", default="auto", help="kernels.attention")
    options = parser.parse_args(arguments)

    config = configure(options)
    runtime = make_runtime(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    tokens = options.rows * options.seq_len
    work = pieces(config, Architecture(config.model, runtime), options)
    seconds = interleaved(work, options.rounds)
    dense = 2 * tokens * options.d_model * options.d_ff
    training = tokens * (flops_per_token(config.model, options.seq_len) - 6 * VOCAB * options.d_model)
    useful = {"dense product": dense, "forward": training / 3, "forward and gradients": training}
    chip = find_chip(jax.devices()[0].device_kind)
    report = Report(
        f"{options.layers} layers, {options.rows} x {options.seq_len} tokens, {runtime.describe()}",
        "TFLOP/s = useful FLOPs / median seconds; of dense = that rate / the dense product's, "
        "tokens x d_model x d_ff, in the same rounds; MFU = TFLOP/s / the device's peak",
    )
    for name, taken in seconds.items():
        rate = useful[name] / statistics.median(taken)
        report.add(
            work=name, milliseconds=1e3 * statistics.median(taken), tflops_a_second=rate / 1e12,
            of_dense=median_ratio(seconds["dense product"], taken) * useful[name] / dense,
            mfu=rate / chip.flops if chip else None,
        )  # fmt: skip
    report.show()


def configure(options: argparse.Namespace) -> Config:
    """The configuration that the options describe; arrays are in the compute type, as if gathered from float32."""
    o = options
    return Config(
        model=ModelConfig(
            d_model=o.d_model, d_ff=o.d_ff, num_layers=o.layers, num_heads=o.heads, num_kv_heads=o.kv_heads,
            head_dim=o.head_dim, vocab_size=VOCAB, num_experts=o.experts, num_experts_per_tok=o.per_token,
            rope_theta=1e6, norm_eps=1e-5,
        ),
        data=DataConfig(seq_len=o.seq_len),
        train=TrainConfig(steps=1, batch_size=o.rows, remat=o.remat),
        precision=PrecisionConfig(params=o.dtype, compute=o.dtype),
        kernels=KernelsConfig(experts=o.kernel, attention=o.attention),
    )  # fmt: skip


def pieces(config: Config, architecture: Architecture, options: argparse.Namespace):
    """Compiled pieces of work by name."""
    rng = np.random.default_rng(0)
    shape = options.rows, options.seq_len
    place = np.arange(options.seq_len)
    length = options.packed or options.seq_len
    tokens = jnp.asarray(rng.integers(VOCAB, size=shape), jnp.int32)
    ids, positions = (
        jnp.asarray(np.tile(x, (options.rows, 1)), jnp.int32) for x in (place // length + 1, place % length)
    )
    arrays = architecture.init(0)
    d_out = jnp.asarray(rng.standard_normal((*shape, options.d_model)), options.dtype)
    x = jnp.asarray(rng.standard_normal((tokens.size, options.d_model)), options.dtype)
    w = jnp.asarray(rng.standard_normal((options.d_model, options.d_ff)), options.dtype)

    def run(params):
        return architecture.bind(arrays | {"params": params})(tokens, ids, positions)[0]

    product, forward = jax.jit(jnp.matmul), jax.jit(run)
    gradients = jax.jit(lambda params: jax.vjp(run, params)[1](d_out))
    return {
        "dense product": lambda: product(x, w),
        "forward": lambda: forward(arrays["params"]),
        "forward and gradients": lambda: gradients(arrays["params"]),
    }


if __name__ == "__main__":
    main()
