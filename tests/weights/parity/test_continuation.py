"""Train, release, import, continue on other text, release: transformers measures the same perplexity."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM

from eval import main as evaluate
from mixtral_jax import verbs
from tests.small_run import run, write_config

pytestmark = pytest.mark.slow


def train(*arguments: Any) -> None:
    result = run("train.py", *arguments)
    assert result.returncode == 0, result.stderr


def theirs(release: Path, documents: list[str]) -> float:
    """Perplexity of whole documents between BOS and EOS."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(release / "tokenizer.model"))
    model = AutoModelForCausalLM.from_pretrained(release).float()
    nats, count = 0.0, 0
    for text in documents:
        ids = torch.tensor([[tokenizer.bos_id(), *tokenizer.encode(text), tokenizer.eos_id()]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits.double()
        nats += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(nats / count)


def ours(checkpoint: Path, text: Path) -> float:
    result = text.with_suffix(".out")
    evaluate([str(checkpoint), "--json", str(result), f"data.sources=[{{name: x, path: {text}}}]",
              "eval.mode=document", "eval.context=64"])  # fmt: skip
    return json.loads(result.read_text())["total"]["perplexity"]


def test_continued_and_released(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    quiet = ("train.eval_every=0",)
    train(config, *quiet)
    new, other = tmp_path / "new.jsonl", tmp_path / "other.jsonl"
    for file, words in ((new, ["one", "two", "ten"]), (other, ["two", "one", "ten"])):  # the other is measured whole
        documents = [" ".join(f"{word} {i * j % 7}" for j, word in enumerate(words)) for i in range(60)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    verbs.export([str(tmp_path / "run"), str(tmp_path / "released"), "--format", "mistral"])
    verbs.import_([str(tmp_path / "released"), str(tmp_path / "import"), f"data.cache_dir={tmp_path / 'cache'}"])
    before = ours(tmp_path / "import", other)

    tokenizer = tmp_path / "released" / "tokenizer.model"
    continued = (
        f"init_from={tmp_path / 'import'}", f"run_dir={tmp_path / 'more'}", f"data.tokenizer={tokenizer}",
        f"data.sources=[{{name: new, path: {new}}}]", "train.steps=30",
    )  # fmt: skip
    train(config, *quiet, *continued)
    verbs.export([str(tmp_path / "more"), str(tmp_path / "again"), "--format", "hf"])
    after = ours(tmp_path / "more", other)
    assert after < 0.8 * before
    assert theirs(tmp_path / "again", documents) == pytest.approx(after, abs=1e-3)
