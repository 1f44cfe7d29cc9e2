"""Import and export around this package's own checkpoint: block by block, whole or not at all."""

import errno
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.runs import streaming
from mixtral_jax.verbs import import_
from mixtral_jax.weights.checkpoints import export_checkpoint, import_checkpoint
from mixtral_jax.weights.released import open_released
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
    take, calls = streaming._take, []

    def stop(*arguments: Any) -> jax.Array:
        calls.append(arguments)
        if len(calls) > 5:
            raise failure
        return take(*arguments)

    monkeypatch.setattr(streaming, "_take", stop)
    (tmp_path / "import").mkdir()
    with pytest.raises(raised):
        import_checkpoint(source, tmp_path / "import", [], say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["import", "source"]
    assert not list((tmp_path / "import").iterdir())
    monkeypatch.setattr(streaming, "_take", take)
    import_checkpoint(source, tmp_path / "import", [], say=quiet)


def test_no_block_of_an_export_is_the_whole_of_a_parameter(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_checkpoint(source, tmp_path / "import", [], say=quiet)
    put, sizes = streaming._put, []

    def watched(whole: jax.Array, block: jax.Array, start: Any) -> jax.Array:
        sizes.append(block.nbytes)
        return put(whole, block, start)

    monkeypatch.setattr(streaming, "_put", watched)
    export_checkpoint(tmp_path / "import", tmp_path / "out", "hf", say=quiet)
    assert max(sizes) <= 10_000
    assert np.prod((2, 4, 32, 48)) * 4 > 10_000  # what the experts' matrices take in all


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
