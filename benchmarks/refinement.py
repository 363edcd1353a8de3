"""How refinement is best done: one layer of a model, refined by several optimisers.

    python benchmarks/refinement.py MODEL TEXT [--layer 8] [--sizes 144,48] [--tokens 65536] [--rounds 2,3]

The layer stands in the source's own stream, so that nothing but its refinement differs. Each optimiser takes steps of
several sizes; shown are the mean relative error of the residual stream after the attention, on calibration text that
was not learnt from, and the seconds. Writes ``benchmarks/results/refinement-<model>.json`` and prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import platform
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import latentize
from latentize.conversion.draft import alone, observe
from latentize.families.opening import open_source
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.modeling.source import SourceModel
from latentize.text.drawing import Part, draw
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import Passages
from latentize.training import descent, refine
from latentize.training.refine import Refinement

ROOT = Path(__file__).resolve().parents[1]
LENGTH, REACH = 512, 8192
# Share of a step's multiplications that Muon may come to, and whether each head is a matrix of its own.
OPTIMISERS = {"Adam": (0.0, True), "Muon, whole matrices": (math.inf, False), "Muon, each head": (math.inf, True)}


def whole_matrices(attention: torch.nn.Module) -> list[descent.Heads]:
    return [descent.WHOLE for _ in attention.parameters()]


@torch.no_grad()
def measured(args: argparse.Namespace) -> list[dict]:
    checkpoint, spec = open_source(args.model)
    source, rank, rope = SourceModel(checkpoint, spec), *map(int, args.sizes.split(","))
    setting = Setting("calibrated", rank, rope, stride=args.stride)
    tokenizer = load_tokenizer(Path(args.model))
    (rows,) = draw(tokenizer, (args.text,), [Part("calibration", args.tokens, 0)], sequence_length=LENGTH)
    text = source.embed(Passages.spread(rows, REACH, seed=0))
    for layer in source.layers():
        if layer.index == args.layer:
            break
        layer.run(text)
    assert layer.spec is not None
    seen = observe(layer, text.clone(), needs(setting, layer.spec), residual=len(text))
    rows_made = []
    for name, (share, by_heads) in OPTIMISERS.items():
        pairs = itertools.product(map(float, args.rounds.split(",")), map(float, args.factors.split(",")))
        for rounds, factor in pairs:
            how = Refinement().suited(LENGTH)
            steps = round(rounds * args.tokens / how.tokens)
            how = replace(how, rate=factor * how.rate, steps=steps)
            began = time.perf_counter()
            with (
                patch.object(descent, "_SHARE", share),
                patch.object(refine, "stacked_heads", refine.stacked_heads if by_heads else whole_matrices),
            ):
                found = alone(layer, text, seen, setting, how)
            seconds = time.perf_counter() - began
            row = {"optimiser": name, "rate": how.rate, "steps": steps, "seconds": round(seconds, 1)}
            rows_made.append({**row, "before": found.before, "after": found.after})
            print(rows_made[-1], flush=True)
    return rows_made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--sizes", default="144,48", help="latent and roped key")
    parser.add_argument("--stride", type=float, default=1.0, help="of the ladder of frequencies")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", default="2,3", help="of the text")
    parser.add_argument("--factors", default="0.7,1,1.4", help="on the rate")
    args = parser.parse_args()
    rows = measured(args)
    file = ROOT / "benchmarks" / "results" / f"refinement-{Path(args.model).name}.json"
    facts = {"latentize": latentize.__version__, "torch": torch.__version__, "machine": platform.processor()}
    said = {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads(), **facts}
    names = {"model": Path(args.model).name, "text": Path(args.text).name}
    file.write_text(json.dumps({**said, **vars(args), **names, "rows": rows}, indent=1) + "\n")
    print("\n| optimiser | rate | steps | seconds | closed form | refined |\n|---|---|---|---|---|---|")
    for row in rows:
        shown = (row["optimiser"], f"{row['rate']:.3f}", row["steps"], row["seconds"])
        print("|", " | ".join(map(str, shown)), f"| {row['before']:.6f} | {row['after']:.6f} |")


if __name__ == "__main__":
    main()
