"""A run goes on under another version of JAX than the one that saved it, both ways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.small_run import ROOT, environment, write_config

OTHER = "OTHER_JAX"  # environment variable: a Python that has another version of jax
OPTIONS = ("optimizer.schedule=constant", "train.eval_every=0", "train.steps=12", "checkpoint.every=6")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.drills,
    pytest.mark.skipif(OTHER not in os.environ, reason=f"{OTHER} names no Python with another jax, as in .ci/run"),
]

# Says what jax it has, and of a checkpoint's arrays, as it restores them, the bits.
BITS = """
import hashlib, json, sys
from pathlib import Path
import jax, numpy
from mixtral_jax.config_loading import parse_config
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import find_checkpoint
from mixtral_jax.runtime import make_runtime

checkpoints, step = find_checkpoint(Path(sys.argv[1]))
config = parse_config(checkpoints.read_meta(step)["config"], [], saved=True)
arrays = checkpoints.restore(step, Architecture(config.model, make_runtime(config)).stored())
digest = hashlib.sha256()
for leaf in jax.tree.leaves(arrays):
    digest.update(f"{leaf.shape} {leaf.dtype} ".encode() + numpy.asarray(leaf).tobytes())
print(json.dumps([jax.__version__, step, digest.hexdigest()]))
"""


def call(python: str, *arguments: object) -> str:
    result = subprocess.run(
        [python, *map(str, arguments)], capture_output=True, text=True, timeout=300,
        cwd=ROOT, env=environment(XLA_FLAGS=None),  # not all flags of the tests are known to both
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_with_another_jax(tmp_path: Path) -> None:
    here, there = sys.executable, os.environ[OTHER]
    config, undisturbed = write_config(tmp_path), tmp_path / "undisturbed"
    call(here, "train.py", config, *OPTIONS, f"run_dir={undisturbed}")
    for saves, goes_on in ((here, there), (there, here)):
        run = tmp_path / f"from {Path(saves).parts[-3]}"
        call(saves, "train.py", config, *OPTIONS, "train.steps=6", f"run_dir={run}")
        saved, restored = (json.loads(call(python, "-c", BITS, run)) for python in (saves, goes_on))
        assert saved[0] != restored[0], f"{OTHER} names a Python with the same jax, {saved[0]}"
        assert saved[1:] == restored[1:]
        assert saved[1] == 6
        assert "step 6" in call(goes_on, "train.py", config, *OPTIONS, f"run_dir={run}")
        assert len(losses(run)) == 12
        np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=1e-6)
