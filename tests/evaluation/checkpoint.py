"""A checkpoint that was never trained, with two sources of its own, made in seconds."""

import json
import random
from pathlib import Path

import jax
import numpy as np

from mixtral_jax.config import CheckpointConfig, Config
from mixtral_jax.config_loading import parse_config, to_yaml
from mixtral_jax.data.pipeline import data_fingerprint, open_documents
from mixtral_jax.data.record import FILE
from mixtral_jax.runs.checkpoint import Checkpoints
from tests.small_run import WORDS
from tests.tiny import TINY, tiny_architecture


def make_run(directory: Path, *, broken: bool = False, record: bool = True, overrides: tuple[str, ...] = ()) -> Path:
    """Writes a run directory; `broken`: with a parameter that is not finite; `record`: says what it was trained on."""
    draw = random.Random(0)
    for name, words in (("one", WORDS[:9]), ("two", WORDS[9:])):
        documents = [" ".join(draw.choices(words, k=90)) for _ in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    config: Config = parse_config(
        TINY,
        [
            "model={vocab_size: 320, init_std: 0.1}",
            f"data.sources=[{{name: one, path: {directory}/one.jsonl}}, {{name: two, path: {directory}/two.jsonl}}]",
            f"data={{seq_len: 64, holdout: 0.2, tokenizer: train, cache_dir: {directory}/cache}}",
            f"run_dir={directory}/run",
            *overrides,
        ],
    )
    arrays = tiny_architecture(config).init(0)
    if broken:
        arrays["params"]["final_norm"]["scale"] = arrays["params"]["final_norm"]["scale"].at[3].set(np.nan)
    run = directory / "run"
    text = open_documents(config)
    meta = {"config": to_yaml(config), "data_fingerprint": data_fingerprint(config, text.training)}
    meta |= {"documents": text.summary(config.data)} if record else {}
    with Checkpoints(run / "checkpoints", CheckpointConfig()) as checkpoints:
        files = {"tokenizer.model": text.tokenizer.model_bytes, FILE: text.record.content}
        for step in (1, 2):
            checkpoints.save(step, arrays, {"step": step, "training_tokens": 400 * step, **meta}, files)
            arrays = jax.tree.map(lambda x: x * 0.9, arrays)
    history = [
        {"step": step, "loss": 5.0 / step, "cross_entropy": 4.0 / step, "load_balance_loss": 1.1, "max_violation": 0.5,
         "dead_experts": 0, "heldout/total": 6.0 / step}
        for step in (1, 2)
    ]  # fmt: skip
    history[1]["tokens_per_second"] = 10.0  # the first step has no rate
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    return run
