"""Imports and exports a synthetic checkpoint with the verbs: time against a plain copy, and peak host memory.

    python -m benchmarks.weights_io --gib 8 --directory /scratch

Host memory is the most that the verb's process ever had resident (as `time -v` tells).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from mixtral_jax.config import ModelConfig
from mixtral_jax.console import make_console
from mixtral_jax.weights.exporting import EXPORT_FORMATS
from mixtral_jax.weights.names import FORMATS, external_tensors
from mixtral_jax.weights.released_config import describe_hf
from mixtral_jax.weights.safetensors_files import SafetensorsWriter

GIB = 1 << 30
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the checkpoint (bfloat16)")
    parser.add_argument("--d-model", type=int, default=2048, help="8x7B: 4096")
    parser.add_argument("--d-ff", type=int, default=7168, help="8x7B: 14336")
    parser.add_argument("--formats", nargs="+", choices=EXPORT_FORMATS, default=EXPORT_FORMATS)
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--cold", action="store_true", help="what is read is not in the page cache")
    options = parser.parse_args()

    model = architecture(options.gib, options.d_model, options.d_ff)
    console = make_console()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        work = Path(name)
        size = write_source(model, work / "source")
        largest = max(int(np.prod(t.shape)) * 2 for f in options.formats for t in external_tensors(FORMATS[f], model))
        table = Table(title=f"{size / GIB:.2f} GiB, {model.num_layers} layers, largest tensor {largest / GIB:.2f} GiB")
        for column in ("", "seconds", "MB/s", "of a plain copy", "peak host memory, GiB"):
            table.add_column(column, justify="right" if column else "left")

        if options.cold:
            evict(work / "source")
        begin = time.perf_counter()
        shutil.copytree(work / "source", work / "copy")
        os.sync()
        copy_seconds = time.perf_counter() - begin
        shutil.rmtree(work / "copy")

        def report(name: str, seconds: float, host_bytes: int | None = None) -> None:
            memory = "" if host_bytes is None else f"{host_bytes / GIB:.2f}"
            table.add_row(
                name, f"{seconds:.1f}", f"{size / seconds / 1e6:.0f}", f"{copy_seconds / seconds:.0%}", memory
            )

        def import_from(source: Path, target: Path) -> tuple[float, int]:
            if options.cold:
                evict(source)
            return verb("import", source, target, "precision.params=bfloat16", "data.tokenizer=mixtral")

        report("plain copy", copy_seconds)
        report("import hf", *import_from(work / "source", work / "import"))
        shutil.rmtree(work / "source")
        for format_name in options.formats:
            out, again = work / format_name, work / "again"
            if options.cold:
                evict(work / "import")
            report(f"export {format_name}", *verb("export", work / "import", out, "--format", format_name))
            if format_name != "hf":
                report(f"import {format_name}", *import_from(out, again))
                shutil.rmtree(again)
            shutil.rmtree(out)
    console.print(table)


def verb(*arguments: str | Path) -> tuple[float, int]:
    """Runs a verb, what it wrote on disk; returns seconds and its peak of memory, bytes."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mixtral_jax", *map(str, arguments)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{arguments} failed")
    return seconds, usage.ru_maxrss * 1024


def evict(directory: Path) -> None:
    """Drops files from the page cache."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def architecture(gib: float, d_model: int, d_ff: int) -> ModelConfig:
    """An 8-expert model of about this size in bfloat16."""
    layer = 2 * (8 * 3 * d_model * d_ff + 2 * d_model * d_model * 5 // 4)
    return ModelConfig(
        d_model=d_model,
        d_ff=d_ff,
        num_layers=max(1, round((gib * GIB - 4 * 32000 * d_model) / layer)),
        num_heads=d_model // 128,
        num_kv_heads=d_model // 512,
        head_dim=128,
        vocab_size=32000,
        num_experts=8,
        num_experts_per_tok=2,
        rope_theta=1e6,
        norm_eps=1e-5,
    )


def write_source(model: ModelConfig, directory: Path) -> int:
    """Writes a checkpoint in Hugging Face's classic keys, a file a layer; returns its size in bytes."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 24, np.float32) * 0.02).view(np.uint32)
    bits = (noise >> 16).astype(np.uint16)  # bfloat16 is the upper half of float32
    tensors = list(external_tensors(FORMATS["hf"], model))
    for layer in range(model.num_layers):
        mine = {tensor.key: tensor.shape for tensor in tensors if tensor.layer == layer}
        name = f"model-{layer + 1:05d}-of-{model.num_layers:05d}.safetensors"
        writer = SafetensorsWriter(directory / name, mine, "bfloat16")
        writer.create()
        for key, shape in mine.items():
            writer.write(key, [np.resize(np.roll(bits, rng.integers(1 << 24)), shape)])
    description = describe_hf(model, dtype="bfloat16", context=1, load_balance=0.0)
    (directory / "config.json").write_text(json.dumps(description))
    os.sync()
    return sum(file.stat().st_size for file in directory.iterdir())


if __name__ == "__main__":
    main()
