"""Compiled programs on disk, so that a second start compiles nothing.

JAX keeps and finds them, by program, compiler options, versions and devices; here is decided where, and when not. Each
is written whole and with a checksum, which JAX's own files have not: it runs a damaged program, to wrong numbers or to
the end of the process, at every start.
"""

import contextlib
import hashlib
import logging
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache  # public only as settings, which choose the place and not what is written

from mixtral_jax.config import UserError
from mixtral_jax.data.cache_files import cache_directory
from mixtral_jax.distributed.processes import is_alone, is_main
from mixtral_jax.kernels.cpu.memory import return_memory
from mixtral_jax.whole_files import sealed, unsealed, write_whole

LIMIT = 4 << 30  # bytes; a program of a large model takes some 10 MiB
END = "-sealed"  # of a program's file
WITHOUT_CHECKSUM = "-cache"  # of JAX's own files, which earlier versions left; nobody reads them
CPU_FACTS = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # of /proc/cpuinfo, x86 and ARM

log = logging.getLogger(__name__)


def keep_compiled(configured: str) -> None:
    """Lets JAX keep what it compiles from here on below the directory of caches; call it once the devices are known.

    On a CPU alone, memory that compilers leave is returned, too.

    Nothing changes where JAX's own variables (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) have decided,
    where the directory cannot be written, or for several processes with GPUs: these tune kernels together while they
    compile, and one that finds its program on disk would leave the others waiting.

    Args:
        configured: `data.cache_dir`.
    """
    backend = jax.default_backend()
    if backend == "cpu" and is_alone():
        return_memory()
    settings: Any = jax.config  # its attributes are made as it is loaded
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    if backend == "gpu" and not is_alone():
        return
    try:
        # XLA runs a program that was compiled for another processor, to the first instruction that is missing.
        directory = cache_directory(configured) / "compiled" / (_processor() if backend == "cpu" else backend)
        directory.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError):
        return
    if not os.access(directory, os.W_OK):
        return
    if is_main():
        trim(directory, LIMIT)
    compilation_cache.get_file_cache = lambda path: (Programs(path), path)  # type: ignore[assignment,return-value]
    settings.update("jax_compilation_cache_dir", str(directory))
    # A start compiles dozens of small programs, which take longer together than they do on disk.
    settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Programs:
    """Programs by their keys, for JAX; what is not as it was written is removed, and compiled again."""

    def __init__(self, path: str):
        """Takes a directory that is there."""
        self._path = Path(path)

    def get(self, key: str) -> bytes | None:
        """Finds a program; None where there is none, or none that is whole."""
        file = self._path / f"{key}{END}"
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        if (program := unsealed(content)) is None:
            log.warning("%s is damaged: the program is compiled again", file)
            file.unlink(missing_ok=True)
        return program

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program."""
        write_whole(self._path / f"{key}{END}", sealed(value), durable=False)


def trim(directory: Path, limit: int) -> None:
    """Deletes the programs that were not used for longest, down to so many bytes; JAX's own limit locks every look."""
    files = []
    for path in [*directory.glob(f"*{END}*"), *directory.glob(f"*{WITHOUT_CHECKSUM}*")]:
        with contextlib.suppress(FileNotFoundError):  # another process trims, too
            status = path.stat()
            files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


def _processor() -> str:
    """Names this machine's processor by what it can do."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = [line for line in lines if line.split("\t")[0].strip() in CPU_FACTS]
        return f"{platform.machine()}-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:12]}"
    return f"{platform.machine()}-{platform.node()}"
