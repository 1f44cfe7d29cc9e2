"""An export appears whole or not at all, and says why not."""

import importlib.util
import json
import resource
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from mixtral_jax import verbs
from mixtral_jax.config import UserError
from mixtral_jax.weights import exporting
from mixtral_jax.weights.destination import new_file
from mixtral_jax.weights.exporting import EXPORT_FORMATS, About, export_weights
from tests.limits import limited
from tests.weights.models import blank, small
from tests.weights.test_bad_sources import make_tokenizer

CONFIG = small()
ABOUT = About(context=8, load_balance=0.0)


def refused(
    tmp_path: Path, arrays: dict[str, Any], *words: str, name: Any = "hf", about: About = ABOUT, **options: Any
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        export_weights(arrays, CONFIG, tmp_path / "out", name, about, **options)
    for word in words:
        assert word in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_directories_in_use(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_weights(blank(CONFIG), CONFIG, tmp_path / "out", "hf", ABOUT)
    refused(tmp_path, blank(CONFIG), str(tmp_path / "out"), "not empty", "new directory")


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_values_that_a_type_cannot_hold(tmp_path: Path, name: Any) -> None:
    arrays = blank(CONFIG)
    moe = arrays["params"]["layers"]["moe"]
    moe["w_down"] = moe["w_down"].at[1, 3, 0, 0].set(1e6)
    refused(tmp_path, arrays, "layers.1.", "float16 cannot hold", "--dtype bfloat16", name=name, dtype="float16")
    export_weights(arrays, CONFIG, tmp_path / "out", name, ABOUT, dtype="bfloat16")
    moe["w_down"] = moe["w_down"].at[1, 3, 0, 0].set(jnp.nan)
    (tmp_path / "out").rename(tmp_path / "other")
    refused(tmp_path, arrays, "layers.1.", "NaN", name=name)


def test_a_selection_bias_has_no_place(tmp_path: Path) -> None:
    arrays = blank(CONFIG)
    bias = arrays["selection_bias"]["layers"]["moe"]
    bias["selection_bias"] = bias["selection_bias"].at[0, 1].set(-0.001)
    refused(tmp_path, arrays, "losses.selection_bias_rate", "no released format")


def test_tokenizers(tmp_path: Path) -> None:
    refused(tmp_path, blank(CONFIG), "80 pieces", "model.vocab_size is 64", about=About(8, 0.0, make_tokenizer(80)))
    files = export_weights(blank(CONFIG), CONFIG, tmp_path / "out", "mistral", About(8, 0.0, make_tokenizer(64)))
    assert [file.name for file in files] == ["consolidated.safetensors", "params.json", "tokenizer.model"]
    assert files[2].read_bytes() == make_tokenizer(64)


def test_the_tokenizer_says_what_begins_and_ends_a_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(64, bos_id=4, eos_id=3)
    export_weights(blank(CONFIG), CONFIG, tmp_path / "out", "hf", About(8, 0.0, tokenizer))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (4, 3)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 4, "eos_token_id": 3, "pad_token_id": 0}


@pytest.mark.drills
@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_a_disk_that_fills_up_leaves_nothing_and_the_next_export_works(tmp_path: Path, name: Any) -> None:
    with limited(resource.RLIMIT_FSIZE, 20_000):
        refused(tmp_path, blank(CONFIG), str(tmp_path / "out"), "File too large", name=name)
    assert export_weights(blank(CONFIG), CONFIG, tmp_path / "out", name, ABOUT)


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting.SafetensorsWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_weights(blank(CONFIG), CONFIG, tmp_path / "out", "hf", ABOUT)
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_needs_its_ending_its_package_and_a_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, kind, dtype, words in (
        ("out", "gguf", None, "let its name end in .gguf"),
        ("out.gguf", "gguf", None, r"pip install 'mixtral_jax\[gguf\]'"),
        ("out", "hf", "Q8_0", "a type of the format gguf"),
    ):
        options = ["--format", kind, *(["--dtype", dtype] if dtype else [])]
        with pytest.raises(UserError, match=words):
            verbs.export([str(tmp_path / "run"), str(tmp_path / name), *options])
    monkeypatch.undo()
    with pytest.raises(UserError, match="exists: name a new file"):
        fill_file(tmp_path / "old.gguf")
    fill_file(tmp_path / "deep" / "new.gguf")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "new.gguf", "old.gguf"]


def fill_file(file: Path) -> None:
    with new_file(file) as partial:
        partial.write_text("new")
        assert not file.exists() or not file.read_text()
