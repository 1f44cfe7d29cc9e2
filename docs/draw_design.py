"""Draws docs/images/house.svg, the rooms by floors, from the imports: `python -m docs.draw_design`.

An arrow that follows from others is left out, and so are those from higher floors to the lowest, which all stand on.
"""

import functools
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from mixtral_jax.kernels.backends import BACKENDS
from tests.imports import floor, graph, modules

PICTURE = Path(__file__).parent / "images" / "house.svg"
WIDTH, LEFT = 960, 50  # of the picture; of its first box
HEIGHT, ROW, GAP = 26, 56, 44  # of a box; from one row to the next; between boxes
BANDS = ("#f3f5f8", "#e6ebf2")
FILL = {"kernels": "#f6dcc0", "model": "#cfe3d2", "training": "#cfe3d2"}  # other folders are white

Room = tuple[str, int]  # a folder, an engine or a module outside of folders; its part on one floor


def room(module: str) -> Room:
    """Names the room that a module is in."""
    folder = module.rpartition(".")[0]
    return (f"{folder.replace('.', '/')}/" if folder and not module.endswith(".py") else module), floor(module)


def arrows() -> dict[Room, set[Room]]:
    """Finds which rooms each imports, without those that it reaches through another of them."""
    edges: dict[Room, set[Room]] = defaultdict(set)
    for module, others in graph().items():
        if modules()[module].name != "__init__.py":
            edges[room(module)] |= {room(other) for other in others} - {room(module)}

    @functools.cache
    def below(name: Room) -> frozenset[Room]:
        return frozenset(edges[name]).union(*(below(other) for other in edges[name]))

    def drawn(name: Room, other: Room) -> bool:
        return not any(other in below(between) for between in edges[name]) and (other[1] > 0 or name[1] == 0)

    return {name: {other for other in edges[name] if drawn(name, other)} for name in edges}


def rows(edges: dict[Room, set[Room]]) -> list[list[Room]]:
    """Sorts the rooms into rows, the lowest first: by floor, and inside of a floor by who imports whom."""

    @functools.cache
    def depth(name: Room) -> int:
        return max((depth(other) + 1 for other in edges[name] if other[1] == name[1]), default=0)

    found: dict[tuple[int, int], list[Room]] = defaultdict(list)
    for name in sorted(edges):
        found[name[1], depth(name)].append(name)
    return [found[key] for key in sorted(found)]


@functools.cache
def label(name: Room) -> str:
    """Writes a room's folder, and its files where they are few and others of the folder are elsewhere."""
    files = [module for module in graph() if modules()[module].name != "__init__.py" and room(module) == name]
    parted = {room(module)[1] for module in graph() if room(module)[0] == name[0]} != {name[1]}
    return name[0] + (", ".join(file.split(".")[-1] for file in files) if parted and len(files) < 3 else "")


def width(name: Room) -> float:
    """Measures the box of a room."""
    return 22 + 7.3 * len(label(name))


def places(levels: list[list[Room]], edges: dict[Room, set[Room]]) -> dict[Room, float]:
    """Finds the middle of each box: near the boxes that it has arrows with, and beside those of its row."""
    near: dict[Room, set[Room]] = defaultdict(set)
    for name, others in edges.items():
        for other in others:
            near[name].add(other)
            near[other].add(name)
    middle = {name: (i + 1) * WIDTH / (len(row) + 1) for row in levels for i, name in enumerate(row)}
    for turn in range(60):
        for row in levels if turn % 2 else reversed(levels):
            wished = {
                name: sum(middle[o] for o in near[name]) / len(near[name]) if near[name] else middle[name]
                for name in row
            }
            row.sort(key=lambda name: (wished[name], name))
            for name in row:
                middle[name] = wished[name]
            gap = max(GAP, min(150, (0.8 * WIDTH - sum(map(width, row))) / len(row)))
            for _ in range(40):  # push boxes apart that overlap
                for a, b in pairwise(row):
                    lap = (width(a) + width(b)) / 2 + gap - (middle[b] - middle[a])
                    if lap > 0:
                        middle[a] -= lap / 2
                        middle[b] += lap / 2
                for name in row:
                    middle[name] = min(max(middle[name], LEFT + width(name) / 2), WIDTH - 20 - width(name) / 2)
    return middle


def draw() -> str:
    """Renders the picture."""
    edges = arrows()
    levels = rows(edges)
    middle = places(levels, edges)
    top = {name: (len(levels) - 1 - level) * ROW + 16 for level, row in enumerate(levels) for name in row}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {len(levels) * ROW}" font-family="sans-serif">',
        "<style>path{fill:none;stroke:#5a6b80;stroke-width:1.1} .late{stroke:#c0702a;stroke-dasharray:5 4}"
        " .box{stroke:#44546a} text{font-size:13px;text-anchor:middle;fill:#1c2733}</style>",
    ]
    for number in sorted({name[1] for name in edges}):
        tops = [top[name] for name in edges if name[1] == number]
        y, height = min(tops) - 16, max(tops) - min(tops) + ROW
        out.append(f'<rect y="{y}" width="{WIDTH}" height="{height}" fill="{BANDS[number % 2]}"/>')
        out.append(f'<text x="24" y="{y + height / 2 + 5:.0f}">{number}</text>')
    late = {room(f"kernels.{b.module}") for backends in BACKENDS.values() for b in backends if b.module}
    lines = [(name, other, "") for name in sorted(edges) for other in sorted(edges[name])]
    lines += [(("kernels/", 1), name, ' class="late"') for name in sorted(late - {("kernels/", 1)})]
    for name, other, kind in lines:
        x, y, to, end = middle[name], top[name] + HEIGHT, middle[other], top[other]
        if end < y:  # an engine above the operations that load it
            x, to, y, end = x + 12, to + 12, top[name], top[other] + HEIGHT
        bend = (end - y) / 2
        out.append(f'<path{kind} d="M{x:.0f} {y}C{x:.0f} {y + bend:.0f} {to:.0f} {end - bend:.0f} {to:.0f} {end}"/>')
    for name in sorted(edges):
        x, fill = middle[name], FILL.get(name[0].split("/")[0], "white")
        out.append(
            f'<rect class="box" x="{x - width(name) / 2:.0f}" y="{top[name]}" width="{width(name):.0f}"'
            f' height="{HEIGHT}" rx="5" fill="{fill}"/><text x="{x:.0f}" y="{top[name] + 18}">{label(name)}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
