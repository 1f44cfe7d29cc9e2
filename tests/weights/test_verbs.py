"""`python -m mixtral_jax import | export` as a person calls them, around training and evaluation."""

import json
import random
import re
from pathlib import Path

import pytest

from mixtral_jax.__main__ import main
from mixtral_jax.config import UserError
from tests import small_run
from tests.small_run import WORDS, run
from tests.weights.models import small
from tests.weights.synthetic import classic, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained() -> Path:
    return small_run.trained()


def perplexity(checkpoint: Path, directory: Path, *overrides: str) -> dict[str, dict[str, float]]:
    source = f"data.sources=[{{name: words, path: {directory / 'text.jsonl'}}}]"
    result = run("eval.py", checkpoint, "--json", directory / "e.json", source, "eval.mode=document", *overrides)
    assert result.returncode == 0, result.stderr
    return json.loads((directory / "e.json").read_text())["sources"]


def test_there_and_back(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By one format out and in, and from there by another."""
    before = trained / "run"
    for name in ("hf-fused", "mistral-fused"):
        main(["export", f"{before}", f"{tmp_path / name}", "--format", name])
        assert f"step {12 if before == trained / 'run' else 0}" in capsys.readouterr().out
        before = tmp_path / "imported" / name
        main(["import", f"{tmp_path / name}", f"{before}", f"data.cache_dir={trained / 'cache'}"])
        assert f"{name} format, float32" in capsys.readouterr().out
    # Other text is measured whole; the run knows that it is other text, its import does not know.
    draw = random.Random(1)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=80))}) + "\n" for _ in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    found, expected = (perplexity(path, tmp_path, "eval.context=32") for path in (before, trained / "run"))
    assert (found["words"].pop("text"), expected["words"].pop("text")) == ("unknown", "other text")
    assert (found["words"].pop("trained_share"), expected["words"].pop("trained_share")) == (None, 0)
    assert found == expected
    continued = run(
        "train.py", trained / "config.yaml", f"run_dir={tmp_path / 'more'}", f"init_from={before}",
        "train.steps=4", "train.eval_every=0",
    )  # fmt: skip
    assert continued.returncode == 0, continued.stderr
    assert f"parameters from step 0 of {before}" in continued.stdout
    first, then = (
        json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for path in (tmp_path / "more", trained / "run")
    )
    assert first < then - 0.5


def test_mistakes_are_one_sentence_and_nothing_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "hf", "hf", classic(small(), "bfloat16"), small(), "bfloat16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        (("import", source, tmp_path / "new"), "no tokenizer.model: name one with data.tokenizer="),
        (("import", source, tmp_path / "new", "data.tokenizer=mixtral"), "32000"),
        (("import", source, tmp_path / "new", "model.d_ff=7"), "model.d_ff belongs to the release, where it is 48"),
        (("import", source, tmp_path / "new", "modle.d_ff=7"), "Did you mean"),
        (("import", source, tmp_path / "full"), "not empty"),
        (("import", tmp_path, tmp_path / "new"), "holds no weights"),
        (("export", tmp_path / "none", tmp_path / "new", "--format", "hf"), "no checkpoint"),
        (("export", trained / "run", tmp_path / "full", "--format", "hf"), "not empty"),
        (("imports",), "choose one of"),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as refusal:
            main([str(argument) for argument in arguments])
        assert "\n" not in str(refusal.value)
        assert sorted(tmp_path.rglob("*")) == before
    main([])
    assert "export" in capsys.readouterr().out
