"""Charts as SVG: no library, no font, no request; readable in the light and in the dark, wide and narrow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["COLOURS", "bit_map", "layer_bars", "level_lines", "line_chart", "rope_map", "svg", "ticks"]

COLOURS = ("#e45756", "#4c78a8", "#54a24b", "#b279a2", "#72b7b2", "#9d755d", "#f2a59d", "#eeca3b")
STYLE = (
    "<style>text{fill:#24292f;font-size:13px}.dim{fill:#57606a;font-size:12px}.axis{stroke:#8c959f}"
    ".cell{stroke:#8c959f;stroke-width:.5}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.dim{fill:#9198a1}}</style>"
)
_LEFT, _TOP, _WIDTH, _HEIGHT = 64, 40, 420, 260
_LEGEND, _APART = 24, 44


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A picture out of its parts; ``label`` is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"


def ticks(low: float, high: float) -> list[float]:
    """1, 3, 10, 30, … and one beyond the values on either side."""
    steps = [
        s * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for s in (1, 3)
    ]
    inside = [i for i, s in enumerate(steps) if low <= s <= high]
    first, last = (inside[0], inside[-1]) if inside else (0, len(steps) - 1)
    return steps[max(0, first - 1) : last + 2]


def _even_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, some five of them, from below the values to above."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= span / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def level_lines(ticks: Mapping[float, float], width: int) -> list[str]:
    """A thin line across the chart for each tick, at its height, with the number left of it."""
    return [
        f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + width}" y1="{y:.1f}" y2="{y:.1f}" opacity="0.35"/>'
        f'<text class="dim" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick, y in ticks.items()
    ]


def _alike(line: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> bool:
    """Whether one would hide the other: nowhere two pixels apart."""
    return len(line) == len(other) and all(math.dist(a, b) < 2 for a, b in zip(line, other, strict=True))


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    colours: Mapping[str, str] | None = None,
    legend_below: bool = False,
    dots: bool = True,
    linear: bool = False,
    even: bool = False,
) -> str:
    """Lines through points, both axes logarithmic. A line that lies on an earlier one is dashed, so that both show.

    Args:
        series: For each name its points, positive.
        title: Over the chart; says what the vertical axis is.
        x_label: Under it.
        colours: For names that always have the same.
        legend_below: For pages that may be narrow; otherwise the names stand beside the chart.
        dots: Mark the points.
        linear: The vertical axis is not logarithmic.
        even: The horizontal one is not.

    Raises:
        ValueError: there is nothing to draw.
    """
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    if not ys:
        raise ValueError("nothing to draw")
    marks = _even_ticks(min(ys), max(ys)) if linear else ticks(min(ys), max(ys))
    scale = float if linear else math.log
    low, high = scale(marks[0]), scale(marks[-1])
    span = float if even else math.log
    left, right = span(xs[0]), span(xs[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if left == right else (span(x) - left) / (right - left)
        return _LEFT + 20 + (_WIDTH - 40) * across, _TOP + _HEIGHT * (high - scale(y)) / (high - low)

    parts = [f'<text x="0" y="18" style="font-size:15px">{escape(title)}</text>']
    parts += level_lines({tick: at(xs[0], tick)[1] for tick in marks[:: -(-len(marks) // 12)]}, _WIDTH)
    labelled = -math.inf
    for x in xs:
        # Labels that would touch are left out.
        if at(x, marks[0])[0] - labelled >= _APART:
            labelled = at(x, marks[0])[0]
            where = f'x="{labelled:.1f}" y="{_TOP + _HEIGHT + 20}" text-anchor="middle"'
            parts.append(f'<text class="dim" {where}>{x:,g}</text>')
    where = f'x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 42}" text-anchor="middle"'
    parts.append(f'<text class="dim" {where}>{escape(x_label)}</text>')
    drawn: list[list[tuple[float, float]]] = []
    for number, (name, points) in enumerate(series.items()):
        colour = (colours or {}).get(name, COLOURS[number % len(COLOURS)])
        placed = [at(*point) for point in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dash = ' stroke-dasharray="7 7"' if any(_alike(placed, other) for other in drawn) else ""
        drawn.append(placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in placed]
        x, y = (_LEFT, _TOP + _HEIGHT + 58) if legend_below else (_LEFT + _WIDTH + 26, _TOP)
        parts.append(f'<rect x="{x}" y="{y + _LEGEND * number}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 11 + _LEGEND * number}">{escape(name)}</text>')
    below = _LEGEND * len(series) + 10 if legend_below else 0
    return svg(500 if legend_below else 740, _TOP + _HEIGHT + 50 + below, title, parts)


def rope_map(
    cost_LF: Sequence[Sequence[float]],
    marks: Mapping[str, Sequence[Sequence[int]]],
    *,
    title: str,
    label: str = "Which frequencies keep RoPE, layer by layer",
) -> str:
    """A cell for each layer and frequency: shaded by what losing its rotation costs, marked where it rotates.

    Args:
        cost_LF: Of each layer and frequency, fastest first.
        marks: For each character the frequencies of each layer that it marks, repeated where several components rotate.
        title: Over the map; says what shade and marks are.
        label: For a screen reader.
    """
    frequencies, left, top = len(cost_LF[0]), 70, 40
    cell = max(12, min(36, 576 // frequencies))
    height = max(cell, 8 + 14 * len(marks))
    parts = [f'<text x="0" y="18" style="font-size:14px">{escape(title)}</text>']
    for layer, cost_F in enumerate(cost_LF):
        y, most = top + height * layer, max(cost_F) or 1.0
        parts.append(f'<text class="dim" x="0" y="{y + height / 2 + 4}">layer {layer}</text>')
        for f, cost in enumerate(cost_F):
            x = left + cell * f
            shade = f'fill="#4c78a8" fill-opacity="{cost / most:.2f}"'
            parts.append(f'<rect class="cell" x="{x}" y="{y}" width="{cell}" height="{height}" {shade}/>')
            for line, (mark, kept_L) in enumerate(marks.items()):
                count = list(kept_L[layer]).count(f)
                # Many heads may rotate at one frequency: then it says how many.
                text = mark * count if count * 9 <= cell else f"{mark}{count}"
                if count:
                    at = f'x="{x + cell / 2}" y="{y + 15 + 14 * line}" text-anchor="middle"'
                    parts.append(f'<text {at} style="font-size:{11 if cell >= 24 else 9}px">{text}</text>')
    bottom = top + height * len(cost_LF) + 18
    for f in range(0, frequencies, -(-frequencies // 16)):
        at = f'x="{left + cell * f + cell / 2}" y="{bottom}" text-anchor="middle"'
        parts.append(f'<text class="dim" {at}>{f}</text>')
    parts.append(f'<text class="dim" x="0" y="{bottom}">frequency</text>')
    return svg(left + cell * frequencies + 4, bottom + 10, label, parts)


def layer_bars(values: Mapping[str, Sequence[int]], *, title: str, full: int) -> str:
    """Stacked bars, one a layer, on a scale that ends at ``full``.

    Args:
        values: For each name its part of every layer's bar.
        title: Over the bars.
        full: What a whole bar would be.
    """
    layers, left, width, bar = len(next(iter(values.values()))), 70, 380, 20
    parts = [f'<text x="0" y="18" style="font-size:15px">{escape(title)}</text>']
    for layer in range(layers):
        x, y = float(left), 34 + bar * layer
        parts.append(f'<text class="dim" x="0" y="{y + 13}">layer {layer}</text>')
        parts.append(f'<rect class="cell" x="{left}" y="{y}" width="{width}" height="{bar - 4}" fill="none"/>')
        for colour, parts_L in zip(COLOURS, values.values(), strict=False):
            size = width * parts_L[layer] / full
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{bar - 4}" fill="{colour}"/>')
            x += size
        total = " + ".join(str(parts_L[layer]) for parts_L in values.values())
        parts.append(f'<text class="dim" x="{x + 6:.1f}" y="{y + 12}">{total}</text>')
    y = 34 + bar * layers + 8
    for number, (colour, name) in enumerate(zip(COLOURS, values, strict=False)):
        parts.append(f'<rect x="{left + 180 * number}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + 180 * number + 20}" y="{y + 11}">{escape(name)}</text>')
    return svg(500, y + 24, title, parts)


def bit_map(segments_L: Sequence[Sequence[Sequence[Sequence[int]]]], names: Sequence[str], *, title: str) -> str:
    """A row for each layer: its components side by side, the widest of each part first, shaded by their bits.

    Args:
        segments_L: Of each layer and part ``(bits, values)``, the widest first.
        names: Of the parts.
        title: Over the rows.
    """
    left, width, gap, bar = 70, 560, 10, 16
    sizes = [max(sum(count for _, count in parts[n]) for parts in segments_L) for n in range(len(names))]
    scale, widest = (width - gap * (len(names) - 1)) / sum(sizes), 8
    drawn = [f'<text x="0" y="18" style="font-size:14px">{escape(title)}</text>']
    starts = [left + scale * sum(sizes[:n]) + gap * n for n in range(len(names))]
    drawn += [
        f'<text class="dim" x="{x:.1f}" y="38">{escape(name)}</text>' for x, name in zip(starts, names, strict=True)
    ]
    for layer, parts in enumerate(segments_L):
        y = 46 + bar * layer
        drawn.append(f'<text class="dim" x="0" y="{y + 11}">layer {layer}</text>')
        for start, segments in zip(starts, parts, strict=True):
            x = start
            for bits, count in segments:
                shade = f'fill="#4c78a8" fill-opacity="{bits / widest:.2f}"'
                drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{scale * count:.1f}" height="{bar - 2}" {shade}/>')
                if bits and scale * count > 12:
                    at = f'x="{x + scale * count / 2:.1f}" y="{y + 11}" text-anchor="middle"'
                    drawn.append(f'<text {at} style="font-size:10px">{bits}</text>')
                x += scale * count
            drawn.append(
                f'<rect class="cell" x="{start:.1f}" y="{y}" width="{x - start:.1f}" height="{bar - 2}" fill="none"/>'
            )
    return svg(left + width + 4, 46 + bar * len(segments_L) + 6, title, drawn)
