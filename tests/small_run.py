"""A run that takes seconds: its config file, its text, and the command that starts it."""

import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    "river",
    "and",
    "a",
    "stone",
    "were",
    "under",
    "old",
    "trees",
    "when",
    "light",
    "fell",
    "slowly",
    "over",
    "every",
    "quiet",
    "field",
]


def write_config(directory: Path, documents: int = 60) -> Path:
    """Writes a source of small documents and a config that trains on it."""
    draw = random.Random(0)
    source = directory / "text.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=80))}) + "\n")
    config = directory / "config.yaml"
    config.write_text(
        f"""
run_dir: {directory / "run"}
model: {{d_model: 32, d_ff: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, head_dim: 8, vocab_size: 320,
  num_experts: 4, num_experts_per_tok: 2, rope_theta: 1e6, norm_eps: 1e-5}}
data:
  seq_len: 32
  holdout: 0.1
  tokenizer: train
  cache_dir: {directory / "cache"}
  sources: [{{name: words, path: {source}}}]
train: {{steps: 12, batch_size: 4, log_every: 1, eval_every: 6}}
optimizer: {{learning_rate: 1e-2, warmup_steps: 2}}
checkpoint: {{every: 4}}
mesh: {{fsdp: 1}}
""",
        encoding="utf-8",
    )
    return config


def leave_out(trainer: Any, *stretches: tuple[int, int]) -> Any:
    """Lets a trainer begin without some batches, as one goes on that went back after spikes of its loss."""
    open_text = trainer._open_text

    def opened(beginning: Any) -> None:
        open_text(beginning)
        trainer.data.skipped += stretches

    trainer._open_text = opened
    return trainer


def environment(**variables: str | None) -> dict[str, str]:
    """Variables for a program of these tests; None takes one away."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = {**os.environ, "PYTHONPATH": path, **variables}
    return {name: value for name, value in chosen.items() if value is not None}


def flags(devices: int = 1) -> str:
    """Of XLA: so many simulated devices, and programs that are compiled as quickly as those of the tests."""
    return re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])


def start(script: str, *arguments: object, **variables: str | None) -> subprocess.Popen[str]:
    """Starts an entry script on one CPU device, with more environment variables."""
    variables = {"XLA_FLAGS": flags(), **variables}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables),
    )  # fmt: skip


def run(script: str, *arguments: object, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Runs an entry script to its end."""
    process = start(script, *arguments, **variables)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def trained() -> Path:
    """A directory with a config and its run to the end, of one program for all tests of a session: to be read alone."""
    directory = Path(os.environ["PROGRAMS_OF_TESTS"], "trained")
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker trains, the others wait
        if not (directory / "done").exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            result = run("train.py", write_config(directory))
            assert result.returncode == 0, result.stderr
            (directory / "done").touch()
    return directory
