"""The same bits from every start: twice, and once with a kill in between."""

import re
import time
from pathlib import Path

import pytest

from tests.small_run import run, start, write_config
from tests.training.test_runs import losses, parameters

pytestmark = pytest.mark.slow
STEPS = 30
SETTINGS = ("train.deterministic=true", f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=10",
            "precision.compute=bfloat16", "data.holdout=0")  # fmt: skip
# Sums long enough that their order shows. Where the key changes nothing, on a CPU, `test_runs` has the same.
WIDE = ("model.d_model=256", "model.d_ff=512", "model.head_dim=64", "data.seq_len=256", "train.batch_size=16")
NO_GPU = not Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidia0").exists()


@pytest.mark.skipif(NO_GPU, reason="needs an NVIDIA GPU")
def test_runs_and_one_that_was_killed_are_equal_to_the_bit(tmp_path):
    config = write_config(tmp_path, documents=200)

    def begin(call, name):
        return call("train.py", config, *SETTINGS, *WIDE, f"run_dir={tmp_path / name}", JAX_PLATFORMS="cuda")

    for name in ("once", "again"):
        result = begin(run, name)
        assert result.returncode == 0, result.stderr
    process = begin(start, "killed")
    while not list((tmp_path / "killed" / "checkpoints").glob("10/manifest.json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert re.search("resumed from step [12]0 ", begin(run, "killed").stdout)

    assert len(losses(tmp_path / "once")) == STEPS
    for name in ("again", "killed"):
        assert losses(tmp_path / name) == losses(tmp_path / "once")
        assert parameters(tmp_path / name, STEPS) == parameters(tmp_path / "once", STEPS)
