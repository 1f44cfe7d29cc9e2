"""Every mode of eval.py, and `compare`, from the command line to files, on eight devices."""

import importlib.util
import json
import re
from pathlib import Path
from unittest.mock import Mock

import matplotlib.image
import numpy as np
import pytest

from mixtral_jax import verbs
from mixtral_jax.config import UserError
from mixtral_jax.config_loading import parse_config
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.data.tokenizer_training import train_model
from mixtral_jax.evaluation import compare, modes, pictures
from mixtral_jax.evaluation.perplexity import Evaluation, Result, difference
from tests.evaluation.checkpoint import make_run

ROOT = Path(__file__).parents[2]


def eval_module():
    spec = importlib.util.spec_from_file_location("eval_script", ROOT / "eval.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eval_script(*arguments: object) -> None:
    eval_module().main([str(argument) for argument in arguments])


def test_the_script_names_the_modes():
    assert set(eval_module().MODES) == {*modes.MODES, "tasks"}


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*out\.json: there is no such directory"):
        eval_script("no run", "--json", tmp_path / "none" / "out.json")
    with pytest.raises(UserError, match=r"cannot draw into .*file: it is a file; give another directory"):
        eval_script("no run", "--plots", tmp_path / "file")


def test_tasks_may_be_followed_by_overrides(run, tmp_path):
    long = {"query": "the", "choices": ["old river " * 5, "old"], "gold": 0}
    (tmp_path / "task.jsonl").write_text(json.dumps(long) + "\n")
    arguments = ["--tasks", tmp_path / "task.jsonl", "--json", tmp_path / "out.json"]
    with pytest.raises(
        UserError, match=r"a continuation is [34]\d tokens long and the context is 32: raise eval.context"
    ):
        eval_script(run, *arguments, "eval.context=32")
    assert not (tmp_path / "out.json").exists()
    eval_script(run, *arguments, "eval.context=48")
    (task,) = json.loads((tmp_path / "out.json").read_text())["tasks"].values()
    assert (task["samples"], task["trained_on"]) == (1, 0)
    assert list(task["metrics"]) == ["acc", "acc_norm"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("broken"), broken=True)


def measured(tmp_path, *arguments):
    eval_script(*arguments, "--json", tmp_path / "out.json", "--plots", tmp_path / "plots")
    for picture in (tmp_path / "plots").glob("*.png"):
        assert matplotlib.image.imread(picture).std() > 0.01, f"{picture} is blank"
    return json.loads((tmp_path / "out.json").read_text()), {path.name for path in (tmp_path / "plots").iterdir()}


def test_perplexity_is_the_mode_without_a_name(run, tmp_path, capsys):
    numbers, pictures = measured(tmp_path, run)
    assert list(numbers["sources"]) == ["one", "two"]
    assert numbers["total"]["tokens"] == sum(source["tokens"] for source in numbers["sources"].values())
    low, high = numbers["total"]["intervals"]["perplexity"]
    assert low < numbers["total"]["perplexity"] < high
    model = (run / "checkpoints" / "2" / "tokenizer.model").read_bytes()
    assert (numbers["checkpoint_step"], numbers["tokenizer"]) == (2, Tokenizer(model).fingerprint)
    assert pictures == {"perplexity.png"}
    assert "8 x cpu (fsdp 8)" in capsys.readouterr().out


def test_the_checkpoints_record_says_what_is_held_out(run, tmp_path):
    source = run.parent / "one.jsonl"
    (tmp_path / "moved.jsonl").write_text(source.read_text() + '{"text": "one more"}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "river stone"}\n{"text": "light field"}\n')
    sources = ", ".join(f"{{name: {name}, path: {tmp_path}/{name}.jsonl}}" for name in ("moved", "other"))
    numbers, _ = measured(tmp_path, run, "seed=1", "data.holdout=0.5", f"data.sources=[{sources}]")
    expected, _ = measured(tmp_path, run)
    found, own = numbers["sources"], expected["sources"]["one"]
    assert (found["moved"]["text"], found["moved"]["documents"]) == ("held-out", own["documents"])
    assert found["moved"]["perplexity"] == own["perplexity"]
    assert (found["other"]["text"], found["other"]["documents"], found["other"]["trained_share"]) == (
        "other text",
        2,
        0,
    )


def test_context(run, tmp_path):
    numbers, pictures = measured(tmp_path, run, "context", "eval.max_tokens=2000")
    for source in numbers["sources"].values():
        assert [entry["context"] for entry in source["by_context"]] == [16, 32, 64]
        assert source["by_position"][-1]["last"] == 64
        assert all(entry["interval"][0] < entry["nats_per_token"] for entry in source["by_context"])
    assert pictures == {"context.png"}


def test_passkey(run, tmp_path):
    numbers, pictures = measured(tmp_path, run, "passkey", "eval.context=256", "eval.batch_size=64")
    assert numbers["lengths"] == [256]
    assert np.shape(numbers["accuracy"]) == np.shape(numbers["nats_per_token"]) == (1, 9)
    assert pictures == {"passkey.png"}


def test_routing(run, tmp_path):
    numbers, pictures = measured(tmp_path, run, "routing")
    for source in numbers["sources"].values():
        shares = np.array(source["shares_by_choice"])
        assert shares.shape == (2, 2, 4)
        np.testing.assert_allclose(shares.sum(axis=-1), 1)
        for shares in source["specialisation"]:
            assert sum(shares) == pytest.approx(2)  # experts a token
        np.testing.assert_allclose(np.diagonal(source["coactivation"], axis1=1, axis2=2), 1)
    assert len(numbers["vocabulary"]) == 2
    assert sum(path["share"] for path in numbers["paths"]["most_frequent"]) == pytest.approx(1)
    kinds = ("shares", "repeats", "load", "text", "together", "sources", "vocabulary", "paths")
    assert pictures == {*(f"routing_{kind}.png" for kind in kinds), "routing.html"}
    assert "<h2>two</h2>" in (tmp_path / "plots" / "routing.html").read_text(encoding="utf-8")


def test_ablation(run, tmp_path):
    numbers, pictures = measured(tmp_path, run, "ablation", "eval.max_tokens=300")
    assert [(each["layer"], each["expert"]) for each in numbers["without"]] == [
        (i, j) for i in (0, 1) for j in range(4)
    ]
    assert all(
        each["changes"][name]["bits_per_byte"] for each in numbers["without"] for name in ("one", "two", "total")
    )
    assert pictures == {"ablation.png"}


def test_saturation(run, tmp_path):
    numbers, pictures = measured(tmp_path, run, "saturation", "eval.max_tokens=300")
    early, late = numbers["checkpoints"]
    assert (early["step"], late["step"]) == (1, 2)
    assert late["saturation"] == [1, 1]
    assert 0.5 < min(early["saturation"]) <= max(early["saturation"]) <= 1
    assert pictures == {"saturation.png"}


def test_compare(run, tmp_path, capsys):
    arguments = [run, run / "checkpoints" / "1", "--json", tmp_path / "out.json", "--plots", tmp_path / "plots"]
    verbs.VERBS["compare"]([str(argument) for argument in arguments])
    numbers = json.loads((tmp_path / "out.json").read_text())
    first, second = numbers["runs"]
    assert (first["facts"]["step"], second["facts"]["step"]) == (2, 1)
    assert (first["facts"]["training tokens"], second["facts"]["training tokens"]) == (800, 400)  # as was recorded
    assert (first["facts"]["training nats/token"], second["facts"]["training nats/token"]) == (3.0, 4.0)
    for name in ("one", "two"):
        found = numbers["differences"][name]
        expected = second["sources"][name]["bits_per_byte"] - first["sources"][name]["bits_per_byte"]
        assert found["bits_per_byte"] == pytest.approx(expected)
        assert found["interval"][0] <= found["bits_per_byte"] <= found["interval"][1]
    assert matplotlib.image.imread(tmp_path / "plots" / "compare.png").std() > 0.01
    assert "B - A" in capsys.readouterr().out


def test_a_difference_is_paired_only_on_the_same_documents():
    rng = np.random.default_rng(0)
    sizes, nats = rng.integers(50, 90, 30), rng.normal(100, 30, 30)

    def result(nats, sizes):
        table = np.stack([np.full(30, 20.0), sizes, nats], axis=1)
        return Result(600, int(sizes.sum()), float(nats.sum()), (table,))

    close = difference(result(nats, sizes), result(nats + 1 + 0.01 * rng.normal(size=30), sizes))
    assert close.bits_per_byte == pytest.approx(30 / np.log(2) / sizes.sum(), rel=0.01)
    low, high = close.interval
    assert low < close.bits_per_byte < high < 1.3 * low  # the documents' own spread cancels
    assert difference(result(nats, sizes), result(nats, sizes[::-1])).interval is None


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["context", "routing"], "one mode at a time: context, routing"),
    (["routing", "--tasks", "x"], "one mode at a time: routing, tasks"),
    (["perplexty"], r"'perplexty' is neither a mode \(perplexity, .*, saturation, tasks\) nor key=value"),
    (["tasks"], "the mode tasks needs --tasks"),
    (["context", "eval.context=20000"], "source 'one' has no held-out document of 20,000 tokens, the longest has"),
    (["passkey"], "a context of 64 tokens is too short for a passkey"),
    (["--tasks", "none.jsonl"], "there is no task file none.jsonl"),
    (["routing", "data.sources=[{name: empty, path: EMPTY}]"], r"source .empty. .* holds no text: name files that do"),
    (["data.tokenizer=mixtral"], "data.tokenizer=mixtral has 32000 tokens but model.vocab_size is 320"),
])  # fmt: skip
def test_mistakes_are_one_sentence(run, tmp_path, arguments, sentence):
    (tmp_path / "empty.txt").write_text("")
    arguments = [argument.replace("EMPTY", str(tmp_path / "empty.txt")) for argument in arguments]
    with pytest.raises(UserError, match=sentence) as error:
        eval_script(run, *arguments, "--json", tmp_path / "out.json")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.json").exists()


def test_another_tokenizer_of_the_same_size_is_refused(run, tmp_path):
    text = json.loads((run / "checkpoints" / "2" / "meta.json").read_text())["config"]
    data = parse_config(text, [f"data.sources=[{{name: one, path: {run.parent}/one.jsonl}}]"]).data
    other = tmp_path / "other.model"
    other.write_bytes(train_model(data, 300))
    with pytest.raises(UserError, match=re.escape(f"data.tokenizer={other} is not the tokenizer of {run}: leave")):
        eval_script(run, f"data.tokenizer={other}")


@pytest.mark.parametrize("mode", [["perplexity"], ["passkey", "eval.context=256"]])
def test_a_model_that_diverged_is_named_never_averaged(broken, mode):
    with pytest.raises(UserError, match=r"is nan in .*: its parameters have diverged, so evaluate an earlier"):
        eval_script(broken, *mode)


def test_compare_names_what_each_of_two_models_was_measured_on(monkeypatch, tmp_path):
    sides = [
        Mock(compare.Side, path=name, evaluation=Evaluation({name: Result(5, 9, nats)}, "packed", 8, 8), texts=[],
             history=[], step_tokens=1.0)
        for name, nats in (("a", 9.0), ("b", 18.0))
    ]  # fmt: skip
    table = compare._perplexity_table(sides, {})
    assert list(table.columns[0].cells) == ["a", "b", "total"]
    drawn = []
    monkeypatch.setattr(compare, "save", lambda figure, path: drawn.append(figure))
    compare._draw(sides, tmp_path / "compare.png")
    axes = drawn[0].axes[3]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "total"]
    heights = [[(round(bar.get_x() + 0.18), bar.get_height() * np.log(2)) for bar in bars] for bars in axes.containers]
    assert heights == [[(0, pytest.approx(1)), (2, pytest.approx(1))], [(1, pytest.approx(2)), (2, pytest.approx(2))]]


def test_places_on_an_axis_are_numbers(run, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: (written.append(figure), figure.savefig(path)))
    measured(tmp_path, run, "context", "eval.max_tokens=2000")
    labels = [label.get_text() for axes in written[0].axes for label in axes.get_xticklabels()]
    assert labels
    assert all(float(label.replace(",", "")) > 0 for label in labels)
