"""The same bits from every start: twice, and once with a kill in between."""

import time
from pathlib import Path

import pytest

from tests.small_run import run, start, write_config
from tests.training.test_runs import losses, parameters

pytestmark = pytest.mark.slow
STEPS = 30
NO_GPU = not Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidia0").exists()
SETTINGS = ("train.deterministic=true", f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=10",
            "precision.compute=bfloat16", "data.seq_len=128")  # fmt: skip


@pytest.mark.parametrize(
    "platform", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(NO_GPU, reason="needs an NVIDIA GPU"))]
)
def test_two_runs_and_one_that_was_killed_are_equal_to_the_bit(tmp_path, platform):
    config, cache = write_config(tmp_path, documents=200), tmp_path / "cache"

    def begin(call, name):
        return call("train.py", config, *SETTINGS, f"run_dir={tmp_path / name}", JAX_PLATFORMS=platform)

    for name in ("once", "again"):
        result = begin(run, name)
        assert result.returncode == 0, result.stderr
    process = begin(start, "killed")
    while not list((tmp_path / "killed" / "checkpoints").glob("10/meta.json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert "resumed from step 10" in begin(run, "killed").stdout

    assert len(losses(tmp_path / "once")) == STEPS
    assert cache.exists()
    for name in ("again", "killed"):
        assert losses(tmp_path / name) == losses(tmp_path / "once")
        assert parameters(tmp_path / name, STEPS) == parameters(tmp_path / "once", STEPS)
