"""`check-mesh`: a mistake of a mesh is named, the small model is of its kind, bad input has a sentence."""

import os

import jax
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.config_checks import validate
from mixtral_jax.config_loading import load_config
from mixtral_jax.sharding import RULES
from mixtral_jax.training import mesh_check
from mixtral_jax.training.mesh_check import Difference, differences, reduced, sample_batch
from mixtral_jax.verbs import VERBS
from tests.imports import ROOT
from tests.tiny import tiny_config

CONFIG = str(ROOT / "configs" / "tiny.yaml")
SIZES = {"batch": "train.batch_size", "sequence": "data.seq_len", "d_model": "model.d_model", "d_ff": "model.d_ff",
         "heads": "model.num_heads", "kv_heads": "model.num_kv_heads", "vocab": "model.vocab_size",
         "experts": "model.num_experts"}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    jax.devices()  # those of the tests, whatever the command asks for
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])


def check(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        VERBS["check-mesh"]([CONFIG, *words])
    return ended.value.code


def test_a_sum_that_a_mesh_leaves_out_is_named(monkeypatch, capsys):
    monkeypatch.setattr("mixtral_jax.model.layers.add_up", lambda x, *_: x)  # of the embedding's parts
    assert check("model.num_layers=1", "mesh={fsdp: 1, tensor: 2}") == 1
    out = capsys.readouterr().out
    assert "tensor 2 on 2 simulated devices" in out
    assert "DIFFERS from one device in loss, cross_entropy" in out
    assert "lm_head" in out.splitlines()[-1]


@pytest.mark.parametrize(("words", "axes"), [((), "fsdp 8"), (("mesh.expert=2",), "fsdp 4 x expert 2")])
def test_the_free_axis_takes_what_is_left_of_eight(monkeypatch, capsys, words, axes):
    alone = {"loss": np.array(2.0), "lm_head": np.ones((2, 2))}
    monkeypatch.setattr(mesh_check, "first_step", lambda *_: alone)
    monkeypatch.setattr(mesh_check, "initial_arrays", lambda *_: None)
    assert check(*words) == 0
    assert f"{axes} on 8 simulated devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mesh.tensor=4"], "model.num_kv_heads is 2, which does not divide over the 4 devices"),
        (["mesh.fsdp=3"], "model.d_model is 128, which does not divide over the 3 devices"),
        (["mesh.context=8", "data.seq_len=24"], "data.seq_len is 24, which does not divide"),
        (["mesh.fsdp=2", "--devices", "4"], "is 2 devices but there are 4"),
        (["mesh.fsdp=2", "train.microbatches=8"], "train.batch_size / train.microbatches is 1"),
    ],
)
def test_what_cannot_be_has_a_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence):
        VERBS["check-mesh"]([CONFIG, *words])


def test_numbers_that_are_none_are_no_agreement():
    step = {"loss": np.array(np.nan), "w": np.array([3.0, 4.0]), "dropped": np.array(0.5)}
    found = differences(step, {"loss": np.array(1.0), "w": np.array([3.0, 4.5]), "dropped": np.array(0.0)})
    assert not found[0].relative <= mesh_check.LIMIT
    assert found[1] == Difference("w", pytest.approx(29.25**0.5), pytest.approx(0.5 / 29.25**0.5))
    assert found[2] == Difference("dropped", 0.0, 0.5)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*8x*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("parts", [1, 2, 8, {"d_model": 256, "batch": 256, "experts": 8, "tensor": 1}], ids=str)
def test_the_small_model_divides_as_the_real_one_does(path, parts):
    config = load_config(path)
    parts = dict.fromkeys(RULES, 1) | parts if isinstance(parts, dict) else dict.fromkeys(RULES, parts)
    small = reduced(config, parts)
    validate(small)
    for axis, key in SIZES.items():
        section, name = key.split(".")
        assert getattr(getattr(small, section), name) % parts[axis] == 0, axis
    assert (small.mesh, small.losses) == (config.mesh, config.losses)
    assert small.model.num_experts_per_tok == config.model.num_experts_per_tok
    assert small.model.d_model * small.model.num_experts <= 4096


def test_the_batch_holds_documents_and_padding_and_every_row_another():
    batch = sample_batch(tiny_config())
    assert (batch.segment_ids[:, 0] == 1).all()
    assert (batch.segment_ids[:, -1] == 0).all()
    assert batch.segment_ids.max() > 2
    assert len(set((batch.segment_ids > 0).sum(axis=1).tolist())) > 1
    assert not batch.loss_mask[batch.segment_ids == 0].any()
    begins = (batch.positions == 0) & (batch.segment_ids > 0)
    np.testing.assert_array_equal(np.where(batch.segment_ids > 0, np.cumsum(begins, axis=1), 0), batch.segment_ids)
