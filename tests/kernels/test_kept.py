"""Kernels that Numba has compiled are kept on disk: what is damaged there is named, removed and compiled again."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import environment

pytestmark = pytest.mark.drills

PROGRAM = """
import numpy as np
from mixtral_jax.kernels.cpu.intrinsics import compiled, entry

def total(values):
    found = 0.0
    for value in values:
        found += value * value
    return found

def double(number):
    return 2 * number

print(compiled(total)(np.arange(10.0)), entry(double).ctypes(21))
"""


def compute(directory: Path) -> tuple[str, str]:
    (directory / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(directory / "program.py")]
    places = environment(NUMBA_CACHE_DIR=str(directory / "kept"))
    done = subprocess.run(command, env=places, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def flip(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    return bytes(changed)


DAMAGES = {
    "a bit": flip,
    "cut": lambda content: content[:100],
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_kernel_is_named_and_compiled_again(tmp_path: Path, damage: str) -> None:
    expected, said = compute(tmp_path)
    assert (expected, said) == ("285.0 42\n", "")
    files = sorted((tmp_path / "kept").rglob("*.nb[ci]"))
    assert [file.suffix for file in files] == [".nbc", ".nbi"] * 2
    for kind in (".nbc", ".nbi"):
        damaged = [file for file in files if file.suffix == kind]
        for file in damaged:
            file.write_bytes(DAMAGES[damage](file.read_bytes()))
        again, said = compute(tmp_path)
        assert again == expected
        assert sorted(said.splitlines()) == [f"{file} is damaged: the kernel is compiled again" for file in damaged]
    assert compute(tmp_path) == (expected, "")
    assert sorted((tmp_path / "kept").rglob("*.*")) == files
