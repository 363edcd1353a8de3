"""Draw the figures of ``docs/method.md``: loss against budget, error layer by layer, and where rope went.

    python docs/draw_method.py   # docs/loss.svg and error.svg from benchmarks/results, rope.svg from the bundled model

Only ``rope.svg`` runs the model, for a few seconds: statistics of the calibration text, no conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from latentize.cli.demo import bundled_model
from latentize.conversion.draft import observe
from latentize.conversion.texts import draw_text
from latentize.families.opening import open_source
from latentize.methods.position import costliest, dropping_cost, key_components, ladder, on_ladder
from latentize.methods.statistics import Needed
from latentize.modeling.source import SourceModel
from latentize.recipe import Recipe
from latentize.report.chart import line_chart, rope_map

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "methods-tiny-llama-gqa.json"
COLOURS = {
    "calibrated": "#e45756",
    "calibrated, native": "#b279a2",
    "calibrated --fast": "#f2a59d",
    "transmla": "#4c78a8",
    "care": "#72b7b2",
    "mha2mla": "#54a24b",
    "gqa (mean pool)": "#9d755d",
}
ERROR_COLOURS = {
    "50%, closed form": "#f2a59d",
    "50%, refined": "#e45756",
    "25%, closed form": "#9ecae9",
    "25%, refined": "#4c78a8",
    "12.5%, closed form": "#88d27a",
    "12.5%, refined": "#54a24b",
}
ROPE_DIM, TOKENS = 16, 8192


def loss_figure(rows: list[dict[str, Any]]) -> str:
    """Excess loss against the share of the cache that is kept."""
    series: dict[str, list[tuple[float, float]]] = {name: [] for name in COLOURS}
    for row in rows:
        if row["method"] in series:
            series[row["method"]].append((float(row["keep"].rstrip("%")), max(row["excess_loss"], 1e-3)))
    drawn = {name: points for name, points in series.items() if points}
    title = "Nats per token above the source, held-out text"
    return line_chart(drawn, title=title, x_label="per cent of the cache", colours=COLOURS)


def error_figure(rows: list[dict[str, Any]]) -> str:
    """What leaves each layer, relative to the source's: in closed form, and as saved."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] != "calibrated" or "layers" not in row:
            continue
        for name, key in (("closed form", "error_before_refine"), ("refined", "error_after_refine")):
            points = [(number, layer[key]) for number, layer in enumerate(row["layers"], 1)]
            series[f"{row['keep']}, {name}"] = points
    title = "Relative error of the residual stream after each layer"
    return line_chart(series, title=title, x_label="layer", colours=ERROR_COLOURS)


@torch.no_grad()
def rope_figure() -> str:
    """For each layer and frequency: what losing rotation costs, and which components keep it."""
    checkpoint, spec = open_source(bundled_model())
    a, source = spec.attention, SourceModel(checkpoint, spec)
    calibration = draw_text(checkpoint.path, Recipe(tokens=TOKENS), spec.max_positions).calibration
    stride = a.head_dim / ROPE_DIM
    rungs_J = ladder(a.rope.theta, a.head_dim, ROPE_DIM, stride)
    hidden, cost_LF = source.embed(calibration), []
    marks: dict[str, list[list[int]]] = {"●": [], "○": []}
    for layer in source.layers():
        seen = observe(layer, hidden, Needed(distances=True))
        c = key_components(layer.weights.to(torch.float64), a, seen.stats)
        cost_LF.append(dropping_cost(c).sum(1).tolist())
        marks["●"].append(on_ladder(c, rungs_J)[0][:, 0].tolist())
        marks["○"].append(costliest(c, ROPE_DIM // 2)[0][:, 0].tolist())
    title = f"What losing rotation costs (shade), what keeps it: ● on the ladder of stride {stride:g}, ○ free (native)"
    return rope_map(cost_LF, marks, title=title)


def main() -> None:
    rows = [r for r in json.loads(RESULTS.read_text())["rows"] if "refused" not in r]
    (DOCS / "loss.svg").write_text(loss_figure(rows))
    (DOCS / "error.svg").write_text(error_figure(rows))
    (DOCS / "rope.svg").write_text(rope_figure())


if __name__ == "__main__":
    main()
