"""Tasks from JSONL files on a made-up model of the harness, and our model class on a checkpoint."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from rich.console import Console

from mixtral_jax import verbs
from mixtral_jax.config import UserError
from mixtral_jax.evaluation.harness import MixtralJax
from mixtral_jax.evaluation.loading import load_model
from mixtral_jax.evaluation.tasks import jsonl_task, measure_tasks, run_tasks, tasks_table
from mixtral_jax.evaluation.texts import evaluation_texts
from tests.evaluation.checkpoint import make_run


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


class Speller(LM):
    """Likes short continuations after short contexts, and continues every text with `yes`."""

    def loglikelihood(self, requests):
        return [(-float(len(r.args[0]) + len(r.args[1])), r.args[1] == " b") for r in requests]

    def loglikelihood_rolling(self, requests):
        return [-2.0 * len(r.args[0].split()) for r in requests]

    def generate_until(self, requests):
        return ["yes" for _ in requests]


def test_each_form_is_the_task_it_says(tmp_path, monkeypatch, capfd):
    names = [
        write(tmp_path / "choice.jsonl", [
            {"query": "q", "choices": ["aaa", "b", "cc"], "gold": 1},
            {"query": "q", "choices": ["aaa", "b"], "gold": 0},
            {"query": "q", "choices": ["dd", "e"], "gold": 1, "comment": "left out"},
        ]),
        write(tmp_path / "schema.jsonl", [
            {"context_options": ["long context", "short"], "continuation": "x", "gold": 1},
            {"context_options": ["long context", "short"], "continuation": "x", "gold": 0},
        ]),
        write(tmp_path / "ends.jsonl", [{"context": "a", "continuation": "b"}, {"context": "a", "continuation": "cc"}]),
        write(tmp_path / "answers.jsonl", [{"query": "q", "answer": "Yes"}, {"query": "q", "answer": "no"}]),
        write(tmp_path / "texts.jsonl", [{"text": "one two three"}, {"text": "one"}]),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    results = run_tasks(Speller(), names)
    assert "fatal" not in capfd.readouterr().err  # git, outside of a repository
    value = lambda task, metric: results[task]["metrics"][metric]["value"]  # noqa: E731
    assert value("choice", "acc") == pytest.approx(2 / 3)
    assert value("schema", "acc") == 0.5
    assert value("ends", "acc") == 0.5
    assert value("answers", "exact_match") == 0.5
    assert value("texts", "word_perplexity") == pytest.approx(7.389, abs=1e-3)  # e^2: two nats a word
    assert [results[task]["samples"] for task in results] == [3, 2, 2, 2, 2]
    assert results["choice"]["metrics"]["acc"]["stderr"] > 0
    json.dumps(results, allow_nan=False)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(tasks_table(results))
    assert re.search(r"schema +│ +2 │ +acc │ +0\.5000", capture.get())


@pytest.mark.parametrize(("content", "sentence"), [
    ("", "has no records: give it at least one line"),
    ("\n", "has no records"),
    ("[1]\n", "line 1 of .* is not a JSON object: fix or remove it"),
    ('{"text": "a"}\nnonsense\n', "line 2 of .* is not a JSON object"),
    ('{"question": "a"}\n', "line 1 of .* has the fields question: it needs query, choices, gold; context_options"),
    ('{"text": "a"}\n{"query": "a"}\n', "line 2 of .* has the fields query: it needs text$"),
])  # fmt: skip
def test_a_bad_file_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "task.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence):
        jsonl_task(tmp_path / "task.jsonl")


def test_files_and_names_that_are_not_there():
    with pytest.raises(UserError, match=r"there is no task file none\.yaml: name a JSONL or YAML file"):
        run_tasks(Speller(), ["none.yaml"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    assert get_model("mixtral_jax") is MixtralJax
    return MixtralJax(load_model(str(run), ["eval.batch_size=4"], packed=False))


def test_model_args_reach_the_configuration(model, tmp_path):
    run = model.loaded.config.run_dir
    made = MixtralJax.create_from_arg_string(f"checkpoint={run},max_length=32,eval.batch_size=3,add_bos_token=False")
    assert (made.max_length, made.loaded.config.eval.batch_size) == (32, 3)
    assert made.tok_encode("river") == model.tok_encode("river")[1:]
    with pytest.raises(UserError, match="needs --model_args checkpoint=RUN_OR_CHECKPOINT"):
        MixtralJax.create_from_arg_obj({})


def test_every_kind_of_request_on_a_checkpoint(model, tmp_path):
    names = [
        write(tmp_path / "choice.jsonl", [{"query": "the river", "choices": ["and", "stone"], "gold": 0}] * 3),
        write(tmp_path / "texts.jsonl", [{"text": "the old trees " * 40}]),
        write(tmp_path / "answers.jsonl", [{"query": "the old", "answer": "trees"}] * 2),
    ]
    results = run_tasks(model, names)
    assert results["choice"]["metrics"]["acc"]["value"] in (0.0, 1.0)
    assert results["texts"]["metrics"]["bits_per_byte"]["value"] > 0


def test_what_does_not_fit_the_context_is_one_sentence(model, tmp_path):
    long = write(tmp_path / "long.jsonl", [{"context": "the", "continuation": " old trees" * 60}])
    with pytest.raises(UserError, match=r"a continuation is \d+ tokens long and the context is 64: raise eval.context"):
        run_tasks(model, [long])
    yaml = tmp_path / "generate.yaml"
    data = write(tmp_path / "data.jsonl", [{"query": "q", "answer": "a"}])
    yaml.write_text(
        f"task: generate\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: query\ndoc_to_target: answer\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 64}\nmetric_list: [{metric: exact_match}]\n"
    )
    with pytest.raises(UserError, match=r"a task asks for 64 new tokens and the context is 64: raise"):
        run_tasks(model, [str(yaml)])


def test_samples_that_were_trained_on_are_counted(model, tmp_path, monkeypatch):
    loaded = model.loaded
    monkeypatch.setattr("mixtral_jax.evaluation.harness.MixtralJax", lambda loaded: Speller())
    lines = (Path(loaded.config.run_dir).parent / "one.jsonl").read_text().splitlines()
    held_out = evaluation_texts(loaded)[0].documents
    left = {loaded.tokenizer.decode(held_out.tokens(index)).strip() for index in range(held_out.num_documents)}
    documents = [json.loads(line)["text"] for line in lines]
    known = [text for text in documents if text not in left]
    assert min(len(known), len(left)) >= 4
    asked = [*known[:3], *sorted(left)[:2], "something else"]
    whole = write(tmp_path / "whole.jsonl", [{"text": text} for text in asked])
    # In two parts that the model is asked as one.
    parts = write(tmp_path / "parts.jsonl", [
        {"query": text[:place], "choices": [text[place + 1 :], "x"], "gold": 0}
        for text in asked
        for place in [text.index(" ", 8)]
    ])  # fmt: skip
    found = measure_tasks(loaded, [whole, parts])
    assert [found[task]["trained_on"] for task in ("whole", "parts")] == [3, 3]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(tasks_table(found))
    assert capture.get().count("3 in training") == 2
    unknown = dataclasses.replace(loaded, record=None)
    assert measure_tasks(unknown, [whole])["whole"]["trained_on"] is None


def test_a_task_that_the_harness_does_not_know_is_one_sentence(monkeypatch):
    def refuse():
        raise ValueError("Tasks not found: nothere")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    with pytest.raises(UserError, match=r"^tasks not found: nothere; see lm_eval ls tasks$"):
        verbs.lm_eval(["--tasks", "nothere"])
