"""Draw how large tokens get, layer by layer, in a model that was trained for long: ``docs/massive.svg``.

    python docs/draw_massive.py MODEL TEXT   # a folder, a hub name or a GGUF file; text in a file

4,096 tokens of the text go through the source, for half a minute on a model of 135 M parameters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from latentize.conversion.texts import draw_text
from latentize.families.opening import open_source
from latentize.modeling.source import SourceModel
from latentize.recipe import Recipe
from latentize.report.chart import line_chart

TOKENS = 4096


@torch.no_grad()
def norms(model: str, text: str) -> dict[str, list[tuple[float, float]]]:
    """Norms of the residual stream after each layer: of a sequence's first token, the largest other, the median."""
    checkpoint, spec = open_source(model)
    source = SourceModel(checkpoint, spec)
    recipe = Recipe(tokens=TOKENS, data=(text,), context=512)
    hidden = source.embed(draw_text(checkpoint.path, recipe, spec.max_positions).calibration)
    series: dict[str, list[tuple[float, float]]] = {"first token": [], "largest other": [], "median token": []}
    for layer in source.layers():
        layer.run(hidden)
        norm_NT = hidden.hidden_NTD.norm(dim=-1)
        found = (norm_NT[:, 0].median(), norm_NT[:, 1:].max(), norm_NT.median())
        for points, value in zip(series.values(), found, strict=True):
            points.append((float(layer.index + 1), float(value)))
    return series


def main() -> None:
    model, text = sys.argv[1:]
    series = norms(model, text)
    for name, points in series.items():
        print(name, [round(value) for _, value in points])
    title = "Norm of the residual stream after each layer"
    (Path(__file__).parent / "massive.svg").write_text(line_chart(series, title=title, x_label="layer", even=True))


if __name__ == "__main__":
    main()
