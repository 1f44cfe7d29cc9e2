"""A small run that knows its training text by heart: by its losses it is seen what was really held out."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.config_loading import load_config, parse_config, to_yaml
from mixtral_jax.data.splits import Documents
from mixtral_jax.data.token_cache import prepared_key
from mixtral_jax.evaluation import compare
from mixtral_jax.evaluation.loading import LoadedModel, load_model
from mixtral_jax.evaluation.perplexity import measure
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.evaluation.texts import describe, evaluation_texts, notes
from mixtral_jax.runs.checkpoint import find_checkpoint
from mixtral_jax.training.trainer import Trainer
from tests.small_run import WORDS, write_config

OVERRIDES = (
    "data.sources=[{name: notes, path: notes.jsonl}]", "data={seq_len: 64, holdout: 0.2}", "model.num_layers=1",
    "mesh={data: 8, fsdp: 1}", "train={steps: 100, batch_size: 8, log_every: 100, eval_every: 0}",
    "checkpoint.every=1000", "optimizer.learning_rate=1.5e-2",
)  # fmt: skip
KNOWN, NEW = 1.0, 2.5  # nats per token of what was trained on and of what was not: below and above


def document(number: int) -> str:
    return " ".join(np.random.default_rng(number).choice(WORDS, 20))


def write(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


OWN, OTHER = [document(number) for number in range(24)], [document(number) for number in range(100, 120)]


@dataclasses.dataclass
class Run:
    """The run, and what it knows and does not know."""

    place: Path
    loaded: LoadedModel
    score: object
    known: list[str]
    held_out: list[str]

    def texts(self, documents: Documents) -> list[str]:
        indices = range(documents.num_documents)
        return [self.loaded.tokenizer.decode(documents.tokens(index)).strip() for index in indices]

    def nats(self, documents: Documents) -> float:
        """Nats per token of documents."""
        return measure(self.score, [documents], self.loaded.config.eval, 64).total.nats_per_token

    def with_(self, *overrides: str) -> LoadedModel:
        """The model as `eval.py RUN OVERRIDES` loads it."""
        config = parse_config(to_yaml(self.loaded.config), list(overrides))
        return dataclasses.replace(self.loaded, config=config)


def trainer(place: Path, *overrides: str, say=lambda text: None) -> Trainer:
    return Trainer(load_config(place / "config.yaml", [*OVERRIDES, *overrides]), say=say)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run, whose paths are relative to the directory that it was started in."""
    place = tmp_path_factory.mktemp("held_out")
    write_config(place)
    write(place / "notes.jsonl", OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        outcome = trainer(place).run()
        loaded = load_model("run", [])
    run = Run(place, loaded, make_scorer(loaded.architecture)(loaded.arrays), [], [])
    run.known, run.held_out = run.texts(outcome.text.training[0]), run.texts(outcome.text.held_out[0])
    assert sorted(run.known + run.held_out) == sorted(OWN)
    assert 3 <= len(run.held_out) <= 6
    assert run.nats(outcome.text.training[0]) < KNOWN
    assert run.nats(outcome.text.held_out[0]) > NEW
    return run


@pytest.fixture
def run(finished, monkeypatch):
    """The same, with its source as it was, in its directory."""
    write(finished.place / "notes.jsonl", OWN)
    monkeypatch.chdir(finished.place)
    return finished


SOURCE = "data.sources=[{{name: notes, path: {}}}]"
CASES = {
    "as it was": ([], OWN),
    "another seed": (["seed=1"], OWN),
    "spelled otherwise": ([SOURCE.format("./notes.jsonl")], OWN),
    "another share": (["data.holdout=0.5"], OWN),
    "lines appended": ([], [*OWN, "a new quiet line", "and an old one", "under the stone"]),
    "half deleted": ([], OWN[:12]),
    "renamed": ([SOURCE.format("renamed.jsonl")], OWN),
    "linked": ([SOURCE.format("linked.jsonl")], OWN),
    "all at once": (["seed=2", "data.holdout=0.3", SOURCE.format("renamed.jsonl")], OWN[::-1]),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_was_trained_on_is_measured_as_held_out(run, case):
    overrides, documents = CASES[case]
    write(run.place / "notes.jsonl", documents)
    for name, make in (("renamed", shutil.copy), ("linked", os.symlink)):
        (run.place / f"{name}.jsonl").unlink(missing_ok=True)
        make(run.place / "notes.jsonl", run.place / f"{name}.jsonl")
    (text,) = evaluation_texts(run.with_(*overrides))
    assert text.kind == "held-out"
    assert sorted(run.texts(text.documents)) == sorted(set(run.held_out) & set(documents))
    assert run.nats(text.documents) > NEW
    assert describe(text) == ""


def test_another_file_of_the_name_is_other_text_and_is_measured_whole(run, monkeypatch):
    write(run.place / "far" / "notes.jsonl", OTHER)
    monkeypatch.chdir(run.place / "far")
    (text,) = evaluation_texts(run.with_())
    assert (text.kind, run.texts(text.documents), text.trained_share) == ("other text", OTHER, 0.0)
    assert run.nats(text.documents) > NEW
    assert describe(text) == "other text"


def test_text_that_overlaps_training_is_told_with_its_share(run):
    write(run.place / "mixed.jsonl", [*run.known[:10], *OTHER[:10]])
    (text,) = found = evaluation_texts(run.with_(SOURCE.format("mixed.jsonl")))
    assert (text.kind, run.texts(text.documents)) == ("other text", OTHER[:10])
    assert text.trained_share == pytest.approx(0.5, abs=0.03)
    assert run.nats(text.documents) > NEW
    (line,) = notes(found, run.loaded.record)
    assert line == f"notes: other text; {text.trained_share:.1%} of it was trained on and is left out"
    write(run.place / "mixed.jsonl", run.known)
    (text,) = evaluation_texts(run.with_(SOURCE.format("mixed.jsonl")))
    assert (text.kind, text.trained_share) == ("training text", 1.0)
    assert run.nats(text.documents) < KNOWN


def test_a_prepared_source_that_was_never_trained_on_is_measured_whole(run):
    write(run.place / "other.jsonl", OTHER)
    (text,) = evaluation_texts(run.with_(SOURCE.format("other.jsonl")))
    cache = next(file.parent for file in (run.place / "cache").glob("tokens-*/index.json")
                 if json.loads(file.read_text())["content"] in text.documents.fingerprint)  # fmt: skip
    shutil.copytree(cache, run.place / "prepared")
    index = json.loads((cache / "index.json").read_text()) | {"key": prepared_key(run.loaded.tokenizer)}
    (run.place / "prepared" / "index.json").write_text(json.dumps(index))
    sources = "data.sources=[{name: notes, path: notes.jsonl}, {name: second, prepared: prepared}]"
    own, second = evaluation_texts(run.with_(sources))
    assert own.kind == "held-out"
    assert (second.kind, run.texts(second.documents), second.trained_share) == ("other text", OTHER, 0.0)


def test_a_run_that_begins_from_it_holds_out_nothing_that_it_knew(run):
    said: list[str] = []
    child = trainer(
        run.place, "init_from=run", "run_dir=child", "seed=1", "data.holdout=0.5", "train={steps: 1, eval_every: 1}",
        "optimizer={learning_rate: 1e-9, warmup_steps: 0}", say=said.append,
    )  # fmt: skip
    outcome = child.run()
    assert "parameters from step 100 of run" in said
    assert set(run.texts(outcome.text.held_out[0])) <= set(run.held_out)
    logged = [json.loads(line) for line in Path("child/metrics.jsonl").read_text().splitlines()]
    (entry,) = (entry for entry in logged if "heldout/notes" in entry)
    assert (
        entry["heldout/notes"] == pytest.approx(run.nats(outcome.text.held_out[0]), rel=1e-4) == entry["heldout/total"]
    )
    assert entry["heldout/notes"] > NEW
    # The child's checkpoint goes on knowing what its parent was trained on.
    write(run.place / "mixed.jsonl", [*run.known[:10], *OTHER[:10]])
    checkpoints, step = find_checkpoint(Path("child"))
    of_child = dataclasses.replace(run.with_(SOURCE.format("mixed.jsonl")), record=checkpoints.read_record(step))
    (text,) = evaluation_texts(of_child)
    assert run.texts(text.documents) == OTHER[:10]


def test_compare_says_what_its_texts_are_to_each_model(run, monkeypatch):
    write(run.place / "mixed.jsonl", [*run.known[:10], *OTHER[:10]])
    without = dataclasses.replace(run.loaded, record=None)

    def load(path, overrides):
        config = run.with_(*overrides).config
        return dataclasses.replace(run.loaded if path == "run" else without, config=config)

    monkeypatch.setattr(compare, "load_model", load)
    monkeypatch.setattr(LoadedModel, "score", property(lambda loaded: run.score))
    report = compare.compare_runs("run", "unknown", [SOURCE.format("mixed.jsonl")])
    first, second = (side["sources"]["notes"] for side in report.numbers["runs"])
    assert (first["text"], first["documents"], second["text"], second["documents"]) == ("other text", 10, "unknown", 20)
    assert first["trained_share"] == pytest.approx(0.5, abs=0.03)
    assert second["trained_share"] is None
    assert first["nats_per_token"] > NEW > second["nats_per_token"]
    assert [note[:30] for note in report.notes] == ["A: notes: other text; " + report.notes[0][22:30],
                                                    "B: this checkpoint keeps no re"]  # fmt: skip
    assert report.numbers["differences"]["notes"].interval is None  # other documents
