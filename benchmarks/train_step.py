"""A whole training step beside transformers on the same machine, in the same run, in turn.

    python -m benchmarks.train_step [--shapes small wide] [--rounds 5] [--dtype float32] [--peers grouped_mm eager]

`small` is configs/small.yaml; `wide` has 32 experts of d_ff 448, the same parameters and half of the active ones. Peers
are experts implementations of transformers, `+compile` adds torch.compile; without torch they are left out. Every
contender does forward, backward, clipping by the global norm and AdamW on 4 x 512 tokens, with the load-balancing loss.
A peer `lora16` is ours with adapters of rank 16.
"""

import argparse
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Report
from benchmarks.workers import median_seconds, race, ratio_to_first, serve
from mixtral_jax.config import Config
from mixtral_jax.config_loading import load_config, replace
from mixtral_jax.metrics import flops_per_token, parameter_counts

SHAPES = {
    "small": [],
    "wide": ["model.num_experts=32", "model.d_ff=448"],
    "128": ["model.num_experts=128", "model.d_ff=112"],
}
PEERS = ["grouped_mm", "grouped_mm+compile", "eager"]
SMALL = Path(__file__).parent.parent / "configs" / "small.yaml"


def config_of(shape: str, dtype: str) -> Config:
    """The configuration of a shape; the balancing coefficient is transformers' default in our scale."""
    return load_config(SMALL, [*SHAPES[shape], f"precision.compute={dtype}", "losses.router_z=0"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "wide"], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--peers", nargs="*", default=PEERS, help="experts implementations of transformers")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        who, shape, dtype = options.worker
        config = config_of(shape, dtype)
        if who.startswith("lora"):
            ours(replace(config, init_from="a base", objective={"lora_rank": int(who.removeprefix("lora"))}))
        elif who == "mixtral_jax":
            ours(config)
        else:
            transformers(config, who)
        return

    has_torch = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")
    peers = [peer for peer in options.peers if has_torch or peer.startswith("lora")]
    if len(peers) < len(options.peers):
        print("transformers and torch are not installed: no peers in this run", file=sys.stderr)
    report = Report(
        f"training step, 4 x 512 tokens, {options.dtype}",
        "GFLOP/s = tokens/s * (6 * active matmul parameters + causal attention) per token; MFU = that / the rate of a "
        "product in the same process, our fastest square one, theirs of 2048 x 512 x 1792; vs ours = our seconds / its "
        "seconds, median over rounds",
    )
    for shape in options.shapes:
        config = config_of(shape, options.dtype)
        tokens = config.train.batch_size * config.data.seq_len
        flops = flops_per_token(config.model, config.data.seq_len)
        limit = parameter_counts(config.model).total * 16 / 2**30 + 1
        names = ["mixtral_jax", *peers]
        results = race("benchmarks.train_step", [[name, shape, options.dtype] for name in names], options.rounds)
        for name, result, ratio in zip(names, results, ratio_to_first(results), strict=True):
            if "failed" in result:
                print(f"{name} on {shape} failed: {result['failed']}", file=sys.stderr)
                continue
            rate = tokens / median_seconds(result)
            report.add(
                shape=shape, who=name, tokens_a_second=rate, GFLOPs=rate * flops / 1e9,
                MFU=rate * flops / result["product"], vs_ours=ratio, first_step_seconds=result["first_seconds"],
                peak_GiB=result["peak_gib"], limit_GiB=limit,
            )  # fmt: skip
    report.show()


def ours(config: Config) -> None:
    """Our step, as train.py runs it."""
    import jax
    import numpy as np

    from mixtral_jax.data.batch import Batch
    from mixtral_jax.hardware import measured_matmul_peak
    from mixtral_jax.kernels.cpu.memory import return_memory
    from mixtral_jax.kernels.matmul import contract
    from mixtral_jax.model.mixtral import Architecture
    from mixtral_jax.runtime import make_runtime
    from mixtral_jax.training.step import Trainable

    runtime = make_runtime(config)
    return_memory()
    architecture = Architecture(config.model, runtime, config.objective)
    trainable, arrays = Trainable(architecture, config), architecture.init(0)
    if config.objective.lora_rank:
        arrays["adapters"] = architecture.init_adapters(0)
    state = trainable.start(arrays)
    shape = (config.train.batch_size, config.data.seq_len)
    text = np.random.default_rng(0).integers(config.model.vocab_size, size=(shape[0], shape[1] + 1)).astype(np.int32)
    batch = trainable.put(
        Batch(
            tokens=text[:, :-1],
            targets=text[:, 1:],
            segment_ids=np.ones(shape, np.int32),
            positions=np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            loss_mask=np.ones(shape, bool),
        )
    )

    def step() -> None:
        nonlocal state
        state, metrics = trainable.step(state, batch)
        jax.block_until_ready((state, metrics))

    multiply = partial(contract, axes=1, backend=runtime.matmul)
    serve(step, lambda: {"product": measured_matmul_peak(config.precision.compute, multiply)})


def transformers(config: Config, who: str) -> None:
    """The step of transformers' MixtralForCausalLM with one of its experts implementations."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    implementation, _, compiled = who.partition("+")
    model_config = config.model
    torch.manual_seed(0)
    released = MixtralConfig(
        vocab_size=model_config.vocab_size, hidden_size=model_config.d_model, intermediate_size=model_config.d_ff,
        num_hidden_layers=model_config.num_layers, num_attention_heads=model_config.num_heads,
        num_key_value_heads=model_config.num_kv_heads, num_local_experts=model_config.num_experts,
        num_experts_per_tok=model_config.num_experts_per_tok, output_router_logits=True,
        router_aux_loss_coef=config.losses.load_balance / model_config.num_experts_per_tok,
    )  # fmt: skip
    dtype = getattr(torch, str(config.precision.compute))
    model: Any = MixtralForCausalLM(released).to(dtype)
    model.set_experts_implementation(implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    call = torch.compile(model) if compiled else model
    text = torch.randint(model_config.vocab_size, (config.train.batch_size, config.data.seq_len))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        call(input_ids=text, labels=text).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()

    serve(step, lambda: {"product": product_rate(torch, dtype)})


def product_rate(torch: Any, dtype: Any) -> float:
    """FLOP/s of a 2048 x 512 x 1792 product in torch, the fastest of some."""
    import time

    a, b = torch.randn(2048, 512, dtype=dtype), torch.randn(512, 1792, dtype=dtype)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048 * 512 * 1792 / min(seconds)


if __name__ == "__main__":
    main()
