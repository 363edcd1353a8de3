"""Line charts as SVG: no library, no font, no request; readable in the light and in the dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["line_chart", "svg"]

COLOURS = ("#e45756", "#4c78a8", "#54a24b", "#b279a2", "#72b7b2", "#9d755d", "#f2a59d", "#eeca3b")
STYLE = (
    "<style>text{fill:#24292f;font-size:13px}.dim{fill:#57606a;font-size:12px}.axis{stroke:#8c959f}"
    ".cell{stroke:#8c959f;stroke-width:.5}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.dim{fill:#9198a1}}</style>"
)
_LEFT, _TOP, _WIDTH, _HEIGHT = 64, 40, 420, 260


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A picture out of its parts; ``label`` is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """1, 3, 10, 30, … and one beyond the values on either side."""
    steps = [
        s * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for s in (1, 3)
    ]
    inside = [i for i, s in enumerate(steps) if low <= s <= high]
    first, last = (inside[0], inside[-1]) if inside else (0, len(steps) - 1)
    return steps[max(0, first - 1) : last + 2]


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Lines through points, both axes logarithmic.

    Args:
        series: For each name its points, positive.
        title: Over the chart; says what the vertical axis is.
        x_label: Under it.
        colours: For names that always have the same.

    Raises:
        ValueError: there is nothing to draw.
    """
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    if not ys:
        raise ValueError("nothing to draw")
    ticks = _ticks(min(ys), max(ys))
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    left, right = math.log(xs[0]), math.log(xs[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if left == right else (math.log(x) - left) / (right - left)
        return _LEFT + 20 + (_WIDTH - 40) * across, _TOP + _HEIGHT * (high - math.log(y)) / (high - low)

    parts = [f'<text x="0" y="18" style="font-size:15px">{escape(title)}</text>']
    for tick in ticks:
        y = at(xs[0], tick)[1]
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" opacity="0.35"/>'
        )
        parts.append(f'<text class="dim" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in xs:
        where = f'x="{at(x, ticks[0])[0]:.1f}" y="{_TOP + _HEIGHT + 20}" text-anchor="middle"'
        parts.append(f'<text class="dim" {where}>{x:,g}</text>')
    where = f'x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 42}" text-anchor="middle"'
    parts.append(f'<text class="dim" {where}>{escape(x_label)}</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = (colours or {}).get(name, COLOURS[number % len(COLOURS)])
        placed = [at(*point) for point in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in placed]
        parts.append(f'<rect x="510" y="{_TOP + 24 * number}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="530" y="{_TOP + 11 + 24 * number}">{escape(name)}</text>')
    return svg(740, _TOP + _HEIGHT + 50, title, parts)
