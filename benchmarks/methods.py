"""Quality of every method at every budget on one model, on held-out text.

    python benchmarks/methods.py                                  # the bundled model
    python benchmarks/methods.py --model build/sources/tiny-llama-mha    # another one
    python benchmarks/methods.py --print                          # the table of what was measured before

Writes ``benchmarks/results/methods-<model>.json``, where rows that are not made again stay, and prints the table as
Markdown. Each conversion is written to disk and measured by ``latentize eval`` on what transformers loads, never on
the converter's own word.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import latentize
from latentize.errors import OptionError

ROOT = Path(__file__).resolve().parents[1]
TODAY = datetime.date.today().isoformat()
LAYER_KEYS = ("kv_lora_rank", "qk_rope_head_dim", "error_before_refine", "error_after_refine")
# The context that the small sources are made for.
LONG = 2048
BUDGETS = ("50%", "25%", "12.5%")
ROWS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "calibrated --fast": {"fast": True},
    "calibrated, native": {"format": "native"},
    "mha2mla": {"method": "mha2mla"},
    "transmla": {"method": "transmla"},
    "care": {"method": "care"},
    "gqa (mean pool)": {"to": "gqa"},
    "mqa (mean pool)": {"to": "mqa"},
}


def measure(
    model: Path, name: str, keep: str, tokens: int, data: tuple[str, ...], outputs: Path | None
) -> dict[str, Any]:
    """One row: convert, then evaluate what was written."""
    with tempfile.TemporaryDirectory() as folder:
        out = (outputs or Path(folder)) / f"{model.name} {name} {keep}".replace(" ", "-").replace(",", "")
        try:
            made = latentize.convert(model, out, keep=keep, data=data, **ROWS[name])
        except OptionError as error:
            return {"method": name, "keep": keep, "refused": error.what}
        found = latentize.evaluate(out, model, tokens=tokens)
        far = latentize.evaluate(out, model, tokens=tokens, sequence_length=LONG)
        files = json.loads((out / "latentize.json").read_text())["files"]
    sizes = made.get("setting") or {"num_key_value_heads": made["num_key_value_heads"]}
    return {
        "method": name,
        "keep": keep,
        "format": made["format"],
        "setting": sizes,
        "cache_values_per_token_layer": made["cache_values_per_token_layer"],
        "seconds": made["seconds"],
        "threads": torch.get_num_threads(),
        "calibration_tokens": made["calibration_tokens"],
        "weights_sha256": files["model.safetensors"],
        "layers": [{k: layer[k] for k in LAYER_KEYS if k in layer} for layer in made["layers"]],
        **found,
        "long": {"sequence_length": LONG, **{k: far[k] for k in ("tokens", "excess_loss", "kl", "top1_agreement")}},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| keep | method | format | sizes | perplexity | excess, nats | at {LONG:,} tokens | KL, nats | same top-1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "refused" in r:
            lines.append(f"| {r['keep']} | {r['method']} | | | not possible: {r['refused']} | | | | |")
            continue
        sizes, far = sizes_of(r), f"{r['long']['excess_loss']:.3f}" if "long" in r else ""
        lines.append(
            f"| {r['keep']} | {r['method']} | {r['format']} | {sizes} | {r['perplexity']:.2f} | {r['excess_loss']:.3f} "
            f"| {far} | {r['kl']:.3f} | {r['top1_agreement']:.1%} |"
        )
    return "\n".join(lines)


def sizes_of(row: dict[str, Any]) -> str:
    """Latent + roped key; from the least to the most where layers differ."""
    s = row["setting"]
    if "num_key_value_heads" in s:
        return f"{s['num_key_value_heads']} kv head"
    roped = f"{s['rope_heads']}×" if s["rope_heads"] > 1 else ""

    def range_of(name: str) -> str:
        found = sorted({layer.get(name, s.get(name)) for layer in row.get("layers", [s])})
        return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"

    return f"{range_of('kv_lora_rank')} + {roped}{range_of('qk_rope_head_dim')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-llama-gqa")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tokens", type=int, default=32_768, help="held-out tokens")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, choices=BUDGETS)
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--outputs", type=Path, help="keep the converted models in this folder")
    parser.add_argument("--data", nargs="*", default=(), help="calibration text; the standard library by default")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / f"methods-{args.model.name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    wanted = [] if args.print else itertools.product(args.budgets, args.methods)
    for keep, name in wanted:
        new = {**measure(args.model, name, keep, args.tokens, tuple(args.data), args.outputs), "date": TODAY}
        print(json.dumps(new), flush=True)
        rows = [r for r in rows if (r["method"], r["keep"]) != (name, keep)] + [new]
        save(path, args.model.name, rows)
    print(markdown(sort(rows)))


def sort(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda r: (BUDGETS.index(r["keep"]), list(ROWS).index(r["method"])))


def save(path: Path, model: str, rows: list[dict[str, Any]]) -> None:
    """Rows of earlier runs stay, each with the day that it was made on."""
    measured = next((r for r in rows if "refused" not in r), {})
    result = {
        "model": model,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "source_perplexity": measured.get("reference_perplexity"),
        "evaluation_tokens": measured.get("tokens"),
        "rows": sort(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
