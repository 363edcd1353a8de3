"""Needles in a long text, found by a model and by its source: two probes of ``latentize eval --probes`` alone.

    python benchmarks/needles.py OUT --reference SOURCE --data wiki.valid.txt [--lengths 2048 4096] [--samples 3]

Of each length, depth and sample one needle, and one of four (``evaluation/puzzles.py``). Prints what share of the
answers' tokens each finds, over depths and samples, as Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest.mock import patch

from latentize.evaluation import probes

NEEDLES = ("needle", "needles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--data", nargs="+", default=())
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    some = {name: probes.PUZZLES[name] for name in NEEDLES}
    with patch.object(probes, "PUZZLES", some):
        found = probes.probe(
            args.out,
            args.reference,
            data=tuple(args.data),
            lengths=args.lengths,
            samples=args.samples,
            seed=args.seed,
        )
    print("| probe | context | examples | source | converted |\n" + "| -- " * 5 + "|")
    for row in found["rows"]:
        shares = " | ".join(f"{row[name]:.1%}" for name in ("reference_score", "score"))
        print(f"| {row['probe']} | {row['length']:,} | {row['examples']} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
