"""Reads a compiled program's text: computations, instructions, shapes, and how often each computation runs."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

from mixtral_jax.kernels.attention import UNUSUAL

BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]{1,4}\d+[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
CALLED = re.compile(r"\b(?:calls|called_computations|branch_computations|true_computation|false_computation)="
                    r"(\{[^}]*\}|%[\w.\-]+)")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """An array's type in a compiled program."""

    dtype: str
    dims: tuple[int, ...]
    fast_memory: bool  # lies in a core's own memory (TPU's memory space 1 and up), not in the device's

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = BITS[self.dtype] if self.dtype in BITS else int(digits[0]) if digits else 32
        return self.elements * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One operation of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    attributes: str  # the rest of the line
    is_root: bool
    literal: str  # what stands between the parentheses, for constants and parameters

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum((shape.bytes for shape in self.shapes), 0.0)

    @cached_property
    def called(self) -> list[str]:
        """Computations that it runs once each; a loop's are not among them."""
        found = [match[1] for match in CALLED.finditer(self.attributes)]
        return [name.lstrip("%") for entry in found for name in re.findall(r"%?[\w.\-]+", entry)]

    @property
    def source(self) -> str:
        """Name that the traced function gave the operation, without what JAX wraps around it."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, name: str) -> str:
        """Returns the value of `name=`: a braced list, or what stands before the next comma; empty if there is none."""
        match = re.search(rf"(?:^|[ ,]){name}=(\{{[^{{}}]*\}}|[^,{{ ]+)", self.attributes)
        return match[1] if match else ""

    def numbers(self, name: str) -> list[int]:
        """Returns the integers in the value of `name=`."""
        return [int(x) for x in re.findall(r"\d+", self.attribute(name))]


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    turns: int  # what a loop counts for whose number of turns depends on data

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one execution: loops multiply; of a condition, usual branches count."""
        counts = dict.fromkeys(self.computations, 0)

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    visit(
                        instruction.attribute("body").lstrip("%"), times * (self.trip_count(instruction) or self.turns)
                    )
                for called in instruction.called:
                    if instruction.opcode != "conditional" or not self._is_unusual(called):
                        visit(called, times)

        visit(self.entry, 1)
        return counts

    def _is_unusual(self, name: str) -> bool:
        return any(UNUSUAL in instruction.source for instruction in self.computations[name].values())

    @cached_property
    def fused(self) -> set[str]:
        """Names of computations inside fusions: their values do not reach the device's memory."""
        seeds = {
            called
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.opcode == "fusion"
            for called in instruction.called
        }
        inside: set[str] = set()
        while seeds:
            name = seeds.pop()
            if name not in inside:
                inside.add(name)
                seeds |= {called for i in self.computations[name].values() for called in i.called}
        return inside

    @cached_property
    def data_dependent_loops(self) -> int:
        """Number of loops that run, as they stand in the text, whose number of turns is not a constant."""
        every = (i for name, computation in self.computations.items() if self.runs[name] for i in computation.values())
        return sum(i.opcode == "while" and self.trip_count(i) is None for i in every)

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a loop's body runs: as the compiler notes it, or the constant that its condition names."""
        known = re.search(r'known_trip_count[\\"]*:\{[\\"]*n[\\"]*:[\\"]*(\d+)', loop.attributes)
        if known:
            return int(known[1])
        names, constants = [loop.attribute("condition").lstrip("%")], set()
        while names:
            for instruction in self.computations[names.pop()].values():
                names += instruction.called
                if instruction.opcode == "constant" and instruction.shapes[0].dims == ():
                    constants.add(instruction.literal)
        return int(constants.pop()) if len(constants) == 1 else None


def parse(text: str, turns: int = 1) -> Module:
    """Parses a compiled program's text.

    Args:
        text: what `jax.stages.Compiled.as_text` returns.
        turns: to assume of loops whose number of turns depends on data.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line.strip())
            current[instruction.name] = instruction
    return Module(computations, entry, turns)


def _instruction(line: str) -> Instruction:
    name, rest = line.split(" = ", 1)
    is_root = name.startswith("ROOT ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    shapes = tuple(
        Shape(dtype, tuple(int(re.sub(r"\D", "", x)) for x in dims.split(",") if x), "S(" in (layout or ""))
        for dtype, dims, layout in SHAPE.findall(rest[:end])
    )
    return Instruction(
        name=name.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[end:opening].strip(),
        shapes=shapes,
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=rest[closing + 1 :],
        is_root=is_root,
        literal=inside,
    )


def _closing(text: str, start: int) -> int:
    """Finds the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses: {text[:100]}")
