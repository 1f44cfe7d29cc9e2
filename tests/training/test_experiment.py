"""Experiments: a file names runs, which go on where they were killed, are skipped when done, and end in one table."""

import dataclasses
import json
import re

import jax
import matplotlib.image
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.evaluation import experiments
from mixtral_jax.evaluation.experiment_file import choose, load_experiment
from mixtral_jax.evaluation.experiments import Seed, outcome
from mixtral_jax.evaluation.intervals import mean_interval
from mixtral_jax.metrics import flops_per_token, parameter_counts
from mixtral_jax.training.trainer import Trainer
from mixtral_jax.verbs import VERBS
from tests.imports import ROOT
from tests.small_run import write_config

FILE = """
base: config.yaml
run_dir: {directory}/runs
seeds: [0, 7]
overrides: [train.steps=4, train.eval_every=2, checkpoint.every=2, model.num_layers=1, train.batch_size=2]
variants:
  mixture: []
  dense: [model.num_experts=1, model.num_experts_per_tok=1, model.d_ff=64]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experiment")
    write_config(directory)
    (directory / "file.yaml").write_text(FILE.format(directory=directory))
    return directory / "file.yaml"


def experiment(*words: object) -> None:
    VERBS["experiment"]([str(word) for word in words])


@pytest.mark.slow
def test_runs_go_on_where_they_were_killed_and_what_is_done_is_skipped(file, tmp_path, monkeypatch, capsys):
    begun = []
    step, run = Trainer._report, Trainer.run

    def killed(self, number, *others):
        if self.config.run_dir.endswith("mixture/7") and number == 3:
            raise KeyboardInterrupt
        step(self, number, *others)

    def watched(self):
        begun.append("/".join(self.config.run_dir.split("/")[-2:]))
        return run(self)

    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)  # for which less is compiled
    monkeypatch.setattr(Trainer, "run", watched)
    monkeypatch.setattr(Trainer, "_report", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment(file)
    monkeypatch.setattr(Trainer, "_report", step)
    capsys.readouterr()
    experiment(file, "--dry-run")
    out = capsys.readouterr().out
    states = dict(re.findall(r"(\w+/\d) .*(to do|to go on|done) +│\n", out))
    assert states == {"mixture/0": "done", "dense/0": "done", "mixture/7": "to go on", "dense/7": "to do"}
    experiment(file, "--json", tmp_path / "out.json", "--plots", tmp_path)
    assert begun == ["mixture/0", "dense/0", "mixture/7", "mixture/7", "dense/7"]
    out = capsys.readouterr().out
    assert "mixture/0 is done" in out
    assert "resumed from step 2" in out
    assert "not there yet" not in out
    numbers = json.loads((tmp_path / "out.json").read_text())["variants"]
    assert [*numbers] == ["mixture", "dense"]
    for found in numbers.values():
        assert set(found["held_out"]) == {"0", "7"}
        last = [each["heldout/total"] for each in found["held_out"].values()]
        assert found["nats_per_token"]["mean"] == pytest.approx(np.mean(last))
        assert found["tokens"] == 4 * 2 * 32
    assert numbers["mixture"]["active_parameters"] > 0
    assert matplotlib.image.imread(tmp_path / "experiment.png").std() > 0.01
    with pytest.raises(UserError, match=r"holds a run with optimizer.beta1=0.9, not 0.5"):
        experiment(file, "optimizer.beta1=0.5")


def test_a_variant_begins_where_another_of_the_same_seed_ends_and_not_before(file, tmp_path, monkeypatch):
    text = file.read_text().replace(f"run_dir: {file.parent}/runs", f"run_dir: {tmp_path}/runs")
    begins = f"  upcycled: ['init_from={tmp_path}/runs/dense/{{seed}}', model.d_ff=64]\n"
    (tmp_path / "config.yaml").write_text((file.parent / "config.yaml").read_text())
    (tmp_path / "file.yaml").write_text(text + begins)
    runs = load_experiment(tmp_path / "file.yaml", [])
    starts = [run.config.init_from for run in runs if run.variant == "upcycled"]
    assert starts == [f"{tmp_path}/runs/dense/0", f"{tmp_path}/runs/dense/7"]
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("nothing may begin"))
    with pytest.raises(UserError, match="upcycled/7 begins where dense/7 ends, which is not done: train that first"):
        experiment(tmp_path / "file.yaml", "--only", "upcycled/7")


def written(directory, runs, losses, others=()):
    """The logs of runs, as if they had been trained; of two sources, if `others` has the bits per byte of one."""
    for run, loss in zip(runs, losses, strict=True):
        place = directory / str(run)
        place.mkdir(parents=True)
        lines = [
            {"step": 2, "loss": 1.0, "tokens_per_second": 64.0, "load_balance_loss": 1.5, "dead_experts": 1.0},
            {"step": 2, "heldout/total": 9.0, "heldout/words": 9.0, "bits_per_byte/total": 9.0},
            {"step": 4, "heldout/total": loss, "heldout/words": loss, "bits_per_byte/total": loss and loss / 2},
        ]
        if others:
            lines[-1] |= {"bits_per_byte/words": loss / 2, "bits_per_byte/other": others[str(run)]}
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        dataclasses.replace(run, config=dataclasses.replace(run.config, run_dir=str(directory / str(run))))
        for run in runs
    ]


def test_numbers_are_those_worked_out_by_hand(file, tmp_path):
    runs = written(tmp_path, load_experiment(file, ["model.d_ff=32"]), [3.0, 2.5, 5.0, 4.7])
    found = outcome(runs).numbers["variants"]["dense"]
    assert found["nats_per_token"]["mean"] == pytest.approx(3.6)
    assert found["nats_per_token"]["spread"] == pytest.approx(1.1 * 2**0.5)
    assert found["nats_per_token"]["difference"] == pytest.approx(-0.4)
    half = 12.706204736 * 0.1  # Student's quantile of one degree of freedom times the mean's error
    assert found["nats_per_token"]["interval"] == pytest.approx((-0.4 - half, -0.4 + half))
    assert found["bits_per_byte"]["difference"] == pytest.approx(-0.2)
    assert found["seconds"] == 4 * 2 * 32 / 64
    assert found["flops"] == 4 * 2 * 32 * flops_per_token(runs[1].config.model, 32)
    assert found["held_out"][7]["heldout/words"] == 4.7
    assert found["curve"][7] == [(2 * 2 * 32, 9.0), (4 * 2 * 32, 4.7)]
    table = experiments._table({"short": {**found, "seconds": None}})  # of which no rate was logged
    assert str(next(iter(table.columns[2].cells))).endswith("no speed")


def test_sources_and_routers_have_tables_of_their_own(file, tmp_path):
    sources = f"data.sources=[{{name: words, path: {file.parent}/a}}, {{name: other, path: {file.parent}/b}}]"
    others = {"mixture/0": 2.0, "dense/0": 2.5, "mixture/7": 1.0, "dense/7": 1.7}
    report = outcome(written(tmp_path, load_experiment(file, [sources]), [3.0, 2.5, 5.0, 4.7], others))
    found = report.numbers["variants"]["dense"]["by_source"]
    assert found["other"]["mean"] == pytest.approx(2.1)
    assert found["other"]["difference"] == pytest.approx(0.6)
    assert found["words"]["difference"] == pytest.approx(-0.2)
    _, by_source, routers = report.tables
    assert list(zip(*(column.cells for column in by_source.columns[:2]), strict=True)) == [
        ("words", "mixture"), ("words", "dense"), ("other", "mixture"), ("other", "dense"),
    ]  # fmt: skip
    assert [list(column.cells) for column in routers.columns][:4] == [["mixture"], ["1.500"], [""], ["1.0"]]


def test_what_is_not_there_is_named_and_compared_by_the_seeds_that_are(file, tmp_path):
    runs = load_experiment(file, [])
    report = outcome(
        [*written(tmp_path, runs[:2], [3.0, 2.5]), *runs[2:]][:2]
        + [
            dataclasses.replace(run, config=dataclasses.replace(run.config, run_dir=str(tmp_path / "none")))
            for run in runs[2:]
        ]
    )
    assert report.notes == ["not there yet: mixture/7, dense/7"]
    found = report.numbers["variants"]["dense"]["nats_per_token"]
    assert (found["difference"], found["spread"], found["interval"]) == (-0.5, None, None)


def test_a_loss_that_is_not_finite_is_no_number(file, tmp_path):
    runs = written(tmp_path, load_experiment(file, []), [3.0, None, 5.0, 4.0])
    report = outcome(runs)
    found = report.numbers["variants"]["dense"]["nats_per_token"]
    assert (found["mean"], found["difference"], found["interval"]) == (None, None, None)
    json.dumps(report.numbers, allow_nan=False)


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 1, (400, 3))
    assert 0.92 < np.mean([low < 3 < high for low, high in map(mean_interval, draws)]) < 0.98
    assert mean_interval(draws[0][:1]) is None


def test_runs_come_seed_by_seed_and_one_can_be_chosen(file):
    runs = load_experiment(file, ["train.steps=8"])
    assert [str(run) for run in runs] == ["mixture/0", "dense/0", "mixture/7", "dense/7"]
    assert [run.config.train.steps for run in runs] == [8] * 4
    assert (runs[1].config.model.d_ff, runs[2].config.seed) == (64, 7)
    assert choose(runs, "2") == choose(runs, "mixture/7") == [runs[2]]
    assert choose(runs, None) == runs


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seeds: [0, 7]", "seeds: [0, 0]", r"seeds of .*file.yaml are \[0, 0\]: name at least one, and each once"),
        ("seeds: [0, 7]", "seeds: []", r"seeds of .* are \[\]"),
        ("seeds: [0, 7]", "", "seeds: a value is needed"),
        ("seeds: [0, 7]", "seeds: [a]", "seeds"),
        ("dense:", "../dense:", r"variant '../dense' of .* names a directory"),
        ("variants:", "model: {}\nvariants:", "there is no key 'model'; the keys are base, variants, seeds, overrides"),
        ("variants:", "variantz:", r"Did you mean: 'variants'"),
        ("eval_every=2", "eval_every=3", r"every train.eval_every=3 of 4 steps, and not at the end"),
        ("mixture: []", "mixture: [seed=3]", r"seed=3 is decided by the experiment"),
        ("mixture: []", "mixture: [train.stepz=3]", r"train.stepz: .* Did you mean"),
        ("config.yaml", "none.yaml", r"cannot read the config .*none.yaml"),
        ("mixture: []", "mixture: ['objective={name: preference, losses: [{name: sigmoid}]}']", "learns preferences"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(file, tmp_path, old, new, sentence):
    (tmp_path / "config.yaml").write_text((file.parent / "config.yaml").read_text())
    text = file.read_text()
    assert old in text
    (tmp_path / "file.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=sentence) as error:
        experiment(tmp_path / "file.yaml")
    assert "\n" not in str(error.value)


def test_mixtures_and_dense_models_of_the_shipped_experiments_do_equal_work_or_are_as_large():
    shipped = ROOT / "configs" / "experiments"
    runs = load_experiment(shipped / "mixture_or_dense.yaml", [])
    dense, mixture = (run.config for run in runs[:2])
    assert [run.variant for run in runs[:2]] == ["dense", "mixture"]
    for work in (lambda model: parameter_counts(model).active, lambda model: flops_per_token(model, 128)):
        assert 1 <= work(mixture.model) / work(dense.model) < 1.03  # the routers'
    assert mixture.train == dense.train
    dense, mixture, whole = (run.config for run in load_experiment(shipped / "languages.yaml", [])[:3])
    assert parameter_counts(whole.model).total / parameter_counts(mixture.model).total == pytest.approx(1, abs=0.003)
    assert dense.data == mixture.data == whole.data
    assert dense.train == mixture.train == whole.train


def test_finer_experts_and_the_ways_to_a_mixture_do_as_much_work_as_what_they_are_compared_with():
    shipped = ROOT / "configs" / "experiments"
    coarse, *finer = (run.config.model for run in load_experiment(shipped / "fine.yaml", [])[:3])
    for model in finer:
        assert 1 <= flops_per_token(model, 128) / flops_per_token(coarse, 128) < 1.03  # the routers'
        assert 1 <= parameter_counts(model).total / parameter_counts(coarse).total < 1.01
    runs = {run.variant: Seed(run.config, []) for run in load_experiment(shipped / "upcycling.yaml", [])[:6]}
    work = {name: run.step_flops * run.config.train.steps for name, run in runs.items()}
    for name in ("mixture", "dense_late", "mixture_late"):
        assert work[name] / work["dense"] == pytest.approx(1, abs=0.003)
    assert (work["half"] + work["upcycled"]) / work["dense"] == pytest.approx(1, abs=0.003)
    assert runs["upcycled"].config.init_from == runs["half"].config.run_dir


def test_a_run_that_is_not_there_cannot_be_chosen(file):
    with pytest.raises(
        UserError, match="there is no run 'dense/1': name one of mixture/0, dense/0, mixture/7, dense/7"
    ):
        experiment(file, "--only", "dense/1")
