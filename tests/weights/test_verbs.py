"""`python -m mixtral_jax import | export` as a person calls them, around training and evaluation."""

import json
import random
from pathlib import Path

import pytest

from tests.small_run import WORDS, run, write_config
from tests.weights.models import small
from tests.weights.synthetic import classic, write

pytestmark = pytest.mark.slow
VERBS = "mixtral_jax/__main__.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    assert run("train.py", write_config(directory), "train.eval_every=0").returncode == 0
    return directory


def perplexity(checkpoint: Path, directory: Path, *overrides: str) -> dict[str, dict[str, float]]:
    source = f"data.sources=[{{name: words, path: {directory / 'text.jsonl'}}}]"
    result = run("eval.py", checkpoint, "--json", directory / "e.json", source, "eval.mode=document", *overrides)
    assert result.returncode == 0, result.stderr
    return json.loads((directory / "e.json").read_text())["sources"]


@pytest.mark.parametrize("name", ["hf-fused", "mistral-fused"])
def test_there_and_back(trained: Path, tmp_path: Path, name: str) -> None:
    exported = run(VERBS, "export", trained / "run", tmp_path / "release", "--format", name)
    assert exported.returncode == 0, exported.stderr
    assert "step 12" in exported.stdout
    imported = run(VERBS, "import", tmp_path / "release", tmp_path / "import", f"data.cache_dir={trained / 'cache'}")
    assert imported.returncode == 0, imported.stderr
    assert f"{name} format, float32" in imported.stdout
    # Other text is measured whole; the run knows that it is other text, its import does not know.
    draw = random.Random(1)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=80))}) + "\n" for _ in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    found, expected = (perplexity(path, tmp_path, "eval.context=32") for path in (tmp_path / "import", trained / "run"))
    assert (found["words"].pop("text"), expected["words"].pop("text")) == ("unknown", "other text")
    assert (found["words"].pop("trained_share"), expected["words"].pop("trained_share")) == (None, 0)
    assert found == expected
    continued = run(
        "train.py", trained / "config.yaml", f"run_dir={tmp_path / 'more'}", f"init_from={tmp_path / 'import'}",
        "train.steps=4", "train.eval_every=0",
    )  # fmt: skip
    assert continued.returncode == 0, continued.stderr
    assert f"parameters from step 0 of {tmp_path / 'import'}" in continued.stdout
    first, before = (
        json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for path in (tmp_path / "more", trained / "run")
    )
    assert first < before - 0.5


def test_mistakes_are_one_sentence_and_nothing_is_written(trained: Path, tmp_path: Path) -> None:
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
        result = run(VERBS, *arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), (arguments, result.stderr)
        assert words in result.stderr
        assert sorted(tmp_path.rglob("*")) == before
    assert "export" in run(VERBS).stdout
