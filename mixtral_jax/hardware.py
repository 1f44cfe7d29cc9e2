"""What the machine can do: THE table of chips, a measured peak for the rest, and memory in use."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Num

GIB = 2**30
Product = Callable[[Num[Array, "m k"], Num[Array, "k n"]], Num[Array, "m n"]]
SIZES = (256, 512, 1024, 2048, 4096, 8192)  # of products that are timed; the first four are enough for a CPU
ENOUGH = 0.2  # seconds of products of one size: one that takes longer is timed once


@dataclass(frozen=True)
class Interconnect:
    """How devices of one kind reach each other; every speed is bytes/s in one direction."""

    links: int  # TPU: of a chip, two for each dimension of its torus; GPU: 1, into the switch of its node
    link: float  # speed of one of them
    far: float  # a device's share of the network between slices or nodes


@dataclass(frozen=True)
class Chip:
    """What one device, as JAX counts devices, can do by its maker's data."""

    kind: str  # the start of JAX's `device_kind`; the first row that matches counts
    flops: float  # dense (not sparse) bfloat16 FLOP/s
    memory: float  # bytes that a program can have
    bandwidth: float  # bytes/s between the device and its memory
    network: Interconnect | None = None  # None: not in the table


# Sources, by maker.
# TPU: the pages of v4, v5e, v5p and v6e at cloud.google.com/tpu/docs: "Peak compute per chip (bf16)", "HBM capacity and
# bandwidth", "Bidirectional inter-chip interconnect bandwidth per chip" (halved for one direction, divided by the ports
# of a chip), "Data center network bandwidth per chip" (v5e, v6e: the host's network cards divided by its 8 chips; v4:
# not published, half of v5p's is assumed). Memory is what the compiler (libtpu) gives a program, a little less than is
# built in. v4i: Ten Lessons From Three Generations, ISCA 2021.
# NVIDIA: data sheets of A100, H100, H200 and HGX B200: FP16/BF16 Tensor Core rows, halved where they are "with
# sparsity", memory bandwidth, NVLink (halved for one direction); the network card that DGX systems give each GPU,
# 200 Gbit/s with A100 and 400 Gbit/s with the others. Memory is what the CUDA runtime reports, where known.
CHIPS: tuple[Chip, ...] = (
    Chip("TPU v4 lite", 138e12, 8.0 * GIB, 614e9),
    Chip("TPU v4", 275e12, 30.75 * GIB, 1228e9, Interconnect(6, 50e9, 3.125e9)),
    Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, Interconnect(4, 50e9, 3.125e9)),  # v5e
    Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, Interconnect(4, 50e9, 3.125e9)),
    Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, Interconnect(6, 100e9, 6.25e9)),
    Chip("TPU v5", 459e12, 95.74 * GIB, 2765e9, Interconnect(6, 100e9, 6.25e9)),  # JAX's name of v5p
    Chip("TPU v6 lite", 918e12, 31.25 * GIB, 1600e9, Interconnect(4, 100e9, 12.5e9)),  # v6e
    Chip("TPU v6e", 918e12, 31.25 * GIB, 1600e9, Interconnect(4, 100e9, 12.5e9)),
    Chip("NVIDIA A100-SXM4-40GB", 312e12, 40e9, 1555e9, Interconnect(1, 300e9, 25e9)),
    Chip("NVIDIA A100", 312e12, 85100068864.0, 2039e9, Interconnect(1, 300e9, 25e9)),
    Chip("NVIDIA H100 PCIe", 756.5e12, 80e9, 2039e9),
    Chip("NVIDIA H100 NVL", 835.5e12, 94e9, 3938e9),
    Chip("NVIDIA H100", 989.5e12, 84942979072.0, 3352e9, Interconnect(1, 450e9, 50e9)),  # SXM
    Chip("NVIDIA H200 NVL", 835.5e12, 141e9, 4800e9),
    Chip("NVIDIA H200", 989.5e12, 151397597184.0, 4800e9, Interconnect(1, 450e9, 50e9)),  # SXM
    Chip("NVIDIA B200", 2250e12, 191514411008.0, 7700e9, Interconnect(1, 900e9, 50e9)),
)


def find_chip(kind: str) -> Chip | None:
    """Returns the table's row for a `device_kind`; a slice of a GPU (MIG) has none."""
    return next((chip for chip in CHIPS if kind.startswith(chip.kind) and "MIG" not in kind), None)


@dataclass(frozen=True)
class PeakFlops:
    """The speed that model FLOP utilisation is measured against, and where it comes from."""

    value: float  # FLOP/s of one device
    source: str  # a phrase for people: "989.5 TFLOP/s a device: bfloat16 peak of NVIDIA H100 by its data sheet"


def peak_flops(compute: DTypeLike, multiply: Product = jnp.matmul) -> PeakFlops:
    """Finds the peak of one of this process's devices: by the table, or else by timing a matrix product.

    The devices of a simulated CPU mesh share the processor, so each gets its part of what was measured.

    Args:
        compute: float type of the model's products; used only when the peak must be measured.
        multiply: what multiplies two matrices in the model; used only then, too.

    Returns:
        The peak of one device and, in words, what was assumed.
    """
    device, count = jax.local_devices()[0], jax.local_device_count()
    chip = find_chip(device.device_kind)
    if chip is not None:
        words = f"{chip.flops / 1e12:,.1f} TFLOP/s a device: bfloat16 peak of {chip.kind} by its maker's data"
        return PeakFlops(chip.flops, words)
    measured = measured_matmul_peak(compute, multiply)
    words = f"{measured / 1e9:,.0f} GFLOP/s: fastest {jnp.dtype(compute).name} matrix product timed at start"
    if device.platform != "cpu":
        return PeakFlops(measured, f"{words} on one {device.device_kind}, which the table of peaks does not hold")
    shared = f", shared by {count} simulated devices" if count > 1 else ""
    return PeakFlops(measured / count, f"{words} on this processor{shared}")


def measured_matmul_peak(compute: DTypeLike, multiply: Product = jnp.matmul) -> float:
    """Times square matrix products of growing size and returns the fastest rate in FLOP/s.

    The sizes do not depend on what is measured, so that a second start compiles none of them.
    """
    product = jax.jit(multiply)
    best = 0.0
    for size in SIZES[: 4 if jax.local_devices()[0].platform == "cpu" else None]:
        # Random numbers: on GPUs a product of zeros or ones draws less power and runs faster than real ones.
        values = np.random.default_rng(0).random((size, size), np.float32)
        operand = jnp.asarray(values, compute)
        compiled = product.lower(operand, operand).compile()
        seconds: list[float] = []
        while len(seconds) < 3 and sum(seconds) < ENOUGH:
            start = time.perf_counter()
            compiled(operand, operand).block_until_ready()
            seconds.append(time.perf_counter() - start)
        best = max(best, 2 * size**3 / min(seconds))
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
