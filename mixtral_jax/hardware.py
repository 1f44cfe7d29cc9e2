"""What the machine can do: THE table of chip peaks, a measured peak for the rest, and memory in use."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

GIB = 2**30

# Dense (not sparse) bfloat16 FLOP/s of one device as JAX counts devices; the start of `device_kind` names the chip and
# the first row that matches counts. Sources, by maker:
# TPU: the pages of v4, v5e, v5p and v6e at cloud.google.com/tpu/docs, "Peak compute per chip (bf16)".
# NVIDIA: the data sheets' FP16/BF16 Tensor Core rows, halved where they are "with sparsity".
CHIP_PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v4 lite", 138e12),  # v4i
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),  # v5e
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),  # JAX's name of v5p
    ("TPU v6 lite", 918e12),  # v6e
    ("TPU v6e", 918e12),
    ("NVIDIA A100", 312e12),  # A100 data sheet: 312, 624 with sparsity; SXM and PCIe alike
    ("NVIDIA H100 PCIe", 756.5e12),  # H100 data sheet: 1,513 with sparsity
    ("NVIDIA H100 NVL", 835.5e12),  # H100 data sheet: 1,671 with sparsity
    ("NVIDIA H100", 989.5e12),  # SXM; H100 data sheet: 1,979 with sparsity
    ("NVIDIA H200 NVL", 835.5e12),  # H200 data sheet: 1,671 with sparsity
    ("NVIDIA H200", 989.5e12),  # SXM; H200 data sheet: 1,979 with sparsity
    ("NVIDIA B200", 2250e12),  # HGX B200 data sheet: 4.5 PFLOP/s with sparsity
)


@dataclass(frozen=True)
class PeakFlops:
    """The speed that model FLOP utilisation is measured against, and where it comes from."""

    value: float  # FLOP/s of one device
    source: str  # a phrase for people: "989.5 TFLOP/s a device: bfloat16 peak of NVIDIA H100 by its data sheet"


def peak_flops(compute: DTypeLike) -> PeakFlops:
    """Finds the peak of one of this process's devices: by the table, or else by timing a matrix product.

    The devices of a simulated CPU mesh share the processor, so each gets its part of what was measured.

    Args:
        compute: float type of the model's products; used only when the peak must be measured.

    Returns:
        The peak of one device and, in words, what was assumed.
    """
    device, count = jax.local_devices()[0], jax.local_device_count()
    for name, value in CHIP_PEAKS:
        if device.device_kind.startswith(name) and "MIG" not in device.device_kind:  # a slice of a GPU has less
            return PeakFlops(
                value, f"{value / 1e12:,.1f} TFLOP/s a device: bfloat16 peak of {name} by its maker's data"
            )
    measured = measured_matmul_peak(compute)
    words = f"{measured / 1e9:,.0f} GFLOP/s: fastest {jnp.dtype(compute).name} matrix product timed at start"
    if device.platform != "cpu":
        return PeakFlops(measured, f"{words} on one {device.device_kind}, which the table of peaks does not hold")
    shared = f", shared by {count} simulated devices" if count > 1 else ""
    return PeakFlops(measured / count, f"{words} on this processor{shared}")


def measured_matmul_peak(compute: DTypeLike) -> float:
    """Times square matrix products of growing size, in under a second, and returns the fastest rate in FLOP/s."""
    product = jax.jit(jnp.matmul)
    best, size = 0.0, 256
    while size <= 8192:
        # Random numbers: on GPUs a product of zeros or ones draws less power and runs faster than real ones.
        values = np.random.default_rng(0).random((size, size), np.float32)
        operand = jnp.asarray(values, compute)
        product(operand, operand).block_until_ready()  # compiles
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            product(operand, operand).block_until_ready()
            seconds.append(time.perf_counter() - start)
        best = max(best, 2 * size**3 / min(seconds))
        if min(seconds) > 0.03:  # long enough to have reached the full rate; twice the size would take 8 times as long
            break
        size *= 2
    return best


def memory_in_use() -> dict[str, float]:
    """Reads the memory of this process and of its devices.

    Returns:
        In GiB: `memory_gib`, the highest resident size of the process so far as the system counts it;
        `memory_resident_gib`, the size now, on Linux; `device_memory_gib` and `device_memory_peak_gib`, of the fullest
        device of this process, where the platform reports it (a CPU does not).
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        kib = {name: int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS")}
        memory = {"memory_gib": kib["VmHWM"] * 1024 / GIB, "memory_resident_gib": kib["VmRSS"] * 1024 / GIB}
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
        memory = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    reports = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for name, key in (("device_memory_gib", "bytes_in_use"), ("device_memory_peak_gib", "peak_bytes_in_use")):
        used = [stats[key] for stats in reports if key in stats]
        if used:
            memory[name] = max(used) / GIB
    return memory
