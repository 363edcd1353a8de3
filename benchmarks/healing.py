"""What healing recovers on the bundled model: against tokens, by loss and by the conversion that it starts from.

    python benchmarks/healing.py                       # everything that is not in the results yet
    python benchmarks/healing.py --only curve          # one part
    python benchmarks/healing.py --print               # the tables of what was measured before

Conversions at ``--keep`` are kept in build/healing. Writes ``benchmarks/results/healing-<model>.json`` row by row.
Every row is ``latentize heal``, measured by it on what it wrote: held-out text that nothing was learnt or chosen from.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import latentize

ROOT = Path(__file__).resolve().parents[1]
STARTS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "transmla": {"method": "transmla"},
    "mha2mla": {"method": "mha2mla"},
}
# MHA2MLA's own: cross-entropy, all weights, AdamW with betas 0.9 and 0.95, 1e-4, warm-up, 1-sqrt decay.
MHA2MLA = {"ce": 1.0, "train": "all", "optimiser": "adamw", "rate": 1e-4, "decay": "1-sqrt"}
# 0.6 % of the 8 M tokens that the bundled model was trained on.
SLIVER = 47_616
CURVE = (11_776, 23_552, SLIVER)


def curve() -> dict[str, tuple[str, dict[str, Any]]]:
    """The same training from several starts, on more and more text, each token four times."""
    rows = {}
    for tokens in CURVE:
        common = {"tokens": tokens, "epochs": 4}
        rows[f"calibrated + KL, {tokens}"] = ("calibrated", common)
        for start in STARTS:
            rows[f"{start} + CE, {tokens}"] = (start, {**common, "ce": 1.0})
    rows[f"mha2mla + its own recipe, {SLIVER}"] = ("mha2mla", {"tokens": SLIVER, "epochs": 4, **MHA2MLA})
    return rows


PARTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "curve": curve(),
    "long": {
        "attention, 16 epochs": ("calibrated", {"tokens": SLIVER, "epochs": 16}),
        "all, 16 epochs": ("calibrated", {"tokens": SLIVER, "epochs": 16, "train": "all", "rate": 0.005}),
        "all, 10 times the tokens": ("calibrated", {"tokens": 10 * SLIVER, "epochs": 2, "train": "all", "rate": 0.005}),
    },
    "int4": {
        "int4 not looked at": ("calibrated", {"tokens": SLIVER, "epochs": 4}),
        "int4 simulated": ("calibrated", {"tokens": SLIVER, "epochs": 4, "cache": "int4"}),
    },
}


def start(model: Path, kind: str, keep: str, folder: Path) -> Path:
    """The conversion to start from; made once."""
    out = folder / f"{model.name}-{kind}-{keep.rstrip('%')}"
    if not out.exists():
        latentize.convert(model, out, keep=keep, **STARTS[kind])
    return out


def measure(model: Path, name: str, keep: str, folder: Path, part: str) -> dict[str, Any]:
    kind, options = PARTS[part][name]
    begin = start(model, kind, keep, folder)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        found = latentize.heal(begin, out, model, **options)
        if part == "int4":
            for key, subject in (("int4_excess_loss_before", begin), ("int4_excess_loss", out)):
                found[key] = latentize.evaluate(subject, model, cache="int4")["excess_loss"]
    kept = {k: v for k, v in found.items() if k not in ("held_out", "teacher", "machine")}
    return {"part": part, "name": name, "start": kind, "keep": keep, "options": options, **kept}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | tokens | steps | excess before | after | removed | KL | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['tokens']:,} | {r['steps']} | {r['excess_loss_before']:.3f} | {r['excess_loss']:.3f} "
            f"| {r['excess_removed']:.0%} | {r['kl']:.3f} | {r['seconds']:.0f} |"
        )
    for r in rows:
        if "int4_excess_loss" in r:
            lines.append(f"\n{r['name']}, with the int4 cache: {r['int4_excess_loss_before']:.4f} before, ")
            lines[-1] += f"{r['int4_excess_loss']:.4f} after"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-llama-gqa")
    parser.add_argument("--keep", default="12.5%")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "healing")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--print", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / f"healing-{args.model.name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    there = {(r["part"], r["name"], r["keep"]) for r in rows}
    for part in () if args.print else args.only:
        for name in PARTS[part]:
            if (part, name, args.keep) in there:
                continue
            rows.append(
                {
                    **measure(args.model, name, args.keep, args.folder, part),
                    "date": datetime.date.today().isoformat(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
            path.write_text(json.dumps({"model": args.model.name, "machine": machine, "rows": rows}, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
