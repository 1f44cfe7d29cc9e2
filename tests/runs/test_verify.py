"""`verify` tells good checkpoints from those that a run cannot go on from, and names the reason."""

import json
import re

import jax
import numpy as np
import pytest

from mixtral_jax.config import CheckpointConfig, UserError
from mixtral_jax.data.record import FILE as RECORD
from mixtral_jax.evaluation.loading import load_model
from mixtral_jax.runs import streaming, verify
from mixtral_jax.runs.checkpoint import META, Checkpoints
from mixtral_jax.runs.manifest import write_manifest
from mixtral_jax.verbs import VERBS
from tests.evaluation.checkpoint import make_run


@pytest.fixture(scope="module", params=[False, True], ids=["finite", "not finite"])
def made(request, tmp_path_factory):
    return request.param, make_run(tmp_path_factory.mktemp("run"), broken=request.param)


@pytest.mark.drills
def test_numbers_that_are_not_finite_are_named(made, capsys):
    broken, run = made
    if broken:
        with pytest.raises(UserError, match=r"2 of 2 checkpoints in .* are not good; none is good"):
            VERBS["verify"]([str(run)])
    else:
        VERBS["verify"]([str(run)])
        VERBS["verify"]([str(run / "checkpoints" / "1")])
    lines = capsys.readouterr().out.splitlines()
    found = [line.partition(": ")[2] for line in lines]
    if broken:
        assert found == ["params/final_norm/scale holds numbers that are not finite"] * 2
    else:
        assert all(re.fullmatch(r"good, \d+ arrays of 0\.00 GB", line) for line in found)
        assert len(found) == 3


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def spoil_checksum(bundle):
    largest = max(bundle.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))


def spoil_config(bundle):
    meta = json.loads((bundle / META).read_text())
    meta["config"] = meta["config"].replace("d_ff: 48", "d_ff: 40")
    (bundle / META).write_text(json.dumps(meta))
    write_manifest(bundle)


def spoil_tokenizer(bundle):
    (bundle / "tokenizer.model").write_bytes(b"no tokenizer")
    write_manifest(bundle)


@pytest.mark.drills
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_checksum, r"is not what was written \(checksum\)"),
        (spoil_config, r"does not fit the configuration: params/layers/moe/w_down is float32 \[2, 4, 48, 32\] there"),
        (spoil_tokenizer, r"the tokenizer in .* "),
        (lambda bundle: (bundle / "manifest.json").unlink(), "it is unfinished: there is no manifest"),
    ],
    ids=["bit", "config", "tokenizer", "manifest"],
)
def test_what_is_wrong_is_named_and_the_good_one_too(run, capsys, spoil, sentence):
    spoil(run / "checkpoints" / "2")
    with pytest.raises(UserError, match=r"1 of 2 checkpoints in .* are not good; the newest good one is 1"):
        VERBS["verify"]([str(run)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{run / 'checkpoints' / '1'}: good")
    assert re.search(sentence, second)


@pytest.mark.drills
def test_checkpoints_as_the_first_versions_wrote_them_are_read(run, capsys):
    """Without their step, without a record of the documents, and with a key of another name."""
    newer = load_model(str(run), []).arrays
    for step in (1, 2):
        bundle = run / "checkpoints" / str(step)
        meta = json.loads((bundle / META).read_text())
        for key in ("bundle", "documents", "training_tokens"):
            del meta[key]
        assert "  matmul:" in meta["config"]
        meta["config"] = meta["config"].replace("  matmul:", "  products:")
        (bundle / META).write_text(json.dumps(meta))
        (bundle / RECORD).unlink()
        write_manifest(bundle)
    VERBS["verify"]([str(run)])
    assert capsys.readouterr().out.count(": good, ") == 2
    older = load_model(str(run), [])
    assert (older.step, older.record) == (2, None)
    jax.tree.map(np.testing.assert_array_equal, older.arrays, newer)


@pytest.mark.drills
def test_every_block_is_looked_at_by_somebody(tmp_path, monkeypatch):
    """An array in blocks, of which each of some shares takes its own; the last one is not finite."""
    arrays = {"whole": np.arange(20.0, dtype=np.float32).reshape(5, 2, 2), "counts": np.arange(3)}
    arrays["broken"] = np.where(arrays["whole"] == 16, np.inf, arrays["whole"])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, {"params": jax.device_put(arrays)}, {}, {})
    checkpoints.wait()
    monkeypatch.setattr(streaming, "BLOCK", 16)
    monkeypatch.setattr(verify, "SHARES", 3)
    asked, read = [], verify._read_share
    monkeypatch.setattr(verify, "_read_share", lambda item: asked.append(item) or read(item))
    found = verify._read_all(tmp_path / "1", checkpoints.read_meta(1)["arrays"])
    assert found == {"params/broken": (80, False), "params/counts": (12, True), "params/whole": (80, True)}
    assert len(asked) == len(set(asked)) == 3 + 1 + 3


def test_a_key_of_another_section_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"from the checkpoint: leave out mesh.data=2"):
        VERBS["verify"]([str(tmp_path), "mesh.data=2"])


def test_a_place_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        VERBS["verify"]([str(tmp_path)])
