"""Benchmarks run and say what they should, at sizes that measure nothing."""

import json

import pytest

from benchmarks import layer_stack, moe_layer


def rows_of(capsys) -> list[dict]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_an_expert_layer_is_compared_with_a_dense_one(capsys, backend):
    sizes = ["--tokens", "24", "--d-model", "8", "--layers", "4x16", "--rounds", "2"]
    moe_layer.main([*sizes, "--backends", backend])
    rows = rows_of(capsys)
    kinds = ("dense", backend, f"{backend} products")
    assert [(row["layer"], row["work"]) for row in rows] == [(k, w) for k in kinds for w in ("forward", "gradients")]
    assert all(row["of_dense"] > 0 for row in rows)


def test_a_stack_of_layers_is_compared_with_a_dense_product(capsys):
    sizes = "--layers 2 --rows 2 --seq-len 32 --d-model 16 --d-ff 24 --heads 4 --kv-heads 2 --head-dim 8 --experts 4"
    layer_stack.main([*sizes.split(), *["--packed", "10", "--dtype", "float32", "--remat", "full", "--rounds", "2"]])
    rows = rows_of(capsys)
    assert [row["work"] for row in rows] == ["dense product", "forward", "forward and gradients"]
    assert rows[0]["of_dense"] == 1
    assert all(row["tflops_a_second"] > 0 for row in rows)
    assert rows[0]["mfu"] is None  # the table has no peak of a CPU
