"""Draw the figures of ``docs/method.md``: loss against budget, and where rope went.

    python docs/draw_method.py            # docs/loss.svg from benchmarks/results, docs/rope.svg from the bundled model

Only ``rope.svg`` runs the model, for a few seconds: statistics of the calibration text, no conversion.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from latentize.api import _tokens, open_source
from latentize.calibrate.stats import Needed
from latentize.convert.draft import observe
from latentize.convert.methods import Setting
from latentize.convert.position import Components, dearest, key_components, ladder, on_ladder
from latentize.convert.search import best_strides
from latentize.convert.source import SourceModel
from latentize.demo import bundled_model
from latentize.recipe import Recipe

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "methods-tiny-llama-gqa.json"
STYLE = (
    "<style>text{fill:#24292f;font-size:13px}.dim{fill:#57606a;font-size:12px}.axis{stroke:#8c959f}"
    ".cell{stroke:#8c959f;stroke-width:.5}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.dim{fill:#9198a1}}</style>"
)
COLOURS = {
    "calibrated": "#e45756",
    "calibrated, native": "#b279a2",
    "calibrated --fast": "#f2a59d",
    "transmla": "#4c78a8",
    "care": "#72b7b2",
    "mha2mla": "#54a24b",
    "gqa (mean pool)": "#9d755d",
}
ROPE_DIM, TOKENS = 16, 8192


def _svg(width: int, height: int, label: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{label}">'
    )
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"


def loss_figure() -> str:
    """Excess loss, on a logarithmic scale, against the share of the cache that is kept."""
    rows = [r for r in json.loads(RESULTS.read_text())["rows"] if "refused" not in r]
    left, top, width, height = 60, 40, 420, 260
    low, high = math.log10(0.01), math.log10(10)

    def x(keep: str) -> float:
        return left + width * (math.log2(float(keep.rstrip("%")) / 12.5) + 0.3) / 2.6

    def y(excess: float) -> float:
        return top + height * (high - math.log10(max(excess, 0.01))) / (high - low)

    parts = ['<text x="0" y="18" style="font-size:15px">Nats per token above the source, held-out text</text>']
    for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10):
        parts.append(f'<line class="axis" x1="{left}" x2="{left + width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" ')
        parts[-1] += 'opacity="0.35"/>'
        parts.append(f'<text class="dim" x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for keep in ("12.5%", "25%", "50%"):
        at = f'x="{x(keep):.1f}" y="{top + height + 20}" text-anchor="middle"'
        parts.append(f'<text class="dim" {at}>{keep} of the cache</text>')
    for number, (name, colour) in enumerate(COLOURS.items()):
        mine = sorted(
            (x(r["keep"]), y(r["excess_loss"])) for r in rows if r["method"] == name and r["excess_loss"] is not None
        )
        if not mine:
            continue
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in mine)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>' for px, py in mine]
        parts.append(f'<rect x="510" y="{top + 24 * number}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="530" y="{top + 11 + 24 * number}">{name}</text>')
    return _svg(700, 340, "Excess loss against the share of the cache that is kept, by method", parts)


def _cost(c: Components) -> torch.Tensor:
    """``λ (1 - |ρ|²)`` of each frequency, all components together, as a share of the layer's largest."""
    from latentize.calibrate.distance import expected_rotation

    constant_F = 1 - expected_rotation(c.frequencies_F, c.distances_T[None])[0].abs().square()
    cost_F = constant_F * c.energy_FG.sum(1)
    return cost_F / cost_F.max()


@torch.no_grad()
def rope_figure() -> str:
    """For each layer and frequency: what losing rotation costs, and which components keep it."""
    checkpoint, spec = open_source(bundled_model())
    a, source = spec.attention, SourceModel(checkpoint, spec)
    calibration_NT = _tokens(checkpoint.folder, Recipe(tokens=TOKENS)).calibration_NT
    sizes = (a.cache_values // 2 - ROPE_DIM, ROPE_DIM)
    strides = [Setting("calibrated", *sizes, stride=s) for s in (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)]
    stride = best_strides(source, strides, calibration_NT, lambda *_: None)[0].stride
    assert stride is not None
    rungs_J = ladder(a.rope.theta, a.head_dim, ROPE_DIM, stride)
    hidden, parts = source.embed(calibration_NT), []
    title = f"What losing rotation costs (shade), what keeps it: ● on the ladder of stride {stride:g}, ○ free (native)"
    parts.append(f'<text x="0" y="18" style="font-size:14px">{title}</text>')
    pairs, cell, left, top = a.head_dim // 2, 36, 70, 40
    for layer in source.layers():
        seen = observe(layer, a, hidden, Needed(distances=True))
        weights = layer.weights.to(torch.float64)
        c = key_components(weights, a, seen.stats)
        y = top + cell * layer.index
        parts.append(f'<text class="dim" x="0" y="{y + 23}">layer {layer.index}</text>')
        kept, free = on_ladder(c, rungs_J)[0][:, 0].tolist(), dearest(c, ROPE_DIM // 2)[0][:, 0].tolist()
        for f, cost in enumerate(_cost(c).tolist()):
            x = left + cell * f
            parts.append(f'<rect class="cell" x="{x}" y="{y}" width="{cell}" height="{cell}" fill="#4c78a8" ')
            parts[-1] += f'fill-opacity="{cost:.2f}"/>'
            marks = "●" * kept.count(f), "○" * free.count(f)
            for line, mark in enumerate(marks):
                at = f'x="{x + cell / 2}" y="{y + 15 + 14 * line}" text-anchor="middle"'
                parts.append(f'<text {at} style="font-size:11px">{mark}</text>')
    bottom = top + cell * spec.layers + 18
    for f in range(pairs):
        at = f'x="{left + cell * f + cell / 2}" y="{bottom}" text-anchor="middle"'
        parts.append(f'<text class="dim" {at}>{f}</text>')
    parts.append(f'<text class="dim" x="0" y="{bottom}">frequency</text>')
    return _svg(left + cell * pairs + 4, bottom + 10, "Which frequencies keep RoPE, layer by layer", parts)


def main() -> None:
    (DOCS / "loss.svg").write_text(loss_figure())
    (DOCS / "rope.svg").write_text(rope_figure())


if __name__ == "__main__":
    main()
