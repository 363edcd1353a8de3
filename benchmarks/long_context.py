"""Does it matter which distances calibration sees? Sequences of 512 with positions spread, as they are, and of 2,048.

    python benchmarks/long_context.py [--model DIR] [--keep 50%] [--effort 1]

Writes ``benchmarks/results/long-context-<model>.json`` and prints the table as Markdown. Same number of calibration
tokens either way; held-out text of the same tokens, cut to one length or the other.
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
from ablation import with_effort

import latentize

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (512, 2048)
WAYS: dict[str, dict[str, Any]] = {
    "512, positions spread (default)": {},
    "512 as they are": {"context": 512},
    "2,048": {"sequence_length": 2048},
}


def measure(model: Path, keep: str, way: str, tokens: int, effort: float) -> list[dict[str, Any]]:
    """One conversion, evaluated at every length."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        with with_effort(effort):
            made = latentize.convert(model, out, keep=keep, **WAYS[way])
        return [
            {
                "keep": keep,
                "calibrated_on": way,
                "setting": made["setting"],
                "evaluated_at": length,
                **latentize.evaluate(out, model, tokens=tokens, sequence_length=length),
            }
            for length in LENGTHS
        ]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| keep | calibrated on sequences of | sizes, stride | evaluated at | source ppl | excess, nats | KL, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        s = r["setting"]
        lines.append(
            f"| {r['keep']} | {r['calibrated_on']} | {s['kv_lora_rank']} + {s['qk_rope_head_dim']}, {s['stride']:g} "
            f"| {r['evaluated_at']} | {r['reference_perplexity']:.2f} | {r['excess_loss']:.4f} | {r['kl']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-llama-gqa")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--keep", nargs="+", default=["50%"])
    parser.add_argument("--effort", type=float, default=1.0, help="share of the steps of all training")
    parser.add_argument("--tokens", type=int, default=32_768, help="held-out tokens")
    args = parser.parse_args()
    rows = [
        row for keep in args.keep for way in WAYS for row in measure(args.model, keep, way, args.tokens, args.effort)
    ]
    result = {
        "model": args.model.name,
        "effort": args.effort,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"long-context-{args.model.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
