"""Two kinds of plot as SVG text: bars for parts of a whole through steps, and columns over classes."""

from collections.abc import Mapping, Sequence
from html import escape

COLORS = ("#3b6fb6", "#d9803b", "#4f9d69", "#b5485d", "#7d63ab", "#8a6d4b", "#4aa5b5", "#9a9a3b")
WIDTH = 860
ROW = 26
LABEL = 210
VALUE = 150


def stacked_bars(rows: Sequence[tuple[str, Mapping[str, int]]], unit: str) -> str:
    """Draws one horizontal bar a row, parted by series.

    Args:
        rows: label, and the value of each series.
        unit: what the numbers count, written behind each row's sum.

    Returns:
        An SVG element with its legend.
    """
    names = _names([series for _, series in rows])
    most = max((sum(series.values()) for _, series in rows), default=0) or 1
    space = WIDTH - LABEL - VALUE
    parts: list[str] = []
    for number, (label, series) in enumerate(rows):
        y = number * ROW
        parts.append(f'<text x="{LABEL - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        x = float(LABEL)
        for name in names:
            width = space * series.get(name, 0) / most
            title = f"<title>{escape(name)}: {series.get(name, 0):,.0f} {unit}</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{ROW - 8}" fill="{_color(names, name)}">'
                f"{title}</rect>"
            )
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 17}">{sum(series.values()):,.0f} {unit}</text>')
    return _svg(parts, len(rows) * ROW) + _legend(names)


def columns(classes: Sequence[str], series: Mapping[str, Sequence[int]], caption: str) -> str:
    """Draws stacked columns.

    Args:
        classes: labels below the columns.
        series: values of each name, one a class.
        caption: what the classes are.

    Returns:
        An SVG element with its legend.
    """
    names = list(series)
    sums = [sum(series[name][place] for name in names) for place in range(len(classes))]
    most = max(sums, default=0) or 1
    height, step = 180, (WIDTH - 60) / max(1, len(classes))
    parts = []
    for place, label in enumerate(classes):
        x, y = 40 + place * step, height + 16.0
        for name in names:
            part = height * series[name][place] / most
            y -= part
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{step * 0.85:.1f}" height="{part:.1f}" '
                f'fill="{_color(names, name)}"><title>{escape(name)}, {escape(label)}: {series[name][place]:,.0f}'
                "</title></rect>"
            )
        middle = x + step * 0.425
        if sums[place]:
            parts.append(f'<text x="{middle:.1f}" y="{y - 3:.1f}" text-anchor="middle">{sums[place]:,.0f}</text>')
        parts.append(f'<text x="{middle:.1f}" y="{height + 32}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{height + 52}" text-anchor="middle">{escape(caption)}</text>')
    return _svg(parts, height + 60) + _legend(names)


def _names(rows: Sequence[Mapping[str, int]]) -> list[str]:
    return sorted({name for row in rows for name in row})


def _color(names: Sequence[str], name: str) -> str:
    return COLORS[list(names).index(name) % len(COLORS)]


def _svg(parts: list[str], height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = (f'<span><i style="background:{_color(names, name)}"></i>{escape(name)}</span>' for name in names)
    return f'<p class="legend">{"".join(items)}</p>'
