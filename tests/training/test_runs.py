"""Whole runs, as a person starts them: killed, stopped, damaged and gone on with, and every mistake in one sentence."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import tensorstore

import eval as evaluation
import train
from mixtral_jax import verbs
from mixtral_jax.config import UserError
from mixtral_jax.config_loading import load_config
from mixtral_jax.runs.run_dir import RunDirectory
from mixtral_jax.training.trainer import Trainer
from tests.processes import Ended, Processes
from tests.small_run import ROOT, run, write_config

pytestmark = pytest.mark.slow
STEPS = 48
LONGER = (f"train.steps={STEPS}", "train.eval_every=24")
# What the devices of this process divide among themselves, which the started programs compute on one.
HERE = ("mesh.fsdp=4", "mesh.tensor=2")


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(e["step"], e["loss"], e["grad_norm"]) for e in lines if "loss" in e]


def parameters(run_dir: Path, step: int) -> dict[str, bytes]:
    """Reads the stored arrays without the code under test."""
    bundle = run_dir / "checkpoints" / str(step)
    meta = json.loads((bundle / "meta.json").read_text())
    arrays = {}
    for part in ("params", "opt_state"):
        for name in meta["arrays"][part]:
            kvstore = {
                "driver": "ocdbt",
                "base": f"file://{bundle}/state/{part}/",
                "path": f"{name}/",
            }
            spec = {"driver": "zarr", "kvstore": kvstore}
            arrays[f"{part}/{name}"] = np.asarray(tensorstore.open(spec, open=True).result().read().result()).tobytes()
    return arrays


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    result = run("train.py", write_config(directory), *LONGER)
    assert result.returncode == 0, result.stderr
    return directory / "run", result


def test_a_run_shows_what_a_person_wants_to_know(uninterrupted):
    run_dir, result = uninterrupted
    for word in ("perplexity", "unigram", "uniform", "tok", "left", "eval.py", "tensorboard", "goodput ", str(run_dir)):
        assert word in result.stdout
    assert (run_dir / "config.yaml").exists()
    assert any((run_dir / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = (
        "loss cross_entropy load_balance_loss router_z_loss learning_rate grad_norm tokens_per_second mfu expert_load"
    )
    assert set(names.split()) <= set(lines[1])
    assert set(names.split()) - set(lines[0]) == {"tokens_per_second", "mfu"}  # the first step compiles
    (start,) = re.findall(r"^start took (.+) s: (.+)$", result.stdout, re.MULTILINE)
    parts = dict(part.rsplit(" ", 1) for part in start[1].split(", "))
    assert list(parts) == ["imports", "devices", "data", "parameters", "peak", "compile", "first step"]
    assert sum(map(float, parts.values())) == pytest.approx(float(start[0]), abs=0.4)
    assert losses(run_dir)[0][1] > losses(run_dir)[-1][1]
    assert any("heldout/words" in line for line in lines)


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    run_dir, _ = uninterrupted
    before = parameters(run_dir, STEPS)
    outcome = Trainer(load_config(run_dir.parent / "config.yaml", [*LONGER, *HERE]), say=str).run()
    assert (outcome.step, outcome.finished) == (STEPS, True)
    assert parameters(run_dir, STEPS) == before
    assert len(losses(run_dir)) == STEPS


def train_until(directory: Path, *sign: str) -> Processes:
    """Starts the run of this directory, and waits for a sign of it."""
    process = Processes(directory, 1, ROOT / "train.py", directory / "config.yaml", *LONGER)
    if sign:
        process.wait_for(lambda: list((directory / "run").glob(sign[0])), pause=0.002)
    return process


def ask_to_stop(process: Processes, directory: Path, number: signal.Signals) -> tuple[Ended, str, int]:
    """Sends a signal to a run that is held still meanwhile; also what a second trainer is told, and the last step."""
    pid = process.all[0].pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(UserError) as second:
        RunDirectory(directory / "run", load_config(directory / "config.yaml", [*LONGER]))
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    (ended,) = process.end()
    return ended, str(second.value), int(ended.out.split("stopped at step ")[1].split()[0])


def flip_a_bit(bundle: Path) -> None:
    largest = max(bundle.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """One run of many starts: killed in a save, stopped by SIGTERM, then damaged, then stopped by Ctrl-C, and ended."""
    directory = tmp_path_factory.mktemp("interrupted")
    write_config(directory)
    found = {}

    killed = train_until(directory, "checkpoints/8/meta.json")  # the save of step 8 has begun
    killed.all[0].kill()
    assert killed.end()[0].code == -signal.SIGKILL
    process = train_until(directory, "checkpoints/12/manifest.json")
    found["SIGTERM"] = (*ask_to_stop(process, directory, signal.SIGTERM), process.all[0].pid)

    newest = found["SIGTERM"][2]
    assert (directory / "run" / "checkpoints" / str(newest) / "manifest.json").exists()
    flip_a_bit(directory / "run" / "checkpoints" / str(newest))
    process = train_until(directory, f"checkpoints/{newest - newest % 4 + 8}/manifest.json")
    found["SIGINT"] = (*ask_to_stop(process, directory, signal.SIGINT), process.all[0].pid)
    (found["end"],) = train_until(directory).end()
    return directory / "run", found


@pytest.mark.drills
def test_killed_stopped_damaged_and_resumed_equals_uninterrupted(uninterrupted, interrupted):
    run_dir, found = interrupted
    assert found["end"].code == 0, found["end"].err
    assert losses(run_dir) == losses(uninterrupted[0])
    assert parameters(run_dir, STEPS) == parameters(uninterrupted[0], STEPS)


@pytest.mark.drills
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_cleanly_and_the_lock_holds(interrupted, number):
    _, found = interrupted
    ended, second, step, pid = found[number]
    assert (ended.code, ended.err) == (0, "")
    assert f"in use by process {pid} on " in second
    assert 12 < step < STEPS
    after = found["SIGINT"][0] if number == "SIGTERM" else found["end"]
    assert (f"resumed from step {step} of" in after.out) == (number == "SIGINT")  # the other was damaged meanwhile


@pytest.mark.drills
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(interrupted):
    _, found = interrupted
    damaged, after = found["SIGTERM"][2], found["SIGINT"][0].out
    assert f"checkpoints/{damaged} is passed over: " in after
    assert int(after.split("resumed from step ")[1].split()[0]) in range(damaged - 4, damaged)


@pytest.mark.drills
def test_another_config_in_the_same_directory_is_refused(uninterrupted):
    run_dir, _ = uninterrupted
    before = parameters(run_dir, STEPS), (run_dir / "config.yaml").read_text()
    changes = ("optimizer.learning_rate=0.5", "data.seq_len=16", "train.log_every=2")  # the last one may change
    result = run("train.py", run_dir.parent / "config.yaml", *LONGER, *changes)
    assert result.returncode == 2
    differences = "data.seq_len=32, not 16; optimizer.learning_rate=0.01, not 0.5"
    remedy = "choose another run_dir or the old values"
    assert result.stderr == f"error: {run_dir} holds a run with {differences}: {remedy}\n"
    assert (parameters(run_dir, STEPS), (run_dir / "config.yaml").read_text()) == before


def measured(file: Path, *arguments: object) -> dict:
    evaluation.main([*map(str, arguments), "--json", str(file), *HERE])
    return json.loads(file.read_text())


def test_eval_measures_a_run(uninterrupted, tmp_path):
    run_dir, trained = uninterrupted
    modes = ("packed", "document", "strided")
    numbers = {mode: measured(tmp_path / f"{mode}.json", run_dir, f"eval.mode={mode}") for mode in modes}
    for content in numbers.values():
        words = content["sources"]["words"]
        assert words == {**content["total"], "text": "held-out", "trained_share": words["trained_share"]}
        assert 0.8 < words["trained_share"] < 1  # of the tokens; about a tenth of the documents is held out
        numbers_by_name = {"tokens", "bytes", "nats_per_token", "perplexity", "bits_per_byte", "documents", "intervals"}
        assert set(content["total"]) == numbers_by_name
        assert content["total"]["tokens"] == numbers["packed"]["total"]["tokens"]
    assert f"{numbers['packed']['total']['perplexity']:,.2f}" in trained.stdout  # the trainer's own last word
    assert numbers["strided"]["total"]["nats_per_token"] < numbers["document"]["total"]["nats_per_token"]


def test_eval_of_other_text_takes_all_of_it(uninterrupted, tmp_path):
    run_dir, _ = uninterrupted
    (tmp_path / "other.txt").write_text("a quiet field under old trees " * 20, encoding="utf-8")
    other = f"data.sources=[{{name: other, path: {tmp_path / 'other.txt'}}}]"
    found = measured(tmp_path / "other.json", run_dir, other)
    assert found["sources"]["other"]["bytes"] == (tmp_path / "other.txt").stat().st_size


MISTAKES = {
    "misspelt key": (["optimizer.learning_rat=1"], "Did you mean"),
    "wrong type": (["train.steps=many"], "train.steps: 'many' is not a whole number"),
    "heads": (["model.num_heads=3"], "not model.d_model=32"),
    "top-k": (["model.num_experts_per_tok=9"], "more than model.num_experts=4"),
    "mesh is not the device count": (["mesh.fsdp=3"], "6 devices but there are 8"),
    "no sources": (["data.sources=[]"], "data.sources is empty"),
    "missing file": (["data.sources=[{name: a, path: nowhere.txt}]"], "nowhere.txt"),
    "data smaller than a batch": (["train.batch_size=4000"], "smaller than one batch"),
    "batch that the mesh does not divide": (["train.batch_size=6"], "train.batch_size / train.microbatches is 6"),
    "tokenizer too large": (["data.tokenizer=mixtral"], "32000 tokens but model.vocab_size is 320"),
    "no such tokenizer": (["data.tokenizer=none.model"], "cannot read the tokenizer none.model"),
    "warm-up longer than the run": (["optimizer.warmup_steps=50"], "optimizer.warmup_steps=50"),
    "kernel of another platform": (["kernels.attention=cudnn"], "does not run on cpu"),
    "run_dir is no run": (["run_dir=."], "holds"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, mistake):
    """What becomes of the sentence, and the exit code: above, and in `test_cli`."""
    config = write_config(tmp_path)
    overrides, sentence = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXTRAL_JAX_CACHE_DIR", "")  # which the program sets: put back
    before = set(os.listdir(tmp_path))
    with pytest.raises(UserError) as error:
        train.main([str(config), *HERE, *overrides])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert set(os.listdir(tmp_path)) - before <= {"cache"}


PROGRAMS = {
    "generate": (verbs.generate, ["first", "a prompt"]),
    "serve": (verbs.serve, ["first", "--port", "0"]),
    "export": (verbs.export, ["first", "new", "--format", "hf"]),
    "eval.py": (evaluation.main, ["first"]),
    "train.py": (train.main, ["config.yaml", "init_from=first", *HERE]),
    "train.py without a model": (
        train.main,
        [str(ROOT / "configs" / "sft.yaml"), "init_from=first", "data.sources=[{name: a, path: text.jsonl}]"],
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_checkpoint_that_is_being_written_is_one_sentence(tmp_path, monkeypatch, program):
    """A run's first, whose arrays and manifest are still to come."""
    write_config(tmp_path, documents=2)
    bundle = tmp_path / "first" / "checkpoints" / "4"
    bundle.mkdir(parents=True)
    (bundle / "meta.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXTRAL_JAX_CACHE_DIR", "")
    before = set(tmp_path.rglob("*"))
    main, arguments = PROGRAMS[program]
    with pytest.raises(UserError, match=r"no checkpoint in .*first is whole: wait"):
        main(arguments)
    assert {path.relative_to(tmp_path).parts[0] for path in {*tmp_path.rglob("*")} - before} <= {"cache"}


def test_a_malformed_line_is_named(tmp_path, monkeypatch):
    config = write_config(tmp_path)
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": "cut off\n')
    monkeypatch.setenv("MIXTRAL_JAX_CACHE_DIR", "")
    with pytest.raises(UserError, match=r"text\.jsonl.* 61"):
        train.main([str(config), *HERE])
