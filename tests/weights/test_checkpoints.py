"""Import and export around this package's own checkpoint: block by block, whole or not at all."""

import errno
import json
import math
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_jax.config import RopeScalingConfig, UserError
from mixtral_jax.config_loading import parse_config
from mixtral_jax.runs import streaming
from mixtral_jax.runs.checkpoint import find_checkpoint
from mixtral_jax.runs.sources import StoredArrays
from mixtral_jax.verbs import import_
from mixtral_jax.weights.checkpoints import export_checkpoint, import_checkpoint
from mixtral_jax.weights.importing import ReleasedArrays
from mixtral_jax.weights.released import open_released
from mixtral_jax.weights.released_tokenizer import read_tokenizer
from tests.limits import limited
from tests.weights.models import small
from tests.weights.synthetic import LAYOUTS, classic, load, write
from tests.weights.test_bad_sources import make_tokenizer

CONFIG = small()


def quiet(_: str) -> None:
    pass


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(streaming, "BLOCK", 10_000)
    directory = write(tmp_path / "source", "hf-fused", classic(CONFIG, "bfloat16"), CONFIG, "bfloat16")
    (directory / "tokenizer.model").write_bytes(make_tokenizer(CONFIG.vocab_size))
    return directory


def test_through_a_checkpoint_and_back_is_byte_equal(source: Path, tmp_path: Path) -> None:
    import_checkpoint(source, tmp_path / "import", ["mesh={fsdp: 2, expert: 4}"], say=quiet)
    export_checkpoint(tmp_path / "import", tmp_path / "out", "hf-fused", say=quiet)
    before, after = load(source), load(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (value.dtype, value.tobytes()) == (after[key].dtype, after[key].tobytes())
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == make_tokenizer(CONFIG.vocab_size)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), UserError)],
)
def test_an_import_that_stops_midway_leaves_nothing(
    source: Path, tmp_path: Path, failure: BaseException, raised: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = ReleasedArrays.block, []

    def stop(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 5:
            raise failure
        return read(*arguments)

    monkeypatch.setattr(ReleasedArrays, "block", stop)
    (tmp_path / "import").mkdir()
    with pytest.raises(raised):
        import_checkpoint(source, tmp_path / "import", [], say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["import", "source"]
    assert not list((tmp_path / "import").iterdir())
    monkeypatch.setattr(ReleasedArrays, "block", read)
    import_checkpoint(source, tmp_path / "import", [], say=quiet)


@pytest.mark.drills
def test_a_disk_that_fills_up_in_an_import_leaves_nothing_and_the_next_one_works(source: Path, tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 20_000), pytest.raises(UserError, match="File too large") as told:
        import_checkpoint(source, tmp_path / "import", [], say=quiet)
    assert "earlier checkpoints" not in str(told.value)  # there are none
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    import_checkpoint(source, tmp_path / "import", [], say=quiet)


def test_no_block_of_an_export_is_the_whole_of_a_parameter(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_checkpoint(source, tmp_path / "import", [], say=quiet)
    read, sizes = StoredArrays.block, []

    def watched(*arguments: Any) -> Any:
        sizes.append(read(*arguments).nbytes)
        return read(*arguments)

    monkeypatch.setattr(StoredArrays, "block", watched)
    export_checkpoint(tmp_path / "import", tmp_path / "out", "hf", say=quiet)
    assert max(sizes) <= 10_000
    assert np.prod((2, 4, 32, 48)) * 4 > 10_000  # what the experts' matrices take in all


def told(source: Path, directory: Path, *overrides: str) -> list[str]:
    said: list[str] = []
    import_checkpoint(source, directory, list(overrides), say=said.append)
    return said


def edit_config(source: Path, **changes: Any) -> None:
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_rounding_is_said(source: Path, tmp_path: Path) -> None:
    half = write(tmp_path / "half", "hf", classic(CONFIG, "float16"), CONFIG, "float16")
    (half / "tokenizer.model").write_bytes(make_tokenizer(CONFIG.vocab_size))
    rounded = "precision.params=bfloat16 rounds numbers of float16 by up to 0.4%; float32 would keep them"
    assert rounded in told(half, tmp_path / "a", "precision.params=bfloat16")
    assert not any("rounds" in line for line in told(half, tmp_path / "b"))


def test_a_window_is_said_and_bounds_the_rows(source: Path, tmp_path: Path) -> None:
    edit_config(source, sliding_window=24)
    with pytest.raises(UserError, match=r"data.seq_len=25 is longer than the release's sliding_window=24"):
        import_checkpoint(source, tmp_path / "import", ["data.seq_len=25"], say=quiet)
    assert any("in rows of up to 24 tokens" in line for line in told(source, tmp_path / "import"))
    checkpoints, step = find_checkpoint(tmp_path / "import")
    assert parse_config(checkpoints.read_meta(step)["config"]).data.seq_len == 24
    export_checkpoint(tmp_path / "import", tmp_path / "out", "hf", say=quiet)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 24


def test_slowed_frequencies_stay_with_the_checkpoint(source: Path, tmp_path: Path) -> None:
    edit_config(source, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    import_checkpoint(source, tmp_path / "import", [], say=quiet)
    export_checkpoint(tmp_path / "import", tmp_path / "out", "hf-fused", say=quiet)
    assert open_released(tmp_path / "out").config.rope_scaling == open_released(source).config.rope_scaling
    assert open_released(source).config.rope_scaling == RopeScalingConfig("yarn", 4.0, 64, 1 + 0.1 * math.log(4))
    for name in ("mistral", "mistral-fused"):
        with pytest.raises(UserError, match=r"no place for model.rope_scaling"):
            export_checkpoint(tmp_path / "import", tmp_path / "other", name, say=quiet)
    with pytest.raises(UserError, match=r"model.rope_scaling belongs to the release"):
        import_checkpoint(source, tmp_path / "other", ["model.rope_scaling.factor=2"], say=quiet)


@pytest.mark.parametrize("eos", [None, 7, [2, 7]])
def test_what_ends_a_text_stays_with_the_checkpoint(source: Path, tmp_path: Path, eos: Any) -> None:
    edit_config(source, eos_token_id=eos)
    import_checkpoint(source, tmp_path / "import", [], say=quiet)
    export_checkpoint(tmp_path / "import", tmp_path / "out", "hf", say=quiet)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, eos or 2)


def test_a_named_tokenizer_wins(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model").write_bytes(make_tokenizer(40))
    with pytest.raises(UserError, match=r"40 pieces but the model's vocabulary 64: .* data.tokenizer="):
        import_checkpoint(source, tmp_path / "import", [], say=quiet)
    with pytest.raises(UserError, match=r"data.tokenizer=train would"):
        import_checkpoint(source, tmp_path / "import", ["data.tokenizer=train"], say=quiet)
    (tmp_path / "large.model").write_bytes(make_tokenizer(65))
    with pytest.raises(UserError) as caught:
        import_checkpoint(source, tmp_path / "import", [f"data.tokenizer={tmp_path / 'large.model'}"], say=quiet)
    assert str(caught.value) == (
        f"the tokenizer that data.tokenizer names has 65 tokens, but the vocabulary of {source} 64: "
        "name the model's own"
    )
    (tmp_path / "mine.model").write_bytes(make_tokenizer(62))
    said = told(source, tmp_path / "import", f"data.tokenizer={tmp_path / 'mine.model'}")
    assert "tokenizer: 62 pieces, 0 added tokens, 2 rows without a token" in said
    export_checkpoint(tmp_path / "import", tmp_path / "out", "hf-fused", say=quiet)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == make_tokenizer(62)


def test_the_tokenizer_that_fits_is_taken(source: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"not one")
    with pytest.raises(UserError, match=r"tokenizer.model is not a sentencepiece model"):
        read_tokenizer(source, 64)
    (source / "tokenizer.model").write_bytes(make_tokenizer(40))
    (source / "tokenizer.model.v3").write_bytes(make_tokenizer(64))
    assert read_tokenizer(source, 64).model_bytes == make_tokenizer(64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"<a>": 64, "<b>": 66}', "64 pieces but the model's vocabulary 66"),  # no 65
        ('{"<a>": 64, "<b>": 65, "<c>": 66}', "64 pieces and 3 added tokens but the model's vocabulary 66"),
        (
            '{"other": 3, "<a>": 64, "<b>": 65}',
            "64 pieces but the model's vocabulary 66",
        ),  # 3 has a name
        ('{"a": 64, "<b>": 65}', "64 pieces but the model's vocabulary 66"),  # the model has a piece "a"
        ('{"a": "64"}', "does not list its added tokens"),
        ('{"": 64}', "does not list its added tokens"),
        ('{"a": -1}', "does not list its added tokens"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "as JSON"),
    ],
)
def test_added_tokens_that_cannot_be(source: Path, content: str, words: str) -> None:
    (source / "added_tokens.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_tokenizer(source, 66)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([{"id": 64, "content": "b"}], "calls token 64 'b', not 'a'"),
        ([{"id": 64, "content": "a", "lstrip": True}], "lstrip=true"),
        ([{"content": "a"}], "does not list its added tokens"),
        (4, "does not list its added tokens"),
    ],
)
def test_files_that_disagree_on_added_tokens(source: Path, tokens: Any, words: str) -> None:
    (source / "added_tokens.json").write_text('{"a": 64}')
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    with pytest.raises(UserError) as caught:
        read_tokenizer(source, 65)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["hf-dense", "mistral-dense"])
def test_a_dense_model_is_upcycled_by_the_verb(tmp_path: Path, name: Any) -> None:
    directory = write(tmp_path / "source", name, classic(CONFIG, "bfloat16"), CONFIG, "bfloat16")
    (directory / "tokenizer.model").write_bytes(make_tokenizer(CONFIG.vocab_size))
    import_([str(directory), str(tmp_path / "import"), "--upcycle-experts", "6", "--upcycle-per-token", "3"])
    export_checkpoint(tmp_path / "import", tmp_path / "out", "mistral", say=quiet)
    config = open_released(tmp_path / "out").config
    assert (config.num_experts, config.num_experts_per_tok) == (6, 3)
    out, dense = load(tmp_path / "out"), LAYOUTS["mistral-dense"](classic(CONFIG, "bfloat16"), CONFIG)
    for expert in range(6):
        key = f"layers.1.feed_forward.experts.{expert}.w2.weight"
        assert out[key].tobytes() == dense["layers.1.feed_forward.w2.weight"].tobytes()
