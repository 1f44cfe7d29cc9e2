"""Eight simulated devices for every test, and compilation that is quick rather than what it compiles: without LLVM's
optimisations, modules in parts and the emitters of fused loops, which take longer than the tests save by them. Set
before JAX starts."""

import atexit
import functools
import gc
import importlib.metadata
import os
import shutil
import sysconfig
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
     "--xla_cpu_parallel_codegen_split_count=1",
     # Later ones than 0.10 have no other emitters, and end at once where a flag is unknown.
     *["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10."))
)  # fmt: skip

# No program that a test calls or starts begins again for huge pages: in this process pytest itself would.
os.environ["GLIBC_TUNABLES"] = ""

# What tests and the programs that they start compile serves them all; xdist's workers inherit the directory.
if "PROGRAMS_OF_TESTS" not in os.environ:
    os.environ["PROGRAMS_OF_TESTS"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["PROGRAMS_OF_TESTS"])
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["PROGRAMS_OF_TESTS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis
import pytest

# The same examples in every run; `--hypothesis-profile=long` draws others, and many.
ALWAYS = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("few", derandomize=True, max_examples=30, **ALWAYS)
hypothesis.settings.register_profile("long", max_examples=2000, **ALWAYS)
hypothesis.settings.load_profile("few")

# JAX has work of its own at every collection of garbage, of which there would be thousands: 4% of the time.
gc.set_threshold(20_000)

# datatrove opens a log for every task, and loguru asks each time anew where libraries lie: half of a small `prepare`.
sysconfig.get_path = functools.cache(sysconfig.get_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")
