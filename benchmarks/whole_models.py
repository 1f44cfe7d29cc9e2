"""Whole models on one device: a start's checks, a stack of layers, training steps and decoding; see `accelerator`."""

import time
from dataclasses import replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.accelerator import Options
from benchmarks.measure import machine
from benchmarks.timing import normal, report, time_it
from mixtral_jax.compiled import keep_compiled
from mixtral_jax.config import Config, MeshConfig, ModelConfig
from mixtral_jax.config_loading import parse_config
from mixtral_jax.config_loading import replace as changed
from mixtral_jax.data.batch import Batch
from mixtral_jax.hardware import GIB, find_chip
from mixtral_jax.inference import decoding as decoder
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.metrics import flops_per_token
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import Runtime, make_runtime
from mixtral_jax.sharding import make_mesh
from mixtral_jax.training.admission import admit_kernels
from mixtral_jax.training.step import Trainable

STEPS = 30  # of the check for determinism
SMALL = """
model: {d_model: 512, d_ff: 1792, num_layers: 8, num_heads: 8, num_kv_heads: 2, head_dim: 64, vocab_size: 32000,
        num_experts: 8, num_experts_per_tok: 2, rope_theta: 1e6, norm_eps: 1e-5}
data: {seq_len: 512}
train: {steps: 1000, batch_size: 64}
precision: {compute: bfloat16}
"""
MIXTRAL = {"d_model": 4096, "d_ff": 14336, "num_layers": 3, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
TINY = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": 64}


def small_config(tiny: bool, *overrides: str) -> Config:
    """configs/small.yaml in bfloat16 with 64 rows."""
    config = parse_config(SMALL, list(overrides))
    return changed(config, model=TINY, data={"seq_len": 32}, train={"batch_size": 4}) if tiny else config


def wide_config(tiny: bool, *overrides: str) -> Config:
    """Layers of Mixtral 8x7B on 4 rows of 4,096 tokens; fewer of both where memory is short."""
    config = small_config(tiny, *overrides)
    if tiny:
        return config
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    layers, rows = (3, 4) if memory > 105 * GIB else (2, 2)
    model = MIXTRAL | {"num_layers": layers}
    return changed(config, model=model, data={"seq_len": 4096}, train={"batch_size": rows})


def one_device(config: Config) -> Runtime:
    """Runs a model on the first device alone."""
    return make_runtime(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def admission(options: Options) -> None:
    """Seconds of admission at two widths, in every type at one, the first time and the second; its differences."""
    report("machine", is_=machine())
    for make in (wide_config, small_config):
        for experts in ("compute", *["fp8", "int8"] * (make is wide_config and not options.tiny)):
            config = make(options.tiny, f"precision.experts={experts}")
            runtime = one_device(config)
            keep_compiled("")
            for turn in ("first", "second"):
                begin, programs = time.perf_counter(), dict[str, float]()
                try:
                    said = admit_kernels(config, runtime, programs.__setitem__).split()[-1]
                except Exception as error:  # the next types still count
                    said = f"{type(error).__name__}: {str(error)[:300]}"
                title = f"d_model {config.model.d_model}, {experts}, {turn}"
                report(title, seconds=time.perf_counter() - begin, largest_difference=said)
                for program, seconds in programs.items():  # side by side: the sum is more than the whole
                    report(f"  {program}", seconds=seconds)


def stack(options: Options, experts: str = "compute") -> None:
    """Layers of 8x7B in bfloat16, forward and with gradients, rows of one document and of several."""
    config = wide_config(options.tiny, "precision.params=bfloat16", f"precision.experts={experts}")
    config = changed(config, model={"vocab_size": 256, **({} if options.tiny else {"num_layers": 4})})
    config = changed(config, train={"batch_size": 4})
    model, batch, seq_len = config.model, config.train.batch_size, config.data.seq_len
    keep_compiled("")
    chip = find_chip(jax.devices()[0].device_kind)
    for backend in options.experts or ("auto",):
        architecture = Architecture(model, one_device(changed(config, kernels={"experts": backend})))
        arrays = architecture.init(0)
        forward, gradients = passes(architecture, arrays["selection_bias"])
        tokens = jax.random.randint(jax.random.key(1), (batch, seq_len), 0, model.vocab_size)
        d_out = normal((batch, seq_len, model.d_model), jnp.bfloat16, 2)
        useful = batch * seq_len * (flops_per_token(model, seq_len) - 6 * model.vocab_size * model.d_model)
        peak = chip.flops if chip else 0.0
        for documents in (1, 4):
            place = jnp.tile(jnp.arange(seq_len, dtype=jnp.int32), (batch, 1))
            text = tokens, place * documents // seq_len + 1, place % (seq_len // documents)
            kernel = f"{architecture.runtime.experts}{'' if experts == 'compute' else f' {experts}'}"
            title = f"{kernel}, {model.num_layers} layers, {documents} a row, forward"
            time_it(title, forward, arrays["params"], *text, flops=useful / 3, peak=peak)
            time_it(f"{title} and gradients", gradients, arrays["params"], d_out, *text, flops=useful, peak=peak)


def stack_fp8(options: Options) -> None:
    """The same with the factors of the experts' products in 8 bits."""
    stack(options, "fp8")


def passes(architecture: Architecture, bias: Any) -> tuple[Any, Any]:
    """Compiled functions: final activations, and their gradients by the parameters."""

    def forward(params: Any, *text: Array) -> Array:
        return architecture.bind({"params": params, "selection_bias": bias})(*text)[0]

    def gradients(params: Any, d_out: Array, *text: Array) -> Any:
        return jax.vjp(lambda params: forward(params, *text), params)[1](d_out)

    return jax.jit(forward), jax.jit(gradients)


def small(options: Options) -> None:
    """Steps of `small`, with and without determinism, each from the start twice: equal hashes, and the price."""
    for deterministic in ("false", "true"):
        config = small_config(options.tiny, f"train.deterministic={deterministic}")
        train(f"small, deterministic={deterministic}", config, 4 if options.tiny else STEPS, ("first", "again"))


def again(options: Options) -> None:
    """The deterministic half of `small` in a process of its own: the hash must be the same as there."""
    config = small_config(options.tiny, "train.deterministic=true")
    train("small, deterministic=true", config, 4 if options.tiny else STEPS, ("another process",))


def wide(options: Options) -> None:
    """Steps of layers of 8x7B."""
    config = wide_config(options.tiny)
    train(f"{config.model.num_layers} layers of 8x7B", config, 4 if options.tiny else 8)


def price(options: Options) -> None:
    """What determinism costs layers of 8x7B: of two, on two rows, since it takes memory, too."""
    for deterministic in ("false", "true"):
        config = wide_config(options.tiny, f"train.deterministic={deterministic}")
        if not options.tiny:
            config = changed(config, model={"num_layers": 2}, train={"batch_size": 2})
        train(f"2 layers of 8x7B, deterministic={deterministic}", config, 4 if options.tiny else 12)


def train(title: str, config: Config, steps: int, turns: tuple[str, ...] = ("first",)) -> None:
    """Trains from the start without looking, once a turn, and tells rate, last loss and hashes of losses and state."""
    keep_compiled("")
    runtime = one_device(config)
    trainable = Trainable(Architecture(config.model, runtime), config)
    shape = config.train.batch_size, config.data.seq_len
    place = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    same = {"segment_ids": np.ones_like(place), "positions": place, "loss_mask": np.ones(shape, bool)}
    batches = []
    for seed in range(4):
        text = np.random.default_rng(seed).zipf(1.3, (shape[0], shape[1] + 1)) % config.model.vocab_size
        text = text.astype(np.int32)
        batches.append(trainable.put(Batch(text[:, :-1], text[:, 1:], **same)))
    work, chip = flops_per_token(config.model, shape[1]), find_chip(jax.devices()[0].device_kind)
    for turn in turns:
        begin = time.perf_counter()
        state = trainable.start(trainable.architecture.init(0))
        jax.block_until_ready((state, batches))
        made = time.perf_counter()
        losses, ends = [], []
        for step in range(steps):
            state, metrics = trainable.step(state, batches[step % len(batches)])
            losses.append(metrics["loss"])
            if step in (1, steps - 1):
                jax.block_until_ready((state, metrics))
                ends.append(time.perf_counter())
        seconds = (ends[1] - ends[0]) / (steps - 2)
        rate = place.size / seconds
        values = np.asarray(jax.device_get(losses))
        report(
            f"{title}, {turn}", ms=1e3 * seconds, tokens_a_second=rate, TFLOP_a_s=rate * work / 1e12,
            mfu=rate * work / chip.flops if chip else None,
            rows=shape[0], making_seconds=made - begin, first_steps_seconds=ends[0] - made,
            peak_GiB=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB,
            last_loss=float(values[-1]),
            losses=f"{hash_of([values]):08x}", state=f"{hash_of(jax.tree.leaves(state)):08x}",
        )  # fmt: skip
        del state, metrics


@jax.jit
def _hashes(leaves: list[Any]) -> list[Any]:
    def one(leaf: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(leaf, {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
        place = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
        mixed = (bits.astype(jnp.uint32) ^ (place * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
        return jnp.sum(mixed, dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def hash_of(leaves: list[Any]) -> int:
    """A number that another bit anywhere changes, with all likelihood."""
    total = 0
    for number in _hashes(leaves):
        total = (total * 31 + int(number)) % 2**32
    return total


def decoding(options: Options) -> None:
    """Tokens drawn a second, after prompts of 64, by `small` and by layers of 8x7B, many texts at once and one.

    TB/s are those of the weights that every step must read, whatever it keeps: those that multiply a token, 2 bytes
    each, with the experts that so many texts can choose, over the seconds of a step, prompts included.
    """
    keep_compiled("")
    for title, make in (("small", small_config), ("layers of 8x7B", wide_config)):
        config = make(options.tiny, "precision.params=bfloat16")
        architecture = Architecture(config.model, one_device(config))
        generate = decoder.make_generator(architecture)(architecture.init(0))
        texts, prompt, new = (2, 8, 16) if options.tiny else (32, 64, 128)
        for rows in (texts, 1):
            prompts = [[1 + (row + i) % 50 for i in range(prompt)] for row in range(rows)]
            seconds = []
            for _ in range(3):
                begin = time.perf_counter()
                steps = generate(prompts, [Sampling()] * rows, rows=rows, slots=prompt + new)
                drawn = sum(len(step[0].tokens) for step in islice(steps, -(-new // decoder.STEPS)))
                seconds.append(time.perf_counter() - begin)
            rate = drawn / min(seconds[1:])
            asked = f"{rows} text{'s' * (rows > 1)}"
            report(
                f"{title}, {config.model.num_layers} layers, {asked}", tokens_a_second=rows * rate,
                TB_a_s=rate * weights_read(config.model, rows) / 1e12, first_seconds=seconds[0],
            )  # fmt: skip


def weights_read(model: ModelConfig, texts: int) -> float:
    """Bytes of weights, 2 each, that a step must read which draws a token of each text."""
    experts = min(model.num_experts, texts * model.num_experts_per_tok)
    return 2 * flops_per_token(replace(model, num_experts_per_tok=experts), 0) / 6  # 6 FLOPs a weight
