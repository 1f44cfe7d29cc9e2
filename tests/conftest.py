"""Eight simulated devices for every test, and compilation that is quick rather than what it compiles: without LLVM's
optimisations and the emitters of fused loops, which take longer than the tests save by them. Set before JAX starts."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # in this process; the first directory would serve all tests
os.environ["XLA_FLAGS"] = " ".join(
    ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
     # Later ones than 0.10 have no other emitters, and end at once where a flag is unknown.
     *["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10."))
)  # fmt: skip

# No program that a test calls or starts begins again for huge pages: in this process pytest itself would.
os.environ["GLIBC_TUNABLES"] = ""

# What the programs that tests start compile; xdist's workers inherit the directory of the process that started them.
if "PROGRAMS_OF_TESTS" not in os.environ:
    os.environ["PROGRAMS_OF_TESTS"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["PROGRAMS_OF_TESTS"])

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")
