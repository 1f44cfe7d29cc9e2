"""Whole runs, as a person starts them: resume, signals, kill -9, locks, and every mistake in one sentence."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from tests.small_run import run, start, write_config

pytestmark = pytest.mark.slow


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
    result = run("train.py", write_config(directory))
    assert result.returncode == 0, result.stderr
    return directory / "run", result


def test_a_run_shows_what_a_person_wants_to_know(uninterrupted):
    run_dir, result = uninterrupted
    for word in ("perplexity", "unigram", "uniform", "tok", "left", "eval.py", "tensorboard", str(run_dir)):
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
    before = parameters(run_dir, 12)
    result = run("train.py", run_dir.parent / "config.yaml")
    assert result.returncode == 0
    assert parameters(run_dir, 12) == before
    assert len(losses(run_dir)) == 12


def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    config = write_config(tmp_path)
    assert run("train.py", config, "train.stop_at_step=7").returncode == 0
    result = run("train.py", config)
    assert "resumed from step 7" in result.stdout
    assert losses(tmp_path / "run") == losses(uninterrupted[0])
    assert parameters(tmp_path / "run", 12) == parameters(uninterrupted[0], 12)


def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    config = write_config(tmp_path)
    process = start("train.py", config)
    while not list((tmp_path / "run" / "checkpoints").glob("8/meta.json")):  # the save of step 8 has begun
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    result = run("train.py", config)
    assert result.returncode == 0, result.stderr
    assert "resumed from step" in result.stdout
    assert losses(tmp_path / "run") == losses(uninterrupted[0])
    assert parameters(tmp_path / "run", 12) == parameters(uninterrupted[0], 12)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path} did not appear")


def test_sigterm_saves_and_exits_cleanly_and_the_lock_holds(tmp_path):
    config = write_config(tmp_path)
    process = start("train.py", config, "train.steps=100000", "train.log_every=1000", "train.eval_every=0")
    wait_for(tmp_path / "run" / "checkpoints" / "4" / "manifest.json", process)

    second = run("train.py", config)
    assert second.returncode == 2
    assert f"in use by process {process.pid}" in second.stderr
    assert second.stderr.count("\n") == 1

    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped at step" in out
    step = int(out.split("stopped at step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / str(step) / "manifest.json").exists()


def test_another_config_in_the_same_directory_is_refused(uninterrupted):
    run_dir, _ = uninterrupted
    result = run("train.py", run_dir.parent / "config.yaml", "optimizer.learning_rate=0.5")
    assert result.returncode == 2
    assert "optimizer.learning_rate=0.01, not 0.5" in result.stderr


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on(uninterrupted, tmp_path):
    config = write_config(tmp_path)
    run("train.py", config, "train.stop_at_step=8")
    largest = max((tmp_path / "run" / "checkpoints" / "8").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(bytes(content))
    result = run("train.py", config)
    assert result.returncode == 0, result.stderr
    assert "checkpoints/8 is passed over" in result.stdout
    assert "resumed from step 4" in result.stdout
    assert parameters(tmp_path / "run", 12) == parameters(uninterrupted[0], 12)


def test_eval_measures_a_run(uninterrupted, tmp_path):
    run_dir, trained = uninterrupted
    numbers = {}
    for mode in ("packed", "document", "strided"):
        file = tmp_path / f"{mode}.json"
        result = run("eval.py", run_dir, "--json", file, f"eval.mode={mode}")
        assert result.returncode == 0, result.stderr
        numbers[mode] = json.loads(file.read_text())
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
    file = tmp_path / "other.json"
    result = run("eval.py", run_dir, "--json", file, f"data.sources=[{{name: other, path: {tmp_path / 'other.txt'}}}]")
    assert result.returncode == 0, result.stderr
    assert json.loads(file.read_text())["sources"]["other"]["bytes"] == (tmp_path / "other.txt").stat().st_size


MISTAKES = {
    "misspelt key": (["optimizer.learning_rat=1"], "Did you mean"),
    "wrong type": (["train.steps=many"], "train.steps: Value 'many'"),
    "heads": (["model.num_heads=3"], "not model.d_model=32"),
    "top-k": (["model.num_experts_per_tok=9"], "more than model.num_experts=4"),
    "mesh is not the device count": (["mesh.fsdp=3"], "3 devices but there are 1"),
    "no sources": (["data.sources=[]"], "data.sources is empty"),
    "missing file": (["data.sources=[{name: a, path: nowhere.txt}]"], "nowhere.txt"),
    "data smaller than a batch": (["train.batch_size=4000"], "smaller than one batch"),
    "tokenizer too large": (["data.tokenizer=mixtral"], "32000 tokens but model.vocab_size is 320"),
    "no such tokenizer": (["data.tokenizer=none.model"], "cannot read the tokenizer none.model"),
    "warm-up longer than the run": (["optimizer.warmup_steps=50"], "optimizer.warmup_steps=50"),
    "kernel of another platform": (["kernels.attention=cudnn"], "does not run on cpu"),
    "run_dir is no run": (["run_dir=."], "holds"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, mistake):
    config = write_config(tmp_path)
    overrides, sentence = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir(tmp_path))
    result = run("train.py", config, *overrides)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert set(os.listdir(tmp_path)) - before <= {"cache"}


def test_a_malformed_line_is_named(tmp_path):
    config = write_config(tmp_path)
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": "cut off\n')
    result = run("train.py", config)
    assert result.returncode == 2
    assert "text.jsonl" in result.stderr
    assert "61" in result.stderr


def test_batch_that_the_mesh_does_not_divide(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    result = run("train.py", write_config(tmp_path), "mesh.fsdp=8", "train.batch_size=4", XLA_FLAGS=flags)
    assert result.returncode == 2
    assert "train.batch_size / train.microbatches is 4" in result.stderr
