"""Benchmarks run and say what they should, at sizes that measure nothing."""

import json

import pytest

from benchmarks import accelerator, moe_layer, whole_models


def rows_of(capsys) -> list[dict]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


@pytest.mark.parametrize("backend", ["grouped_blocks", "triton"])
def test_an_expert_layer_is_compared_with_a_dense_one(capsys, backend):
    sizes = ["--tokens", "24", "--d-model", "8", "--layers", "4x16", "--rounds", "2"]
    moe_layer.main([*sizes, "--backends", backend])
    rows = rows_of(capsys)
    kinds = ("dense", backend, f"{backend} products")
    assert [(row["layer"], row["work"]) for row in rows] == [(k, w) for k in kinds for w in ("forward", "gradients")]
    assert all(row["of_dense"] > 0 for row in rows)


def test_parts_of_an_accelerator_report_as_they_go_and_a_file_holds_all(capsys, tmp_path):
    assert accelerator.main(["--tiny", "--parts", "attention", "torch", "--json", str(tmp_path / "rows")]) == 0
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    named = {row["what"]: row for row in rows}
    for what in ("blockwise, 1 a row, forward", "blockwise, 4 a row, forward and gradients", "jax.nn causal, forward"):
        assert named[what]["TFLOP_a_s"] > 0
    assert [row["part"] for row in rows if row["what"] == "the whole part"] == ["attention", "torch"]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_a_part_that_takes_too_long_ends_and_the_next_has_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "LIMITS", {"products": 0.1})
    assert accelerator.main(["--tiny", "--parts", "products", "torch", "--json", str(tmp_path / "rows")]) == 1
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert [(row["part"], row["failed"]) for row in rows if "failed" in row] == [("products", "more than 0 s")]
    assert rows[-1]["part"] == "torch"


def test_the_stack_and_the_steps_of_an_accelerator_give_rates_and_the_same_hashes(capsys):
    whole_models.stack(accelerator.Options(tiny=True, experts=("grouped_blocks",)))
    whole_models.again(accelerator.Options(tiny=True, experts=()))
    whole_models.again(accelerator.Options(tiny=True, experts=()))
    *stack, first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["what"].split(", ", 2)[2] for row in stack] == [
        f"{documents} a row, forward{more}" for documents in (1, 4) for more in ("", " and gradients")
    ]
    assert all(row["TFLOP_a_s"] > 0 for row in [*stack, first])
    assert first["state"] == second["state"]
    assert first["losses"] == second["losses"]
