"""Imports and exports a synthetic checkpoint: time against a plain copy, and peak host memory.

    python benchmarks/weights_io.py --gib 8 --directory /scratch

The model's own arrays are device memory; on the CPU they live in the process, so their size is taken off its peak.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mixtral_jax.config import Config, DataConfig, ModelConfig, PrecisionConfig, TrainConfig
from mixtral_jax.runtime import make_runtime
from mixtral_jax.weights.exporting import EXPORT_FORMATS, export_weights
from mixtral_jax.weights.importing import import_weights
from mixtral_jax.weights.names import FORMATS, external_tensors
from mixtral_jax.weights.released import open_released
from mixtral_jax.weights.released_config import describe_hf
from mixtral_jax.weights.safetensors_files import SafetensorsWriter

GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the checkpoint (bfloat16)")
    parser.add_argument("--d-model", type=int, default=2048, help="8x7B: 4096")
    parser.add_argument("--d-ff", type=int, default=7168, help="8x7B: 14336")
    parser.add_argument("--params", choices=("bfloat16", "float32"), default="bfloat16", help="type of the arrays")
    parser.add_argument("--formats", nargs="+", choices=EXPORT_FORMATS, default=EXPORT_FORMATS)
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    options = parser.parse_args()

    model = architecture(options.gib, options.d_model, options.d_ff)
    config = Config(
        model=model,
        data=DataConfig(seq_len=1),
        train=TrainConfig(steps=1, batch_size=jax.device_count()),
        precision=PrecisionConfig(params=options.params),
    )
    runtime = make_runtime(config)
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        work = Path(name)
        size = write_source(model, work / "source")
        largest = max(int(np.prod(t.shape)) * 2 for f in options.formats for t in external_tensors(FORMATS[f], model))
        table = Table(title=f"{size / GIB:.2f} GiB, largest tensor {largest / GIB:.2f} GiB, {runtime.describe()}")
        for column in ("", "seconds", "MB/s", "of a plain copy", "peak host memory, GiB"):
            table.add_column(column, justify="right" if column else "left")

        copy_seconds, _ = measured(lambda: shutil.copytree(work / "source", work / "copy"), {})
        shutil.rmtree(work / "copy")

        def report(name: str, seconds: float, host_bytes: int | None) -> None:
            memory = "" if host_bytes is None else f"{host_bytes / GIB:.2f}"
            table.add_row(
                name, f"{seconds:.1f}", f"{size / seconds / 1e6:.0f}", f"{copy_seconds / seconds:.0%}", memory
            )

        report("plain copy", copy_seconds, None)
        arrays: dict[str, Any] = {}

        def load(source: Path) -> None:
            arrays.clear()
            arrays.update(import_weights(open_released(source), runtime))

        report("import hf", *measured(partial(load, work / "source"), arrays))
        for format_name in options.formats:
            out = work / format_name
            export = partial(export_weights, arrays, model, out, format_name, context=1, load_balance=0.0)
            report(f"export {format_name}", *measured(partial(export, dtype="bfloat16"), arrays))
            if format_name != "hf":
                report(f"import {format_name}", *measured(partial(load, out), arrays))
            shutil.rmtree(out)
    console.print(table)


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
        with SafetensorsWriter(directory / name, mine, "bfloat16") as writer:
            for key, shape in mine.items():
                writer.write(key, np.resize(np.roll(bits, rng.integers(1 << 24)), shape))
    description = describe_hf(model, dtype="bfloat16", context=1, load_balance=0.0)
    (directory / "config.json").write_text(json.dumps(description))
    os.sync()
    return sum(file.stat().st_size for file in directory.iterdir())


def measured(work: Callable[[], Any], arrays: Any) -> tuple[float, int]:
    """Runs `work`, what it wrote on disk; returns seconds and the peak of host memory without `arrays`, bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the old peak
    begin = time.perf_counter()
    work()
    os.sync()
    seconds = time.perf_counter() - begin
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    leaves = jax.tree.leaves(arrays)
    in_process = leaves if jax.devices()[0].platform == "cpu" else []
    return seconds, peak - sum(leaf.nbytes for leaf in in_process)


if __name__ == "__main__":
    main()
