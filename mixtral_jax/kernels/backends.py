"""THE table of backends: which an operation has, where each runs, and what `auto` takes, which is the first that fits.

The configuration's values, errors, `Runtime.describe`, docs/config.md and the benchmarks' choices are read from it. An
engine of one platform is imported through the module that its line names, and by `load` alone.
"""

import functools
import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mixtral_jax.config import UserError

HOPPER = 9.0  # compute capability
HOPPER_HEIGHT, HOPPER_WIDTH = 128, 256  # rows and columns of a tile of its grouped products
LARGEST_AMX_HEAD = 256  # elements; what is made of some blocks of such heads fits the L2 cache


@dataclass(frozen=True)
class Target:
    """What the choice of a backend depends on."""

    platform: str  # cpu, gpu or tpu
    devices: int = 1
    full_compute: bool = True  # activations and products in float32; so the next two
    full_params: bool = True
    full_moments: bool = True  # of the optimizer
    eight_bit: bool = False  # the experts' factors
    capability: float = 0.0  # compute capability of a GPU
    expert_devices: int = 1  # that exchange rows
    expert_parts: int = 1  # that an expert's matrices are gathered from
    head_dim: int = 0
    d_model: int = 0  # and the next one: of the experts on one device
    d_ff: int = 0
    matmul: str = "xla"  # backend of dense products


@dataclass(frozen=True)
class Need:
    """A condition of a backend, and what an error says when it does not hold."""

    holds: Callable[[Target], bool]
    problem: str  # may name fields of the target
    remedy: str = ""
    short: str = ""  # for the table in the documentation


@dataclass(frozen=True)
class Backend:
    """One line of the table."""

    name: str
    platforms: tuple[str, ...]  # where `auto` may take it
    module: str  # below `kernels`, imported when it is used
    what: str  # for the documentation
    needs: tuple[Need, ...] = ()
    auto_needs: tuple[Need, ...] = ()  # what `auto` wants beside
    if_asked: tuple[str, ...] = ()  # where it runs too, but slowly or interpreted
    in_words: str = ""  # `describe` adds it
    row_multiple: int = 1  # would have every expert begin at a multiple of so many rows
    reads_stack: bool = False  # reads the experts' weights where they lie in the stack of all layers
    writes_stack: bool = False  # and can write their gradients there
    reads_held: bool = False  # decodes from all weights as they are held
    few_rows: bool = False  # decodes a few rows from the weights of chosen experts, more like evaluation


def on_x86() -> bool:
    """Says whether this machine can have engines for CPUs at all."""
    known = sys.platform.startswith("linux") and platform.machine() == "x86_64"
    return known and importlib.util.find_spec("numba") is not None


@functools.cache
def available(engine: str) -> bool:
    """Says whether this machine has an engine for matrix products on CPUs, and makes it ready."""
    if not on_x86():
        return False
    loaded: bool = importlib.import_module(f"mixtral_jax.kernels.cpu.{engine}").load()
    return loaded


@functools.cache
def amd_with_avx512(about: Path = Path("/proc/cpuinfo")) -> bool:
    """Says whether this machine has AVX-512 that oneMKL leaves alone, for the processor is not Intel's."""
    text = about.read_text() if about.exists() else ""
    return "AuthenticAMD" in text and "avx512f" in text


ALL, CPU, GPU, TPU = ("cpu", "gpu", "tpu"), ("cpu",), ("gpu",), ("tpu",)
ONE_CPU = Need(
    lambda t: t.devices == 1 and t.full_compute and t.full_params,
    "computes in float32 on one CPU device",
    short="float32, one device",
)
NOT_FLOAT32 = Need(
    lambda t: not t.full_compute, "does not compute in float32", "set precision.compute=bfloat16", "types of two bytes"
)
NOT_8_BIT = Need(
    lambda t: not t.eight_bit, "has no products of 8 bits", "set precision.experts=compute", "no 8-bit factors"
)
HEAD = Need(
    lambda t: t.head_dim <= LARGEST_AMX_HEAD,
    f"takes a model.head_dim of up to {LARGEST_AMX_HEAD}, not {{head_dim}}",
    short=f"heads of up to {LARGEST_AMX_HEAD}",
)
IS_HOPPER = Need(
    lambda t: t.capability == HOPPER,
    f"is for GPUs of compute capability {HOPPER}, not {{capability}}",
    short="H100, H200",
)
WIDTHS = Need(
    lambda t: t.d_model % HOPPER_WIDTH == t.d_ff % HOPPER_WIDTH == 0,
    f"takes model.d_model and a device's share of model.d_ff in steps of {HOPPER_WIDTH}, not {{d_model}} and {{d_ff}}",
    short=f"widths in steps of {HOPPER_WIDTH}",
)
NO_EXCHANGE = Need(
    lambda t: t.expert_devices == 1,
    "computes all of a buffer, of which rows of other devices fill little",
    "set mesh.expert=1",
    "no exchange of rows",
)
WHOLE_EXPERTS = Need(
    lambda t: t.expert_parts == 1, "cannot gather the weights of some experts", "set mesh.fsdp=1", "mesh.fsdp=1"
)
AMX = Need(lambda _: available("amx"), "needs a processor with AMX, Linux, and pip install numba", short="AMX")
NUMBA = Need(lambda _: on_x86(), "needs Linux on x86 and pip install numba", short="package numba")
MKL = Need(lambda _: available("mkl"), "needs packages: pip install mkl numba", short="package mkl")
INTEL_OR_AVX2 = Need(lambda _: not amd_with_avx512(), "is slower than XLA here", short="`auto`: not AMD's AVX-512")


def _with_matmul(*names: str) -> Need:
    key = f"kernels.matmul={' or '.join(names)}"
    return Need(lambda t: t.matmul in names, f"needs {key}", "set both", key)


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "matmul": (
        Backend("amx", CPU, "cpu.matmul", "x86's matrix units, a float32 as a sum of two bfloat16: errors of 4e-6",
                (ONE_CPU, AMX), in_words=" (a float32 as two bfloat16)"),
        Backend("mkl", CPU, "cpu.matmul", "oneMKL's float32 products", (ONE_CPU, MKL), (INTEL_OR_AVX2,)),
        Backend("xla", ALL, "matmul", "XLA's own"),
    ),
    "cross_entropy": (
        Backend("amx", CPU, "cpu.cross_entropy", "a chunk's logits in the cache", (_with_matmul("amx"),)),
        Backend("mkl", CPU, "cpu.cross_entropy", "the same", (_with_matmul("mkl"),)),
        Backend("xla", ALL, "cross_entropy", "XLA's loops", (_with_matmul("xla"),)),
    ),
    "attention": (
        Backend("amx", CPU, "cpu.amx_attention", "on x86's matrix units", (_with_matmul("amx"), HEAD)),
        Backend("cudnn", GPU, "gpu.cudnn", "cuDNN's flash attention", (NOT_FLOAT32,)),
        Backend("splash", TPU, "tpu.splash", "JAX's splash kernel for TPU", if_asked=CPU),
        Backend("blockwise", ALL, "blockwise", "portable blocks, linear in memory"),
    ),
    "experts": (
        Backend("amx", CPU, "cpu.experts", "on x86's matrix units", (NOT_8_BIT, _with_matmul("amx")),
                reads_stack=True),
        Backend("mkl", CPU, "cpu.experts", "oneMKL's products in one batch", (NOT_8_BIT, _with_matmul("mkl")),
                reads_stack=True),
        Backend("hopper", GPU, "gpu.hopper_ffn", "our grouped kernels for Hopper: TMA, warp specialisation",
                (IS_HOPPER, NOT_FLOAT32, WIDTHS, NO_EXCHANGE), row_multiple=HOPPER_HEIGHT, reads_stack=True,
                writes_stack=True),
        Backend("triton", GPU, "gpu.triton_grouped", "our grouped kernels, from compute capability 8.0", if_asked=CPU),
        Backend("megablox", TPU, "tpu.megablox", "JAX's grouped kernel for TPU", if_asked=CPU),
        Backend("ragged_dot", GPU, "expert_ffn", "XLA's grouped product, dense but on TPU", (NOT_8_BIT,),
                if_asked=("cpu", "tpu")),
        Backend("grouped_blocks", CPU, "grouped_blocks", "portable, any number of blocks", if_asked=("gpu", "tpu")),
    ),
    "exchange": (
        Backend("ragged", ("gpu", "tpu"), "exchange", "just the rows that another device needs"),
        Backend("gather", CPU, "exchange", "all tokens to all devices, and sums back", if_asked=("gpu", "tpu")),
        Backend("padded", (), "exchange", "blocks of one size", if_asked=ALL),
    ),
    "rows": (
        Backend("triton", GPU, "gpu.triton_rows", "our kernels, which read each token once"),
        Backend("xla", ALL, "permutation", "gathers"),
    ),
    "decoding": (
        Backend("stored", CPU, "cpu.stored_matmul", "the weights of chosen experts, read once as they are stored",
                (Need(lambda t: t.devices == 1, "is for one device", short="one device"), NOT_8_BIT, NUMBA),
                reads_held=True),
        Backend("chosen", ALL, "chosen_experts", "for a few tokens the weights of chosen experts, for more as `xla`",
                (NOT_8_BIT, WHOLE_EXPERTS), few_rows=True),
        Backend("xla", ALL, "expert_ffn", "what evaluation takes"),
    ),
    "adamw": (
        Backend("fused", CPU, "cpu.adamw", "one pass over memory, in place",
                (Need(lambda t: t.full_moments, "computes in float32", short="float32 moments"),
                 _with_matmul("amx", "mkl"))),
        Backend("xla", ALL, "adamw", "XLA's loops"),
    ),
}  # fmt: skip


def find(operation: str, name: str) -> Backend:
    """Looks up a line of the table."""
    return next(backend for backend in BACKENDS[operation] if backend.name == name)


def names(operation: str) -> list[str]:
    """Lists the values of `kernels.<operation>` beside `auto`."""
    return [backend.name for backend in BACKENDS[operation]]


def load(operation: str, name: str) -> ModuleType:
    """Imports the module of a backend."""
    return importlib.import_module(f"mixtral_jax.kernels.{find(operation, name).module}")


def check_name(operation: str, name: str) -> None:
    """Raises `UserError` for a backend that the operation does not have on any platform."""
    values = ["auto", *names(operation)]
    if name not in values:
        raise UserError(f"kernels.{operation}: Invalid value '{name}', expected one of {values}")


def choose(operation: str, name: str, target: Target) -> str:
    """Resolves `auto`, and checks what is asked for by name.

    Raises:
        UserError: a backend that does not run on the target; the sentence names those that do.
    """
    check_name(operation, name)
    fitting = [b for b in BACKENDS[operation] if target.platform in b.platforms and _unmet(b, target) is None]
    if name == "auto":
        return next(b.name for b in fitting if all(need.holds(target) for need in b.auto_needs))
    backend = find(operation, name)
    if target.platform not in backend.platforms + backend.if_asked:
        problem, remedy = f"does not run on {target.platform}", ""
    else:
        unmet = _unmet(backend, target)
        if unmet is None:
            return name
        problem, remedy = unmet.problem.format(**vars(target)), unmet.remedy
    others = " or ".join(["auto", *(b.name for b in fitting)])
    raise UserError(f"kernels.{operation}={name} {problem}: {f'{remedy}, or ' if remedy else ''}use {others}")


def _unmet(backend: Backend, target: Target) -> Need | None:
    return next((need for need in backend.needs if not need.holds(target)), None)
