"""`python -m mixtral_jax generate` as a person calls it."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from mixtral_jax import verbs
from mixtral_jax.config import UserError
from mixtral_jax.serving import serve as serve_module
from mixtral_jax.serving.app import make_app
from tests import small_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained() -> str:
    return str(small_run.trained() / "run")


def test_one_prompt_is_continued_as_the_json_says(trained, tmp_path, capsys):
    options = ["--max-new-tokens", "20", "--json", str(tmp_path / "g.json")]
    verbs.generate([trained, "the river", *options])
    (found,) = json.loads((tmp_path / "g.json").read_text())["texts"]
    assert capsys.readouterr().out.endswith(f"the river{found['text']}\n")
    assert len(found["tokens"]) == len(found["log_probs"]) <= 20
    assert all(value <= 0 for value in found["log_probs"])
    assert found["finish_reason"] in ("stop", "length")


def test_weights_are_held_in_fewer_bits(trained, tmp_path, capsys):
    found = {}
    for weights in ("float32", "bfloat16", "int8"):
        options = ["--weights", weights, "--max-new-tokens", "9", "--json", str(tmp_path / "g.json")]
        verbs.generate([trained, "the river", *options])
        (text,) = json.loads((tmp_path / "g.json").read_text())["texts"]
        found[weights] = text["log_probs"][0]
        assert capsys.readouterr().err.startswith(f"weights in {weights}: 0.00 GB, in the checkpoint 0.00 GB")
    assert len(set(found.values())) == 3
    assert max(found.values()) - min(found.values()) < 0.1


def test_a_server_holds_its_weights_in_eight_bits_too(trained, tmp_path, monkeypatch, capsys):
    few = ["--max-new-tokens", "9"]
    verbs.generate([trained, "the river", "--weights", "int8", "--json", str(tmp_path / "g.json"), *few])
    (expected,) = json.loads((tmp_path / "g.json").read_text())["texts"]

    def ask(service, listener, drain_seconds):
        body = {"prompt": "the river", "max_tokens": 9, "temperature": 0, "logprobs": 0}
        with TestClient(make_app(service)) as client:
            found.update(client.post("/v1/completions", json=body).json()["choices"][0])

    found: dict = {}
    monkeypatch.setattr(serve_module, "run", ask)
    verbs.serve([trained, "--port", "0", "--weights", "int8", "--max-concurrency", "1"])
    assert capsys.readouterr().err.count("weights in int8: 0.00 GB") == 2
    assert found["text"] == expected["text"]
    np.testing.assert_allclose(found["logprobs"]["token_logprobs"], expected["log_probs"], atol=1e-5)


def test_prompts_do_not_see_each_other(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("the river\nold trees were under a stone and\n\nlight\n")
    warm = ["--max-new-tokens", "12", "--temperature", "1", "--seed", "3"]
    verbs.generate([trained, "--prompts", str(tmp_path / "prompts.txt"), "--json", str(tmp_path / "all.json"), *warm])
    for number, found in enumerate(json.loads((tmp_path / "all.json").read_text())["texts"]):
        verbs.generate([trained, found["prompt"], "--json", str(tmp_path / f"{number}.json"), *warm])
        (alone,) = json.loads((tmp_path / f"{number}.json").read_text())["texts"]
        assert (alone["text"], alone["tokens"]) == (found["text"], found["tokens"])
    assert number == 2


def test_standard_input_is_a_prompt_and_a_chat_is_answered(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the river = a\n"))
    verbs.generate([trained, "--chat", "--system", "Be brief.", "--max-new-tokens", "1", "eval.context=128"])
    assert capsys.readouterr().out.startswith("the river = a\n")


def test_standard_input_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    with pytest.raises(UserError, match=r"cannot read standard input: .* in position 1: .*; give text in UTF-8"):
        verbs.generate(["x"])


def test_nothing_is_written_where_one_of_several_prompts_is_too_long(trained, tmp_path, capsys):
    for prompts in (["the stone " * 40], [*["the river"] * 40, "the stone " * 40]):
        with pytest.raises(UserError, match="do not fit the context of 32"):
            verbs.generate([trained, *prompts, "--max-new-tokens", "2", "--json", str(tmp_path / "g.json")])
    assert (capsys.readouterr().out, list(tmp_path.iterdir())) == ("", [])


def test_released_weights_are_imported_for_the_occasion(trained, tmp_path, capsys):
    verbs.export([trained, str(tmp_path / "release"), "--format", "hf"])
    found = []
    for source in (trained, str(tmp_path / "release")):
        capsys.readouterr()
        verbs.generate([source, "old trees", "--max-new-tokens", "9", "--json", str(tmp_path / "g.json")])
        said = capsys.readouterr()
        assert said.out.startswith("old trees")
        assert "init_from" not in said.err  # the import is gone by then
        found += json.loads((tmp_path / "g.json").read_text())["texts"]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.json", "release"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["x", "--temperature", "-1"], "temperature is -1.0"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["x", "--max-new-tokens", "500"], "do not fit the context of 32"),
        (["", "--max-new-tokens", "5"], "nothing to continue"),
        (["a\udcff"], "prompt: character 2 is not valid Unicode"),
        (["x", "--system", "y"], "add --chat"),
        (["x", "--prompts", "nowhere.txt"], "cannot read the prompts in nowhere.txt"),
        (["x", "model.dispatch=capacity"], "set it to dropless"),
    ],
)
def test_a_mistake_is_one_sentence(trained, arguments, sentence):
    with pytest.raises(UserError) as error:
        verbs.generate([trained, *arguments])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere"):
        verbs.generate([str(tmp_path / "nowhere"), "x"])
