"""lm-evaluation-harness: our model class against the harness's own `hf` on the export of the same checkpoint."""

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import sentencepiece
from lm_eval.tasks import TaskManager

from mixtral_jax.config import SourceConfig
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.data.tokenizer_training import train_model
from mixtral_jax.evaluation.harness import MixtralJax
from mixtral_jax.evaluation.tasks import jsonl_task
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.weights.checkpoints import import_checkpoint
from mixtral_jax.weights.exporting import About, export_weights
from tests.small_run import WORDS
from tests.tiny import tiny_config
from tests.weights.models import runtime, small

CONTEXT = 48


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def pieces(tokenizer: Tokenizer) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    return [processor.id_to_piece(index) for index in range(tokenizer.vocab_size)]


def without_bytes(arrays: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Makes single bytes unlikely: transformers shows bytes that form no character otherwise than sentencepiece.

    One direction of the residual stream becomes the same for every text, and their logits fall with it.
    """
    params, layers = arrays["params"], arrays["params"]["layers"]
    params["embedding"] = params["embedding"].at[:, 0].set(1)
    layers["attention"]["wo"] = layers["attention"]["wo"].at[..., 0].set(0)
    layers["moe"]["w_down"] = layers["moe"]["w_down"].at[..., 0].set(0)
    single = np.flatnonzero([piece.startswith("<0x") for piece in pieces(tokenizer)])
    assert len(single) == 256
    params["lm_head"] = params["lm_head"].at[0, single].set(-40)
    return arrays


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An export and the checkpoint that was imported from it: random weights whose choices are far from ties."""
    directory = tmp_path_factory.mktemp("model")
    draw = random.Random(0)
    text = write(directory / "text.jsonl", [{"text": " ".join(draw.choices(WORDS, k=80))} for _ in range(60)])
    data = tiny_config().data
    source = SourceConfig(name="words", path=str(text))
    data = type(data)(**{**vars(data), "sources": [source], "cache_dir": str(directory / "cache")})
    tokenizer = train_model(data, 320)
    config = small(vocab_size=320, num_experts=8, num_experts_per_tok=2, init_std=0.25, num_layers=3)
    arrays = without_bytes(Architecture(config, runtime(config)).init(5), Tokenizer(tokenizer))
    export_weights(arrays, config, directory / "hf", "hf", About(CONTEXT, 0.02, tokenizer))
    import_checkpoint(directory / "hf", directory / "run", [], say=lambda text: None)
    return directory / "hf", directory / "run"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("tasks")
    draw = random.Random(1)
    say = lambda low, high: " ".join(draw.choices([*WORDS, "é", "12", "«Ja!»"], k=draw.randint(low, high)))  # noqa: E731
    return [
        write(directory / "choice.jsonl", [
            {"query": say(1, 40), "choices": [say(1, 8) for _ in range(3)], "gold": draw.randrange(3)}
            for _ in range(30)
        ]),
        write(directory / "schema.jsonl", [
            {"context_options": [say(2, 9), say(2, 9)], "continuation": say(1, 6), "gold": draw.randrange(2)}
            for _ in range(15)
        ]),
        write(directory / "ends.jsonl", [
            {"context": "" if n == 3 else say(1, 30), "continuation": " " + say(1, 4)} for n in range(15)
        ]),
        write(directory / "texts.jsonl", [{"text": say(1, 90)} for _ in range(8)]),
        write(directory / "answers.jsonl", [{"query": say(1, 15), "answer": say(1, 2)} for _ in range(6)]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def both(files: tuple[Path, Path], tasks: list[Path]) -> list[dict[str, Any]]:
    hf, run = files
    theirs: Any = {"model": "hf", "model_args": {"pretrained": str(hf), "dtype": "float32"}, "device": "cpu"}
    ours: Any = {"model": "mixtral_jax", "model_args": {"checkpoint": str(run), "eval.batch_size": 4}}
    return [
        lm_eval.simple_evaluate(
            **model, tasks=[jsonl_task(path) for path in tasks], log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )
        for model in (theirs, ours)
    ]  # fmt: skip


def test_the_model_is_registered() -> None:
    assert lm_eval.api.registry.get_model("mixtral_jax") is MixtralJax


@pytest.mark.parametrize("task", ["choice", "schema", "ends", "texts"])
def test_log_likelihoods_and_accuracies(both: list[dict[str, Any]], task: str) -> None:
    theirs, ours = ([sample["filtered_resps"] for sample in result["samples"][task]] for result in both)
    assert len(ours) == len(theirs) > 7
    values = [np.array([[answer[0] if task != "texts" else answer for answer in sample] for sample in side], float)
              for side in (theirs, ours)]  # fmt: skip
    np.testing.assert_allclose(values[1], values[0], atol=1e-3, rtol=0)
    assert np.ptp(values[0]) > 1
    if task != "texts":
        greedy = [[[answer[1] for answer in sample] for sample in side] for side in (theirs, ours)]
        assert greedy[0] == greedy[1]
    numbers = [result["results"][task] for result in both]
    for key, value in numbers[0].items():
        if key.startswith("acc"):
            assert numbers[1][key] == value, key
        elif isinstance(value, float):
            assert numbers[1][key] == pytest.approx(value, rel=1e-4), key


def test_generated_texts(both: list[dict[str, Any]]) -> None:
    theirs, ours = ([sample["resps"] for sample in result["samples"]["answers"]] for result in both)
    assert ours == theirs
    assert len({str(text) for text in ours}) > 3
