"""Compiled programs on disk: a second start finds every one, and what must not share one does not."""

import fnmatch
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax._src import compilation_cache

from mixtral_jax import cli, compiled, verbs
from mixtral_jax.compiled import keep_compiled, trim
from mixtral_jax.config import DistributedConfig
from mixtral_jax.distributed.cluster import LAUNCHERS
from mixtral_jax.kernels.cpu import memory
from tests.small_run import environment, run, write_config

MISS = "PERSISTENT COMPILATION CACHE MISS"


@pytest.fixture
def jax_of_a_user(monkeypatch):
    """JAX's settings as without a word of the user, put back after the test; nothing is compiled meanwhile."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    files = compilation_cache.get_file_cache
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.get_file_cache = files


def test_programs_are_kept_below_the_cache_directory_by_processor(jax_of_a_user, tmp_path, monkeypatch):
    keep_compiled(str(tmp_path))
    first = jax.config.jax_compilation_cache_dir
    assert first.startswith(str(tmp_path / "compiled"))
    monkeypatch.setattr(compiled, "CPU_FACTS", ("flags",))  # as if /proc/cpuinfo named another one
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir != first


def test_what_the_user_told_jax_stays(jax_of_a_user, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    keep_compiled(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.drills
def test_a_directory_that_cannot_be_made_or_written_is_left_alone(jax_of_a_user, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    keep_compiled(str(tmp_path / "file"))
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    keep_compiled(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir is None


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from mixtral_jax.compiled import keep_compiled
keep_compiled(sys.argv[1])
print(jax.jit(lambda x: jnp.sort(jnp.tanh(x @ x.T).sum(0)))(jnp.eye(8))[3])
"""


def compute(directory):
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, directory],
        env=environment(**dict.fromkeys(names)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.drills
@pytest.mark.parametrize("damage", ["a bit", "cut", "zeroed", "empty"])
def test_a_damaged_program_is_named_and_compiled_again(tmp_path, damage):
    expected, _ = compute(tmp_path)
    file = max(tmp_path.rglob("*-sealed"), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes({"a bit": bytes(flipped), "cut": whole[:-9], "zeroed": bytes(len(whole)), "empty": b""}[damage])
    again, said = compute(tmp_path)
    assert again == expected
    assert f"{file} is damaged: the program is compiled again" in said
    assert compute(tmp_path) == (expected, "")


def test_what_an_earlier_version_left_without_a_checksum_is_not_looked_at(tmp_path):
    expected, _ = compute(tmp_path)
    for file in tmp_path.rglob("*-sealed"):
        file.rename(file.with_name(file.name.replace("-sealed", "-cache")))
    assert compute(tmp_path) == (expected, "")
    assert list(tmp_path.rglob("*-sealed"))


def test_every_flipped_bit_of_a_program_is_found(tmp_path):
    programs = compiled.Programs(str(tmp_path))
    programs.put("a", b"program")
    assert [path.name for path in tmp_path.iterdir()] == ["a-sealed"]
    whole = (tmp_path / "a-sealed").read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a-sealed").write_bytes(changed)
        assert programs.get("a") is None
        assert not list(tmp_path.iterdir())
    (tmp_path / "a-sealed").write_bytes(whole)
    assert programs.get("a") == b"program"
    assert programs.get("b") is None


@pytest.mark.parametrize(
    ("backend", "alone", "kept"), [("gpu", False, False), ("gpu", True, True), ("tpu", False, True)]
)
def test_gpus_of_several_processes_tune_together_and_keep_nothing(
    jax_of_a_user, tmp_path, monkeypatch, backend, alone, kept
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(compiled, "is_alone", lambda: alone)
    keep_compiled(str(tmp_path))
    assert (jax.config.jax_compilation_cache_dir is not None) == kept


def test_memory_goes_back_after_a_compilation_that_takes_long(monkeypatch):
    calls = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=calls.append))
    memory.return_memory.__wrapped__()  # as if nobody had called it in this process
    for limit, expected in ((1e9, []), (0, [0])):
        monkeypatch.setattr(memory, "LONG", limit)
        program = jax.jit(lambda x, limit=limit: x + limit).lower(1.0)
        calls.clear()
        program.compile()
        assert calls == expected


@pytest.mark.parametrize(
    ("environment", "devices", "restarts"),
    [
        ({}, [], True),
        ({"JAX_PLATFORMS": "cpu"}, ["/dev/nvidia0"], True),
        ({"JAX_PLATFORMS": "tpu,cpu"}, [], False),
        ({}, ["/dev/nvidia0"], False),
        ({}, ["/dev/accel0"], False),
        ({"SLURM_STEP_NODELIST": "a,b"}, [], False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, [], False),
    ],
)
def test_only_a_lone_process_on_a_cpu_starts_itself_again_for_huge_pages(monkeypatch, environment, devices, restarts):
    started = []
    for name in ("GLIBC_TUNABLES", "JAX_PLATFORMS", *LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    cli.prepare(DistributedConfig(), "")
    assert bool(started) == restarts
    if restarts:
        assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    "words", [["generate", "run", "hello"], ["serve", "run"], ["compare", "run", "run"], ["lm_eval"]], ids=str
)
def test_verbs_that_compute_ask_for_huge_pages_and_keep_kernels_where_they_are_told(tmp_path, monkeypatch, words):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verbs, "prepare_cpu", lambda _, cache_dir: sys.exit(f"caches: {cache_dir}"))
    with pytest.raises(SystemExit, match=r"^caches: $"):
        verbs.VERBS[words[0]](words[1:])
    if words != ["lm_eval"]:
        with pytest.raises(SystemExit, match=r"^caches: there$"):
            verbs.VERBS[words[0]]([*words[1:], "data.cache_dir=there"])


def test_a_program_that_starts_itself_again_keeps_its_words_and_its_exit_code():
    script = """
import os, sys
from mixtral_jax.kernels.cpu.memory import restart_with_huge_pages
restart_with_huge_pages()
print(sys.argv[1:], os.environ["GLIBC_TUNABLES"])
sys.exit(3)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    del environment["GLIBC_TUNABLES"]
    out = subprocess.run([sys.executable, "-c", script, "a b", "c=d"], env=environment, capture_output=True, text=True)
    assert (out.stdout, out.stderr, out.returncode) == ("['a b', 'c=d'] glibc.malloc.hugetlb=1\n", "", 3)


def test_the_limit_takes_what_was_not_used_for_longest(tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / f"{name}{'-cache' if name in 'bc' else '-sealed'}"  # of JAX, and of ours
        path.write_bytes(bytes(10))
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "other").write_bytes(bytes(100))
    trim(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-sealed", "b-cache", "other"]


def test_compiler_options_are_part_of_what_a_program_is_found_by(tmp_path):
    script = """
import jax
options = [None, {"xla_cpu_copy_insertion_use_region_analysis": True}]
for chosen in options + options:
    jax.clear_caches()
    jax.jit(lambda x: x * 2, compiler_options=chosen).lower(1.0).compile()
"""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert len(list(tmp_path.glob("jit__lambda*-cache"))) == 2


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    """Training with its evaluations, and `eval.py` after it."""
    config = write_config(tmp_path)
    explained = {"JAX_EXPLAIN_CACHE_MISSES": "1"}
    explained |= {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": None}
    training = (config, "train.steps=6", "train.eval_every=3")
    first, second = (run("train.py", *training, f"run_dir={tmp_path / name}", **explained) for name in "ab")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "held-out" in second.stdout
    assert MISS in first.stderr
    assert MISS not in second.stderr
    measured = run("eval.py", tmp_path / "a", f"data.cache_dir={tmp_path / 'cache'}", **explained)
    assert measured.returncode == 0, measured.stderr
    assert MISS not in measured.stderr
