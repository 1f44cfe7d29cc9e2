"""A step of DPO beside TRL on the same machine, with the same model, reference and pairs, in turn.

    python -m benchmarks.preferences [--pairs 8] [--rounds 3] [--config configs/small.yaml] [model.num_layers=4 ...]

`trl` is its trainer as it comes (reference model in memory, activations computed again), `trl-lean` has what we have:
log-probabilities of the reference computed before, activations kept. All are in float32 with the load-balancing loss,
forward, backward, clipping and AdamW. Prompts and answers are random tokens of uneven lengths; the
reference is the model that training starts from.
"""

import argparse
import dataclasses
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Report
from benchmarks.workers import median_seconds, race, ratio_to_first, serve
from mixtral_jax.config import Config
from mixtral_jax.config_loading import load_config, replace
from mixtral_jax.data.answers import ANSWER, WORSE
from mixtral_jax.data.record_rows import RecordRows
from mixtral_jax.data.splits import Documents

SMALL = Path(__file__).parent.parent / "configs" / "small.yaml"
BETA, LEARNING_RATE = 0.1, 1e-5
Pairs = list[tuple[list[int], list[int], list[int]]]  # prompt, chosen, rejected


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", default=str(SMALL), help="whose model is taken")
    parser.add_argument("--seq-len", type=int, default=1024, help="of our rows")
    parser.add_argument("--peers", nargs="*", default=["trl", "trl-lean"])
    parser.add_argument("overrides", nargs="*", help="key=value on top of the configuration")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    who, directory = options.worker or ("", "")
    config = load_config(
        options.config,
        [
            f"objective={{name: preference, losses: [{{name: sigmoid, beta: {BETA}}}]}}", "losses.router_z=0",
            f"data.seq_len={options.seq_len}", "optimizer.schedule=constant", "optimizer.warmup_steps=0",
            f"optimizer.learning_rate={LEARNING_RATE}", *options.overrides,
        ],
    )  # fmt: skip
    pairs = make_pairs(config.model.vocab_size, options.pairs)
    if options.worker and who.startswith("trl"):
        trl(directory, config, pairs, lean=who == "trl-lean")
        return
    if options.worker:
        ours(config, pairs, directory if who == "export" else "")
        return

    peers = options.peers if all(map(importlib.util.find_spec, ("trl", "torch"))) else []
    if len(peers) < len(options.peers):
        print("trl and torch are not installed: no peers in this run", file=sys.stderr)
    tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) - 2 for prompt, chosen, rejected in pairs)
    report = Report(
        f"step of DPO, {options.pairs} pairs, {tokens} tokens without padding, float32",
        "vs ours = our seconds / its seconds, median over rounds; margin = rewards/margins at the last step, after as "
        "many steps each",
    )
    with tempfile.TemporaryDirectory() as directory:
        sizes = ["--config", options.config, "--pairs", str(options.pairs), "--seq-len", str(options.seq_len)]
        shared = [directory, *sizes, *options.overrides]
        if peers and "failed" in (exported := race("benchmarks.preferences", [["export", *shared]], 0)[0]):
            raise SystemExit(f"the export failed: {exported['failed']}")
        names = ["mixtral_jax", *peers]
        results = race("benchmarks.preferences", [[name, *shared] for name in names], options.rounds)
    for name, result, ratio in zip(names, results, ratio_to_first(results), strict=True):
        if "failed" in result:
            print(f"{name} failed: {result['failed']}", file=sys.stderr)
            continue
        report.add(
            who=name, tokens_a_second=tokens / median_seconds(result), vs_ours=ratio, peak_GiB=result["peak_gib"],
            computed_tokens=result["computed"], margin=result["margin"],
        )  # fmt: skip
    report.show()


def make_pairs(vocab_size: int, count: int) -> Pairs:
    """Draws pairs: prompts of 8 to 128 tokens, answers of 16 to 256."""
    rng = np.random.default_rng(0)
    lengths = [(rng.integers(8, 129), *rng.integers(16, 257, size=2)) for _ in range(count)]
    return [tuple(rng.integers(3, vocab_size, size=n).tolist() for n in each) for each in lengths]  # type: ignore[misc]


def rows_of(pairs: Pairs, seq_len: int) -> RecordRows:
    """The rows that hold the pairs, as training packs them."""
    rows = RecordRows(documents_of(pairs), seq_len)
    assert not rows.dropped, "a pair is longer than a row"
    return rows


def documents_of(pairs: Pairs) -> Documents:
    """The pairs as a source holds them."""
    tokens: list[int] = []
    marks: list[int] = []
    ends = [0]
    for prompt, chosen, rejected in pairs:
        for answer, side in ((chosen, 0), (rejected, WORSE)):
            tokens += [*prompt, *answer]
            marks += [side] * len(prompt) + [side + ANSWER] * len(answer)
        ends.append(len(tokens))
    return Documents(
        name="pairs", buffer=np.array(tokens, np.int32), starts=np.array(ends[:-1]), offsets=np.array(ends),
        byte_counts=np.zeros(len(pairs), np.int64), bos_id=1, fingerprint="", format="pairs",
        marks=np.array(marks, np.uint8),
    )  # fmt: skip


def ours(config: Config, pairs: Pairs, directory: str) -> None:
    """Our step, as train.py runs it; the model goes into the directory for the others, if there is one."""
    import jax

    from mixtral_jax.evaluation.scoring import make_scorer
    from mixtral_jax.kernels.cpu.memory import return_memory
    from mixtral_jax.model.mixtral import Architecture
    from mixtral_jax.runtime import make_runtime
    from mixtral_jax.training.step import Trainable
    from mixtral_jax.weights.exporting import About, export_weights

    rows = rows_of(pairs, config.data.seq_len)
    config = replace(config, train={"batch_size": rows.count})
    architecture = Architecture(config.model, make_runtime(config))
    arrays = architecture.init(0)
    if directory:
        where = f"{directory}/model"
        context, balance = config.data.seq_len, config.losses.load_balance
        export_weights(arrays, config.model, where, "hf", About(context, balance))
        serve(lambda: None, dict)
        return
    return_memory()
    trainable = Trainable(architecture, config)
    batch = rows.pack(np.arange(rows.count))
    batch = dataclasses.replace(batch, reference=-make_scorer(architecture)(arrays)(batch).nats)
    state, placed, metrics = trainable.start(arrays), trainable.put(batch), {}

    def step() -> None:
        nonlocal state, metrics
        state, metrics = trainable.step(state, placed)
        jax.block_until_ready((state, metrics))

    about = lambda: {"computed": placed.tokens.size, "margin": float(metrics["rewards/margins"])}  # noqa: E731
    serve(step, about)


def trl_trainer(
    model: Any, records: list[dict[str, Any]], directory: str, ref_model: Any = None, **settings: Any
) -> tuple[Any, Any]:
    """TRL's trainer as a user on a CPU makes it, DPO's or for labels KTO's, and the records as its step takes them."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    kind = "KTO" if "label" in records[0] else "DPO"
    asked = getattr(trl, f"{kind}Config")(
        output_dir=f"{directory}/trl", use_cpu=True, bf16=False, report_to="none", max_length=None, disable_tqdm=True,
        **settings,
    )  # fmt: skip
    words = {"prompt": "a", "chosen": "b", "rejected": "c"}  # the records come as tokens
    known = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, unk_token="<unk>", eos_token="</s>")
    trainer: Any = getattr(trl, f"{kind}Trainer")(
        model, ref_model, args=asked, train_dataset=Dataset.from_list([words] * 2), processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1  # as its loop sets it
    return trainer, trainer.data_collator(records)


def trl_records(pairs: Pairs) -> list[dict[str, Any]]:
    """The pairs with TRL's names."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


def trl(directory: str, config: Config, pairs: Pairs, *, lean: bool) -> None:
    """The step of TRL's DPOTrainer."""
    import torch
    from transformers import MixtralForCausalLM

    model: Any = MixtralForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    trainer, inputs = trl_trainer(
        model, trl_records(pairs), directory, beta=BETA,
        gradient_checkpointing=not lean, precompute_ref_log_probs=lean, per_device_train_batch_size=1,
    )  # fmt: skip
    if lean:
        sums = trainer.compute_ref_log_probs(model, inputs)
        inputs |= {f"ref_{kind}_logps": each for kind, each in zip(("chosen", "rejected"), sums, strict=True)}
    used = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(used.beta1, used.beta2), weight_decay=used.weight_decay, fused=True
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        trainer.training_step(model, dict(inputs))
        torch.nn.utils.clip_grad_norm_(model.parameters(), used.clip_norm)
        optimizer.step()

    def about() -> dict[str, Any]:
        return {"computed": inputs["input_ids"].numel(), "margin": trainer._metrics["train"]["rewards/margins"][-1]}

    serve(step, about)


if __name__ == "__main__":
    main()
