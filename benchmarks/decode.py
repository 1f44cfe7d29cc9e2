"""Tokens a second after short prompts: this package, transformers and llama.cpp, the same weights, one run, medians.

    python -m benchmarks.decode                              # configs/small.yaml, batches of 1, 8 and 32, both types
    python -m benchmarks.decode --batches 1 --types float32 --contenders ours llama.cpp model.num_layers=2

Needs this package installed (`pip install -e .`) and requirements-parity.txt. Each contender is a process of its own
with as many threads, and they work in turn. transformers has a static cache, as it is and compiled; llama.cpp
(xllamacpp) reads a GGUF file, F32 or for bfloat16 F16, and gets all prompts of a batch at once. Activations are
float32, in transformers of the weights' type. Prompts run in each turn; their time counts for all.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.measure import Report, median_ratio
from benchmarks.workers import median_seconds, race, serve
from mixtral_jax.config import Config, ModelConfig
from mixtral_jax.config_loading import load_config
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.inference.decoding import STEPS, make_generator
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from mixtral_jax.weights.checkpoints import import_checkpoint
from mixtral_jax.weights.exporting import About, export_weights

CONFIG = Path(__file__).parents[1] / "configs" / "small.yaml"
CONTENDERS = ("ours", "transformers", "transformers compiled", "llama.cpp")
PROMPT = 16  # tokens
ITEMSIZE = {"float32": 4, "bfloat16": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="texts at once (1 8 32)")
    parser.add_argument(
        "--types", nargs="+", choices=ITEMSIZE, default=list(ITEMSIZE), help="of weights; in torch of activations too"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--new-tokens", type=int, default=64, help="of each text (64), made a multiple of 16")
    parser.add_argument("--rounds", type=int, default=3, help="of each contender, in turn (3)")
    parser.add_argument("--worker", nargs=5, metavar=("NAME", "DIR", "TYPE", "BATCH", "NEW"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as model.num_layers=2")
    options = parser.parse_intermixed_args()
    if options.worker:
        name, directory, kind, batch, new = options.worker
        work = WORK[name](Path(directory), kind, int(batch), int(new))
        serve(work, lambda: {})
        return
    config = load_config(CONFIG, options.overrides)
    new = options.new_tokens + -options.new_tokens % STEPS
    with tempfile.TemporaryDirectory() as name:
        prepare(config, Path(name), options.types)
        report = Report(
            f"decoding, {config.model.num_layers} layers, {new} tokens after prompts of {PROMPT}, {threads()} threads",
            f"tokens/s: of all texts, medians of {options.rounds} rounds. weights GB/s: what one step must read of the "
            f"weights times steps/s; a read of memory: {memory_rate() / 1e9:.1f} GB/s. ratio: speed by this package's",
        )
        for kind in options.types:
            for batch in options.batches:
                arguments = [[contender, name, kind, str(batch), str(new)] for contender in options.contenders]
                results = race("benchmarks.decode", arguments, options.rounds)
                for contender, result in zip(options.contenders, results, strict=True):
                    add(report, config.model, contender, kind, batch, new, result, results[0])
        report.show()


def add(
    report: Report, model: ModelConfig, name: str, kind: str, batch: int, new: int, result: Any, first: Any
) -> None:
    """Adds a row; a contender that failed has no figures."""
    row: dict[str, Any] = {"type": kind, "texts": batch, "contender": name}
    if "failed" in result:
        print(f"{name}, {kind}, {batch} texts: {result['failed']}")
        report.add(**row, tokens_s=None, weights_GB_s=None, ratio=None)
        return
    seconds = median_seconds(result)
    rate = step_bytes(model, batch, ITEMSIZE[kind]) * new / seconds / 1e9
    ratio = None if "failed" in first else median_ratio(first["seconds"], result["seconds"])
    report.add(**row, tokens_s=batch * new / seconds, weights_GB_s=rate, ratio=ratio)
    print(f"{name}, {kind}, {batch} texts: {batch * new / seconds:.1f} tokens/s", flush=True)  # the table comes last


def step_bytes(model: ModelConfig, batch: int, itemsize: int) -> float:
    """Bytes of weights that a step reads at least: all outside of the experts, and the experts that are chosen.

    Tokens choose as if by chance, so that of E experts E (1 - (1 - k/E)^batch) are.
    """
    d, f, heads = model.d_model, model.d_ff, model.head_dim * (model.num_heads + model.num_kv_heads) * 2
    chosen = model.num_experts * (1 - (1 - model.num_experts_per_tok / model.num_experts) ** batch)
    layer = d * heads + d * model.num_experts + chosen * 3 * d * f
    return itemsize * (model.num_layers * layer + d * model.vocab_size)


def memory_rate() -> float:
    """Bytes a second that all threads together read from arrays which no cache holds."""
    arrays = [np.ones(1 << 26, np.float32) for _ in range(threads())]

    def read() -> float:
        begin = time.perf_counter()
        workers = [threading.Thread(target=np.dot, args=(a[: a.size // 2], a[a.size // 2 :])) for a in arrays]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(a.nbytes for a in arrays) / (time.perf_counter() - begin)

    return statistics.median(read() for _ in range(5))


def threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def prepare(config: Config, directory: Path, types: list[str]) -> None:
    """Writes the same random weights for every contender."""
    from mixtral_jax.weights.gguf_files import export_gguf

    tokenizer = load_tokenizer(config.data, config.model.vocab_size).model_bytes
    arrays = Architecture(config.model, make_runtime(config)).init(0)
    for kind in types:
        about = About(context=512, load_balance=0.0, tokenizer=tokenizer)
        export_weights(arrays, config.model, directory / kind, "hf", about, dtype=kind)
        import_checkpoint(
            directory / kind, directory / f"{kind}-run", [f"precision.params={kind}"], say=lambda text: None
        )
        to: dict[str, Any] = {"context": 512, "dtype": "float16" if kind == "bfloat16" else kind}
        export_gguf(arrays, config.model, directory / f"{kind}.gguf", tokenizer=tokenizer, **to)


def prompts(batch: int) -> list[list[int]]:
    """Other tokens in every row, the same for every contender."""
    return np.random.default_rng(0).integers(3, 30000, (batch, PROMPT)).tolist()


def ours(directory: Path, kind: str, batch: int, new: int) -> Callable[[], Any]:
    from mixtral_jax.evaluation.loading import load_model

    overrides = [f"precision.params={kind}", f"eval.batch_size={batch}"]
    loaded = load_model(str(directory / f"{kind}-run"), overrides, packed=False)
    generate = make_generator(loaded.architecture)(loaded.arrays)

    def work() -> None:
        steps = generate(prompts(batch), [Sampling()] * batch, rows=batch, slots=PROMPT + new)
        jax.block_until_ready([drawn for drawn in islice(steps, new // STEPS)])

    return work


def transformers(directory: Path, kind: str, batch: int, new: int, compiled: bool = False) -> Callable[[], Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads())
    model = AutoModelForCausalLM.from_pretrained(directory / kind, dtype=getattr(torch, kind)).eval()
    if compiled:
        model.forward = torch.compile(model.forward, mode="default")
    tokens = torch.tensor(prompts(batch))

    def work() -> None:
        with torch.inference_mode():
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0, cache_implementation="static", disable_compile=True,
            )  # fmt: skip

    return work


def transformers_compiled(directory: Path, kind: str, batch: int, new: int) -> Callable[[], Any]:
    return transformers(directory, kind, batch, new, compiled=True)


def llama_cpp(directory: Path, kind: str, batch: int, new: int) -> Callable[[], Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(directory / f"{kind}.gguf")
    params.n_parallel, params.n_ctx, params.verbosity = batch, batch * 256, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
    server = xllamacpp.Server(params)
    greedy = {"n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def work() -> None:
        drawn: list[int] = []

        def one(prompt: list[int]) -> None:
            answer = server.handle_completions({"prompt": prompt, **greedy})
            drawn.append(answer["usage"]["completion_tokens"])

        workers = [threading.Thread(target=one, args=(prompt,)) for prompt in prompts(batch)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert drawn == [new] * batch, drawn

    return work


WORK = {
    "ours": ours,
    "transformers": transformers,
    "transformers compiled": transformers_compiled,
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    main()
