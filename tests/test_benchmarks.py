"""Benchmarks run and say what they should, at sizes that measure nothing."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from benchmarks import accelerator, layer_parts, moe_layer, preferences, whole_models


def rows_of(capsys) -> list[dict]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_an_expert_layer_is_compared_with_a_dense_one(capsys):
    backend, sizes = "grouped_blocks", ["--tokens", "24", "--d-model", "8", "--layers", "4x16", "--rounds", "2"]
    moe_layer.main([*sizes, "--backends", backend])
    rows = rows_of(capsys)
    kinds = ("dense", backend, f"{backend} products")
    assert [(row["layer"], row["work"]) for row in rows] == [(k, w) for k in kinds for w in ("forward", "gradients")]
    assert all(row["of_dense"] > 0 for row in rows)


def test_parts_of_an_accelerator_report_as_they_go_in_their_time_and_a_file_holds_all(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "LIMITS", {"products": 0.1, "attention": 300})
    assert accelerator.main(["--tiny", "--parts", "products", "attention", "--json", str(tmp_path / "rows")]) == 1
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert [(row["part"], row["failed"]) for row in rows if "failed" in row] == [("products", "more than 0 s")]
    named = {row["what"]: row for row in rows if row["part"] == "attention"}
    for what in ("blockwise, 1 a row, forward", "blockwise, 4 a row, forward and gradients", "jax.nn causal, forward"):
        assert named[what]["TFLOP_a_s"] > 0
    assert [row["part"] for row in rows if row.get("what") == "the whole part"] == ["products", "attention"]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


@pytest.mark.parametrize("part", ["products", "eight_bit", "rest"])
def test_every_part_of_a_layer_is_measured(part, capsys):
    """A row that fails lets the others be measured, so only its text tells."""
    getattr(layer_parts, part)(accelerator.Options(tiny=True, experts=("grouped_blocks", "triton")))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows
    assert not [row for row in rows if "failed" in row]


def test_the_stack_and_the_steps_of_an_accelerator_give_rates_and_the_same_hashes(capsys):
    whole_models.stack(accelerator.Options(tiny=True, experts=("grouped_blocks",)))
    config = whole_models.small_config(True, "train.deterministic=true")
    whole_models.train("steps", config, 4, ("first", "again"))
    *stack, first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["what"].split(", ", 2)[2] for row in stack] == [
        f"{documents} a row, forward{more}" for documents in (1, 4) for more in ("", " and gradients")
    ]
    assert all(row["TFLOP_a_s"] > 0 for row in [*stack, first])
    assert (first["what"], second["what"]) == ("steps, first", "steps, again")
    assert first["state"] == second["state"]
    assert first["losses"] == second["losses"]


def test_weights_that_a_decoder_must_read():
    model = dataclasses.replace(whole_models.small_config(False).model, **whole_models.MIXTRAL)
    layer, expert = 2 * 4096 * 128 * 40 + 4096 * 8, 3 * 4096 * 14336
    head = 4096 * 32000
    assert whole_models.weights_read(model, 1) == 2 * (3 * (layer + 2 * expert) + head)
    assert whole_models.weights_read(model, 3) == 2 * (3 * (layer + 6 * expert) + head)
    assert whole_models.weights_read(model, 32) == 2 * (3 * (layer + 8 * expert) + head)


def test_a_hash_tells_of_every_bit_and_place():
    leaves = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, ml_dtypes.bfloat16)]
    changed = [leaves[0], np.where(np.arange(4) == 2, np.nextafter(leaves[1], leaves[1] * 2), leaves[1])]
    swapped = [leaves[0][:, ::-1], leaves[1]]
    assert len({whole_models.hash_of(each) for each in (leaves, changed, swapped)}) == 3
    assert whole_models.hash_of(leaves) == whole_models.hash_of([leaf.copy() for leaf in leaves])


def test_pairs_of_a_step_of_dpo_lie_whole_in_our_rows():
    pairs = preferences.make_pairs(64, 5)
    batch = preferences.rows_of(pairs, 800).pack(np.arange(preferences.rows_of(pairs, 800).count))
    assert batch.loss_mask.sum() == sum(len(chosen) + len(rejected) for _, chosen, rejected in pairs)
    found = {
        tuple(batch.targets[row][batch.loss_mask[row] & (batch.segment_ids[row] == 1)])
        for row in range(len(batch.tokens))
    }
    assert found <= {tuple(chosen) for _, chosen, _ in pairs}
