"""Counts what a compiled program does on one device: FLOPs of its products and bytes to and from memory.

XLA's own cost analysis counts a loop's body once and is not there for CUDA programs compiled ahead of time.
"""

import math
import re
from dataclasses import dataclass

from mixtral_jax.planning.hlo import Computation, Instruction, Module, Shape

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "iota"}  # fmt: skip
SLICING = {"dynamic-slice", "gather", "slice"}

# Attention kernels by a part of their own or their library's name, the first that fits: products of all queries with
# all keys, of which causality leaves half.
ATTENTION_PRODUCTS = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4, "SoftmaxBackward": 5, "__cudnn$fmha": 2,
}  # fmt: skip

GROUPED = re.compile(r"(t?gmm|ragged-dot-none)\b")  # kernels of grouped products: megablox's two and XLA's for TPU
# Those of `kernels.gpu`. They leave padding rows alone; only the results of `gmm` are filled there.
ON_GPU = re.compile(r'[{ ]name = "(t?gmm|gmm_unfilled|swiglu)"|\bhopper_(t?gmm|gated)\b')


@dataclass(frozen=True)
class Work:
    """Of one device in one step."""

    dense: float  # FLOPs of XLA's products; rows of padding count, being computed
    attention: float  # FLOPs of the platform's attention kernels, the causal half
    grouped: float  # FLOPs of grouped expert products that skip padding rows, at a balanced load
    memory_bytes: float  # that the operations read from and write to the device's memory

    @property
    def flops(self) -> float:
        """All of them."""
        return self.dense + self.attention + self.grouped


def count_work(module: Module, *, attention_product: float, expert_rows: float, experts: int = 0) -> Work:
    """Counts the work of a program.

    Args:
        module: the program.
        attention_product: FLOPs of one causal product of queries with keys in one run of an attention kernel.
        expert_rows: rows of a device's grouped products that belong to somebody, at a balanced load.
        experts: of a device: as many matrices are read of a stack of all layers' by a kernel that takes the whole.
    """
    dense = attention = grouped = memory = 0.0
    for name, computation in module.computations.items():
        runs = module.runs[name]
        if not runs:
            continue
        for instruction in computation.values():
            dense += runs * _product_flops(instruction, computation)
            if instruction.opcode == "custom-call":
                name_and_target = f"{instruction.name} {instruction.attribute('custom_call_target')}"
                products = next((n for part, n in ATTENTION_PRODUCTS.items() if part in name_and_target), 0)
                attention += runs * products * attention_product
                if (ours := _our_kernel(instruction)) == "gated":  # two products
                    grouped += 2 * runs * _grouped_flops(instruction, computation, expert_rows)
                elif _is_grouped(instruction, ours) and len(instruction.shapes) == 1:
                    grouped += runs * _grouped_flops(instruction, computation, expert_rows)
            if name not in module.fused and instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
                memory += runs * _traffic(instruction, computation, module, expert_rows, experts)
    return Work(dense, attention, grouped, memory)


def _our_kernel(instruction: Instruction) -> str:
    found = ON_GPU.search(instruction.attributes)
    return (found[1] or found[2]) if found else ""


def _is_grouped(instruction: Instruction, ours: str) -> bool:
    return bool(GROUPED.match(instruction.name)) or ours not in ("", "swiglu")


def _operands(instruction: Instruction, computation: Computation) -> list[Instruction]:
    return [computation[name] for name in instruction.operands if name in computation]


def _product_flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "dot":
        axes = instruction.numbers("lhs_contracting_dims")
    elif instruction.opcode == "custom-call" and "__cublas$" in instruction.attributes:
        named = re.search(r'lhs_contracting_dimensions\\?":\[([^\]]*)\]', instruction.attributes)
        axes = [int(axis) for axis in re.findall(r"\d+", named[1])] if named else []
    else:
        return 0.0
    left = _operands(instruction, computation)[0].shapes[0]
    return 2.0 * instruction.shapes[0].elements * math.prod(left.dims[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """2 * batch * output features * input features * (pairs of a position and a tap inside the input)."""
    left, right = (operand.shapes[0].dims for operand in _operands(instruction, computation)[:2])
    out = instruction.shapes[0].dims
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    assert labels, instruction.attributes
    flops = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window")))
    for axis in sorted(set(labels[1]) - set("bf")):
        place = int(axis)

        def field(name: str, default: str, place: int = place) -> str:
            return window[name].split("x")[place] if name in window else default

        size, stride = right[labels[2].index(axis)], int(field("stride", "1"))
        low = int(field("pad", "0_0").split("_")[0])
        spread_left, spread_right = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
        reach = (left[labels[1].index(axis)] - 1) * spread_left + 1
        flops *= sum(
            0 <= (at := position * stride - low + tap * spread_right) < reach and at % spread_left == 0
            for position in range(out[labels[3].index(axis)])
            for tap in range(size)
        )
    return flops


def _grouped_flops(instruction: Instruction, computation: Computation, rows: float) -> float:
    """Rows [m, k] times each expert's [k, n], or for its gradient [k, m] times [m, n]: assigned rows alone count.

    A kernel that adds up several such products has the rows of each among its operands.
    """
    *experts, m, n = instruction.shapes[0].dims
    if experts:
        return 2.0 * rows * m * n
    matrices = [o.shapes[0].dims for o in _operands(instruction, computation) if len(o.shapes[0].dims) == 2]
    depth = sum(dims[1] for dims in matrices if dims[0] == m)
    return 2.0 * min(rows, m) * depth * n


def _in_memory(shapes: tuple[Shape, ...]) -> float:
    return sum((shape.bytes for shape in shapes if not shape.fast_memory), 0.0)


def _traffic(instruction: Instruction, computation: Computation, module: Module, rows: float, experts: int) -> float:
    """Bytes that an operation reads and writes; slices, gathers and updates in place count what they touch."""
    operands = _operands(instruction, computation)
    if ours := _our_kernel(instruction):
        # What `tgmm` takes of three dimensions is the stack that it writes a layer's part of.
        taken = (s for o in operands for s in o.shapes if ours != "tgmm" or len(s.dims) < 3)
        read = sum(_bytes_of_rows(shape, rows, experts) for shape in taken)
        return read + sum(s.bytes if ours == "gmm" else _bytes_of_rows(s, rows, experts) for s in instruction.shapes)
    if instruction.opcode in SLICING:
        return 2 * _in_memory(instruction.shapes)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _in_memory(operands[-1 if instruction.opcode == "scatter" else 1].shapes)
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called[0]]
        return sum((_read_by_fusion(inside, i, o) for i, o in enumerate(operands)), 0.0) + _written(instruction, inside)
    read = sum((_in_memory(operand.shapes) for operand in operands), 0.0)
    written = _in_memory(instruction.shapes)
    if instruction.opcode.endswith("-start") and len(instruction.shapes) > len(operands):
        written -= read  # the result names the operands again
    return read + max(written, 0.0)


def _bytes_of_rows(shape: Shape, rows: float, experts: int = 0) -> float:
    """Bytes of so many rows of a matrix, of so many matrices of a stack (0: all), of other arrays all."""
    most = {2: rows, 3: experts or math.inf}.get(len(shape.dims), math.inf)
    return shape.bytes * min(1.0, most / shape.dims[0]) if shape.dims else shape.bytes


def _uses(name: str, inside: Computation) -> list[Instruction]:
    """The operations that take a value, seen through those that only rename it."""
    users = [i for i in inside.values() if name in i.operands]
    return [u for user in users for u in (_uses(user.name, inside) if user.opcode == "bitcast" else [user])]


def _read_by_fusion(inside: Computation, index: int, operand: Instruction) -> float:
    whole = _in_memory(operand.shapes)
    parameter = next((i for i in inside.values() if i.opcode == "parameter" and i.literal == str(index)), None)
    users = _uses(parameter.name, inside) if parameter else []
    if whole == 0 or not users:
        return whole
    if all(user.opcode in SLICING for user in users):
        return min(whole, sum((user.bytes for user in users), 0.0))
    if all(user.opcode == "dynamic-update-slice" for user in users):
        return 0.0  # updated in place
    return whole


def _written(instruction: Instruction, inside: Computation) -> float:
    root = next(i for i in inside.values() if i.is_root)
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = 0.0
    for part, shape in zip(parts, instruction.shapes, strict=False):
        while part.opcode in ("bitcast", "copy") and part.operands and part.operands[0] in inside:
            part = inside[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            written += inside[part.operands[1]].bytes
        elif not shape.fast_memory:
            written += shape.bytes
    return written
