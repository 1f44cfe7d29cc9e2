"""Real processes on loopback: they train as one, end together, and go on in any other number."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
from mixtral_jax.config_loading import load_config
from mixtral_jax.training.trainer import Trainer
from tests.processes import HEARTBEAT, PATIENCE, Processes, free_port, on_devices, without_noise
from tests.small_run import ROOT, leave_out, write_config

pytestmark = pytest.mark.slow

TRAIN, EVAL = ROOT / "train.py", ROOT / "eval.py"
# The schedule does not depend on the number of steps, so that every leg of a run may end where it likes.
ENDLESS = ("train.steps=100000", "train.eval_every=0", "optimizer.schedule=constant", "optimizer.learning_rate=1e-3",
           "mesh.fsdp=-1")  # fmt: skip
HERE = ("mesh.fsdp=4", "mesh.tensor=2")  # in this process
RESTART = "start the same command again: it goes on from the newest checkpoint"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: (entry["loss"], entry["tokens_seen/words"]) for entry in lines}


def sealed(run_dir: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in (run_dir / "checkpoints").glob("*/manifest.json"))


def fingerprint(run_dir: Path) -> str:
    return json.loads((run_dir / "checkpoints" / str(sealed(run_dir)[-1]) / "meta.json").read_text())[
        "data_fingerprint"
    ]


def one_sentence(text: str, *words: str) -> None:
    assert text.startswith("error: "), text
    assert text.count("\n") == 1, text
    for word in words:
        assert word in text


SRUN = '''
"""A stand-in for srun: starts the tasks on this machine and says to each what SLURM would."""
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = []
for number in range(count):
    place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost",
             "SLURM_STEP_NUM_NODES": str(count), "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})"}
    tasks.append(subprocess.Popen(command, env={**os.environ, **place}))
print("tasks", *(task.pid for task in tasks), file=open("tasks", "w"), flush=True)
sys.exit(max(task.wait() for task in tasks))
'''


@pytest.fixture(scope="module")
def started_by_slurm(workplace):
    """A run that the SLURM script started as two processes and that SIGTERM to the second has stopped."""
    directory = workplace / "slurm"
    (directory / "bin").mkdir(parents=True)
    config = write_config(directory)
    for name, text in {"srun": f"#!{sys.executable}{SRUN}", "scontrol": '#!/bin/sh\necho "$@" > requeued\n'}.items():
        (directory / "bin" / name).write_text(text)
        (directory / "bin" / name).chmod(0o755)
    variables = on_devices(
        SLURM_JOB_ID="4242", SLURM_NTASKS="2", SLURM_SUBMIT_DIR=str(ROOT), PYTHON=sys.executable,
        JAX_COORDINATOR_PORT=str(free_port()),
        PATH=f"{directory / 'bin'}:{os.environ['PATH']}",
    )  # fmt: skip
    with (directory / "log").open("w") as log:
        job = subprocess.Popen(
            ["bash", ROOT / "launch" / "train.slurm.sh", config, *ENDLESS],
            env=variables, cwd=directory, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        for _ in range(PATIENCE * 10):
            if sealed(directory / "run"):
                break
            assert job.poll() is None, (directory / "log").read_text()
            with pytest.raises(subprocess.TimeoutExpired):
                job.wait(0.1)
        os.kill(int((directory / "tasks").read_text().split()[2]), signal.SIGTERM)
        job.wait(PATIENCE)
    finally:
        job.kill()
    return directory, job.returncode, (directory / "log").read_text()


@pytest.mark.drills
def test_sigterm_to_one_process_saves_and_ends_all(started_by_slurm):
    directory, code, log = started_by_slurm
    assert code == 0, log
    step = int(log.split("stopped at step ")[1].split()[0])
    assert sealed(directory / "run")[-1] == step
    assert log.count("stopped at step") == log.count("2 x cpu (fsdp 2)") == 1  # the other was silent
    assert not (directory / "requeued").exists()


def test_evaluation_by_two_processes_gives_the_numbers_of_one(started_by_slurm, workplace):
    run_dir = started_by_slurm[0] / "run"
    ended = Processes(workplace, 2, EVAL, run_dir, "--json", workplace / "2.json").end()
    assert [process.code for process in ended] == [0, 0], ended
    evaluation.main([str(run_dir), "--json", str(workplace / "1.json"), *HERE])
    alone, together = (flat(json.loads((workplace / f"{count}.json").read_text())) for count in (1, 2))
    assert together == {
        name: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for name, value in alone.items()
    }
    assert isinstance(alone["total/nats_per_token"], float)


def flat(tree, prefix=""):
    """The leaves of nested JSON by their path."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}/{key}" if prefix else key).items()
    }


@pytest.fixture(scope="module")
def elastic(started_by_slurm, workplace):
    """That run, gone on with by four processes of which the first is killed, and by two that see a spike of the loss
    in their third step, and of which one is frozen later."""
    config = started_by_slurm[0] / "config.yaml"
    run_dir = config.parent / "run"
    reached = [sealed(run_dir)[-1]]

    four = Processes(workplace, 4, TRAIN, config, *ENDLESS)
    four.wait_for(lambda: sealed(run_dir)[-1] > reached[-1])
    four.all[0].kill()  # with it goes the coordinator
    ended = {4: four.end(within=HEARTBEAT + 40)}
    reached.append(sealed(run_dir)[-1])

    script = workplace / "spike.py"
    script.write_text(
        textwrap.dedent(f"""
        import runpy
        from mixtral_jax.training.spikes import Rollbacks, Spike
        seen = []
        def look(self, step, loss, most):
            seen.append(step)
            if len(seen) == 3:
                self.spike = Spike(step, 500.0, 5.0)
        Rollbacks.look = look
        runpy.run_path({str(TRAIN)!r}, run_name="__main__")
        """)
    )
    two = Processes(workplace, 2, script, config, *ENDLESS, "train.max_rollbacks=1", devices=2)
    two.wait_for(lambda: sealed(run_dir)[-1] > reached[-1])
    (worker,) = Path(f"/proc/{two.all[1].pid}/task/{two.all[1].pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGSTOP)
    two.all[0].join(HEARTBEAT + 40)
    os.kill(int(worker), signal.SIGCONT)
    ended[2] = two.end(within=40)
    reached.append(sealed(run_dir)[-1])
    return config, ended, reached


@pytest.mark.drills
def test_the_others_of_a_killed_coordinator_end_with_one_sentence(elastic):
    _, ended, reached = elastic
    assert [process.code for process in ended[4]] == [-signal.SIGKILL, 75, 75, 75]
    assert f"resumed from step {reached[0]}" in ended[4][0].out
    for process in ended[4][1:]:
        assert process.err.splitlines()[-1].startswith("error: ")
        assert RESTART in process.err.splitlines()[-1]
        assert without_noise(process.out) == ""


@pytest.mark.drills
def test_a_frozen_process_is_named_and_ends_too_when_it_wakes(elastic):
    _, ended, reached = elastic
    assert [process.code for process in ended[2]] == [75, 75]
    assert f"resumed from step {reached[1]}" in ended[2][0].out
    one_sentence(without_noise(ended[2][0].err), "process 1 on", f"no sign of life for {HEARTBEAT} seconds", RESTART)
    assert ended[2][1].err.splitlines()[-1].startswith("error: ")
    assert RESTART in ended[2][1].err.splitlines()[-1]
    assert without_noise(ended[2][1].out) == ""


@pytest.mark.drills
def test_two_processes_go_back_together_after_a_spike(elastic):
    config, ended, (_, start, end) = elastic
    assert f"step {start + 3}: the loss of 500 is a spike" in ended[2][0].out
    assert f"back to step {start}, without batches {start + 1} to {start + 3}\n" in ended[2][0].out
    meta = json.loads((config.parent / "run" / "checkpoints" / str(end) / "meta.json").read_text())
    assert (meta["rollbacks"]["count"], meta["rollbacks"]["skipped"]) == (1, [[start, start + 3]])


@pytest.mark.drills
def test_every_number_of_processes_gets_the_same_batches_and_losses(elastic, workplace):
    config, _, reached = elastic
    end = reached[-1] + 3
    left_out = (reached[1], reached[1] + 3)
    # The last leg, and all of it, in this process.
    for run_dir, stretches in ((config.parent / "run", []), (workplace / "reference", [left_out])):
        keys = (*ENDLESS, *HERE, f"train.stop_at_step={end}", f"run_dir={run_dir}")
        trainer = leave_out(Trainer(load_config(config, list(keys)), say=str), *stretches)
        assert trainer.run().step == end
    expected, found = losses(workplace / "reference"), losses(config.parent / "run")
    assert list(found) == list(expected) == list(range(1, end + 1))
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-5)
    assert expected[end][0] < expected[1][0]
    assert fingerprint(config.parent / "run") == fingerprint(workplace / "reference")


@pytest.mark.drills
def test_a_process_that_hangs_is_named_and_all_end(workplace):
    directory = workplace / "hang"
    directory.mkdir()
    config = write_config(directory)
    script = directory / "hanging.py"
    script.write_text(
        textwrap.dedent(f"""
        import pathlib, runpy, sys, threading
        from mixtral_jax.data.pipeline import TrainingData
        real = TrainingData.batch
        def batch(self, step, rows=None):
            pathlib.Path({str(directory)!r}, sys.argv[-1]).write_text(f"{{rows.start}} {{rows.stop}}")
            if step == 0 and "distributed.process_id=1" in sys.argv:
                threading.Event().wait()
            return real(self, step, rows)
        TrainingData.batch = batch
        runpy.run_path({str(TRAIN)!r}, run_name="__main__")
        """)
    )
    each = {0: ["distributed.process_id=0"], 1: ["distributed.process_id=1"]}
    ended = Processes(workplace, 2, script, config, *ENDLESS, "distributed.step_timeout=30", each=each).end()
    assert [process.code for process in ended] == [75, 75], ended
    for process in ended:
        one_sentence(without_noise(process.err), "finished in 30 seconds", "process 1 on", "before step 1", RESTART)
    # And neither has made the rows of the other.
    assert (directory / "distributed.process_id=0").read_text() == "0 2"
    assert (directory / "distributed.process_id=1").read_text() == "2 4"


MISTAKES = {  # before the processes meet, and of one of those that have met
    "bad key": ({0: ["optimizer.learning_rat=1"], 1: ["optimizer.learning_rat=1"]}, "Did you mean"),
    "another configuration": ({1: ["seed=1"]}, "has another configuration than process 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_all_with_one_sentence(workplace, mistake):
    each, words = MISTAKES[mistake]
    directory = workplace / mistake
    directory.mkdir()
    ended = Processes(workplace, 2, TRAIN, write_config(directory), *ENDLESS, each=each).end()
    assert [process.code for process in ended] == [2, 2], ended
    one_sentence(without_noise(ended[0].err), words)
    assert without_noise(ended[1].err) == ""
    assert not list(directory.glob("run/checkpoints/*"))


@pytest.mark.drills
def test_damaged_checkpoints_end_all_with_one_sentence(started_by_slurm, workplace):
    directory = workplace / "damaged"
    shutil.copytree(started_by_slurm[0] / "run", directory)
    for manifest in directory.rglob("manifest.json"):
        manifest.write_text("{}")
    config = started_by_slurm[0] / "config.yaml"
    ended = Processes(workplace, 2, TRAIN, config, *ENDLESS, f"run_dir={directory}").end()
    assert [process.code for process in ended] == [2, 2], ended
    one_sentence(without_noise(ended[0].err), "every checkpoint in", "is damaged")
    assert without_noise(ended[1].err) == ""
