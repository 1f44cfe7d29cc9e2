"""The launch files: syntax, the fields that a cluster insists on, and what our own detection reads."""

import os
import re
import string
import subprocess
from pathlib import Path

import pytest
import yaml

from mixtral_jax.distributed.cluster import distributed_config

LAUNCH = Path(__file__).parents[1] / "launch"
VARIABLES = {
    "NAME": "mixtral", "IMAGE": "registry.example/mixtral_jax:1", "NODES": "4", "GPUS": "8", "CLAIM": "shared",
    "SLICES": "2", "HOSTS": "16", "CHIPS": "4", "ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "4x4x4",
    "COMMAND": "train.py configs/mixtral_8x7b.yaml run_dir=/shared/runs/8x7b",
}  # fmt: skip


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_and_executable(script):
    assert os.access(script, os.X_OK)
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "set -" in script.read_text()
    assert "usage" in script.read_text() or re.search(rf"# +.*launch/{re.escape(script.name)} ", script.read_text())


def test_sbatch_sees_all_its_options():
    """It stops to read them at the first command."""
    lines = (LAUNCH / "train.slurm.sh").read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.split()[1] for line in lines[:first_command] if line.startswith("#SBATCH")]
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]
    assert {option.partition("=")[0] for option in options} >= {"--nodes", "--ntasks-per-node", "--requeue", "--signal"}
    assert "--signal=B:USR1@300" in options  # to the script, whose trap passes it on


def fake(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(f"#!/bin/bash\n{text}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    ("code", "restarts", "queued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (75, 50, False), (137, 0, True)],
)
def test_slurm_queues_the_job_again_when_that_can_help(tmp_path, code, restarts, queued):
    fake(tmp_path, "srun", f'echo "$@" > {tmp_path}/started; exit {code}')
    fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/queued')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/somewhere",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    done = subprocess.run(["bash", LAUNCH / "train.slurm.sh", "my config.yaml", "seed=1"], env=environment)
    assert done.returncode == code
    assert (tmp_path / "started").read_text().split("/somewhere/.venv/bin/python")[1] == (
        " -u /somewhere/train.py my config.yaml seed=1\n"
    )
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"


def test_slurm_saves_and_queues_again_before_its_time_is_up(tmp_path):
    """USR1 to the script becomes TERM to the processes, which end well; then the job goes on."""
    fake(
        tmp_path,
        "srun",
        f"trap 'exit 0' TERM\necho $$ > {tmp_path}/task\nkill -USR1 $PPID\nwhile :; do sleep 0.1; done",
    )
    fake(tmp_path, "scancel", f'[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat {tmp_path}/task)"')
    fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/queued')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", LAUNCH / "train.slurm.sh", "c.yaml"], env=environment, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "queued").read_text() == "requeue 7\n"


def test_mpi_says_where_process_0_listens(tmp_path):
    fake(tmp_path, "mpirun", 'printf "%s\\n" "$@"')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTS": "node1:1,node2:1"}
    done = subprocess.run(
        ["bash", LAUNCH / "train.mpi.sh", "c.yaml", "seed=1"], env=environment, capture_output=True, text=True
    )
    arguments = done.stdout.splitlines()
    assert arguments[-3:] == ["c.yaml", "seed=1", "distributed.coordinator=node1:8476"]
    assert arguments[:2] == ["--host", "node1:1,node2:1"]


@pytest.mark.parametrize(("slices", "names"), [("1", ["pod"]), ("2", ["pod-0", "pod-1"])])
def test_tpu_runs_the_command_on_every_host_of_every_slice(tmp_path, slices, names):
    fake(
        tmp_path, "gcloud", f'line=$(printf "%s|" "$@"); echo "$line" >> {tmp_path}/calls'
    )  # in one piece: two run at once
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "NAME": "pod", "PROJECT": "mine", "SOURCE": "https://host/repo.git",
        "SLICES": slices,
    }  # fmt: skip
    for action in (["create"], ["setup"], ["train", "c.yaml", "data.sources=[{name: a, path: 'b c'}]"], ["delete"]):
        subprocess.run(["bash", LAUNCH / "train.tpu.sh", *action], env=environment, check=True, timeout=60)
    calls = [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]
    assert ("--node-id" if slices == "1" else "--node-count") in calls[0]
    assert "queued-resources" in calls[0]
    trained = [call for call in calls if any("train.py" in part for part in call)]
    assert sorted(call[4] for call in trained) == names
    for call in trained:
        assert "--worker=all" in call
        command = next(part for part in call if "train.py" in part).split("train.py ")[1]
        shown = subprocess.run(["bash", "-c", f'printf "%s\\n" {command}'], capture_output=True, text=True)
        assert shown.stdout.splitlines() == ["c.yaml", "data.sources=[{name: a, path: 'b c'}]"]
    wrong = subprocess.run(["bash", LAUNCH / "train.tpu.sh", "fly"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2


def job_set(name: str) -> dict:
    """The file as kubectl gets it from envsubst, which knows `${NAME}` and leaves `$(NAME)` alone."""
    text = (LAUNCH / name).read_text().replace("$(", "$$(")
    return yaml.safe_load(string.Template(text).substitute(VARIABLES))


@pytest.mark.parametrize("name", ["train.jobset.yaml", "train.jobset-tpu.yaml"])
def test_job_sets_have_what_kubernetes_insists_on(name):
    found = job_set(name)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "mixtral"
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"  # what numbers the processes
    assert job["parallelism"] == job["completions"] > 1
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy needs
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert found["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert "exec python -u train.py configs/mixtral_8x7b.yaml" in container["args"][0]


def test_pods_with_gpus_find_each_other():
    found = job_set("train.jobset.yaml")
    (replicated,) = found["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    (number,) = container["env"]
    assert number["valueFrom"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")
    command = container["args"][0].replace(f"$({number['name']})", "3")
    config = distributed_config(command.split())
    # JobSet's name of a pod: SET-REPLICATED_JOB-JOB_INDEX-POD_INDEX, in the domain of the set.
    host = f"{found['metadata']['name']}-{replicated['name']}-0-0.{found['metadata']['name']}"
    assert (config.coordinator, config.num_processes, config.process_id) == (f"{host}:8476", 4, 3)
    assert container["ports"][0]["containerPort"] == 8476


def test_pods_with_tpus_ask_for_a_slice():
    found = job_set("train.jobset-tpu.yaml")
    (replicated,) = found["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert replicated["replicas"] == 2
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x4"
    }  # fmt: skip
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
