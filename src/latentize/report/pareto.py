"""What is lost against what is stored: which models are worth having."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from latentize.report.chart import COLOURS, level_lines, svg, ticks

__all__ = ["pareto_chart"]

# Nats per token; less is drawn there, as the source is, which loses nothing.
_FLOOR = 1e-3
_LEFT, _TOP, _WIDTH, _HEIGHT, _LINE, _NEAR = 64, 40, 480, 280, 22, 12


def pareto_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Excess loss against bytes, both logarithmic, a number at each point; the line joins what nothing dominates.

    Args:
        rows: Of ``latentize compare``.
    """
    points = [(row["cache_bytes_per_token"], max(row["excess_loss"], _FLOOR)) for row in rows]
    across, up = (ticks(min(values), max(values)) for values in zip(*points, strict=True))

    def share(value: float, axis: Sequence[float]) -> float:
        return (math.log(value) - math.log(axis[0])) / (math.log(axis[-1]) - math.log(axis[0]))

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * share(x, across), _TOP + _HEIGHT * (1 - share(y, up))

    parts = ['<text x="0" y="18" style="font-size:15px">Excess loss, nats per token</text>']
    parts += level_lines({tick: at(across[0], tick)[1] for tick in up}, _WIDTH)
    for tick in across:
        where = f'x="{at(tick, up[0])[0]:.1f}" y="{_TOP + _HEIGHT + 20}" text-anchor="middle"'
        parts.append(f'<text class="dim" {where}>{tick:,g}</text>')
    where = f'x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 42}" text-anchor="middle"'
    parts.append(f'<text class="dim" {where}>bytes of cache a token, all layers</text>')
    front = sorted(point for point, row in zip(points, rows, strict=True) if row["dominated_by"] is None)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in front))
    parts.append(f'<polyline class="axis" points="{path}" fill="none" stroke-dasharray="4 3"/>')
    colours = {model: COLOURS[n % len(COLOURS)] for n, model in enumerate(dict.fromkeys(r["model"] for r in rows))}
    places = [at(*point) for point in points]
    for number, (place, row) in enumerate(zip(places, rows, strict=True), 1):
        parts += _marked(number, place, row, colours[row["model"]])
    parts += [
        f'<text class="dim" x="{x + 8:.1f}" y="{y - 6:.1f}">{" ".join(map(str, numbers))}</text>'
        for (x, y), numbers in _together(places)
    ]
    bottom = _TOP + _HEIGHT + 70 + _LINE * len(rows)
    note = f"hollow: another is no worse in both; below {_FLOOR:g} nats is drawn at {_FLOOR:g}"
    parts.append(f'<text class="dim" x="0" y="{bottom}">{note}</text>')
    return svg(_LEFT + _WIDTH + 20, bottom + 10, "Excess loss against bytes of cache", parts)


def _together(places: Sequence[tuple[float, float]]) -> list[tuple[tuple[float, float], list[int]]]:
    """Numbers of points that are too near each other for a label each, with the first one's place."""
    found: list[tuple[tuple[float, float], list[int]]] = []
    for number, place in enumerate(places, 1):
        near = next((numbers for first, numbers in found if math.dist(first, place) < _NEAR), None)
        if near is None:
            found.append((place, [number]))
        else:
            near.append(number)
    return found


def _marked(number: int, place: tuple[float, float], row: Mapping[str, Any], colour: str) -> list[str]:
    """A point, and its line below the chart."""
    fill = colour if row["dominated_by"] is None else "none"
    dot = f'r="5" fill="{fill}" stroke="{colour}" stroke-width="2"'
    y = _TOP + _HEIGHT + 62 + _LINE * (number - 1)
    values = f"{row['excess_loss']:.4f} nats, {row['cache_bytes_per_token']:,.4g} bytes"
    return [
        f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" {dot}/>',
        f'<circle cx="8" cy="{y}" {dot}/>',
        f'<text x="22" y="{y + 4}">{number}: {escape(row["name"])}</text>',
        f'<text class="dim" x="{_LEFT + _WIDTH}" y="{y + 4}" text-anchor="end">{values}</text>',
    ]
