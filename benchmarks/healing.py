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
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import latentize

ROOT = Path(__file__).resolve().parents[1]
# Everything here happens in contexts of this length, so that the published methods are compared at what they look at.
SHORT = 512
STARTS: dict[str, dict[str, Any]] = {
    "calibrated": {"context": SHORT},
    "transmla": {"method": "transmla"},
    "mha2mla": {"method": "mha2mla"},
}
# MHA2MLA's own: cross-entropy, all weights, AdamW with betas 0.9 and 0.95, 1e-4, warm-up, 1-sqrt decay.
MHA2MLA = {"ce": 1.0, "train": "all", "optimiser": "adamw", "rate": 1e-4, "decay": "1-sqrt"}
# 0.6 % of the 8 M tokens that the bundled model was trained on.
SLIVER = 47_616
CURVE = (11_776, SLIVER)


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
    "long": {
        "10 times the tokens": ("calibrated", {"tokens": 10 * SLIVER}),
        "10 times the tokens, int4 simulated": ("calibrated", {"tokens": 10 * SLIVER, "cache": "int4"}),
        "10 times the tokens, all": ("calibrated", {"tokens": 10 * SLIVER, "train": "all", "rate": 0.005}),
    },
    "curve": curve(),
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
        found = latentize.heal(begin, out, model, context=SHORT, **options)
        if part == "long":
            for key, subject in (("int4_excess_loss_before", begin), ("int4_excess_loss", out)):
                found[key] = latentize.evaluate(subject, model, cache="int4")["excess_loss"]
    kept = {k: v for k, v in found.items() if k not in ("held_out", "teacher", "machine")}
    return {"part": part, "name": name, "start": kind, "keep": keep, "options": options, **kept}


# Run in a process of its own, whose peak counts.
HEAL = """
import json, sys, latentize
start, out, teacher, options = sys.argv[1:5]
latentize.heal(start, out, teacher, **json.loads(options))
"""


def random_model(folder: Path, like: Path) -> tuple[Path, Path]:
    """A llama of 30 M random weights with the tokenizer of ``like``, and its conversion; made once."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source, out = folder / "random-30m", folder / "random-30m-128+32"
    if not source.exists():
        tokenizer = AutoTokenizer.from_pretrained(like)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
        tokenizer.save_pretrained(source)
    if not out.exists():
        sizes = {"kv_lora_rank": 128, "qk_rope_head_dim": 32, "fast": True}
        latentize.convert(source, out, tokens=8192, evaluation_tokens=1024, selection_tokens=512, **sizes)
    return source, out


def memory(model: Path, folder: Path) -> list[dict[str, Any]]:
    """Peak memory and speed of a few steps, by what learns and how."""
    source, begin = random_model(folder, model)
    ways: dict[str, dict[str, Any]] = {
        "all, AdamW": {"train": "all", "optimiser": "adamw"},
        "attention, AdamW": {"optimiser": "adamw"},
        "attention, Muon": {},
        "LoRA, AdamW": {"train": "lora"},
        "LoRA, AdamW, recomputed": {"train": "lora", "recompute": True},
        "LoRA, AdamW, teacher on disk": {"train": "lora", "top_k": 32},
    }
    rows = []
    for name, options in ways.items():
        few = {"tokens": 8192, "looks": 1, "selection_tokens": 1024, "evaluation_tokens": 1024}
        with tempfile.TemporaryDirectory() as place:
            arguments = [begin, Path(place) / "out", source, json.dumps({**few, **options})]
            subprocess.run([sys.executable, "-c", HEAL, *map(str, arguments)], check=True, capture_output=True)
            lines = (Path(place) / "out" / "measurements.jsonl").read_text().splitlines()
        found = json.loads(lines[0])["result"]
        kept = {k: found[k] for k in ("parameters", "peak_rss_bytes", "tokens_per_second", "steps")}
        rows.append({"name": name, **kept, "date": datetime.date.today().isoformat()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def memory_markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| what learns | parameters | peak memory, GB | tokens/s |", "|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['parameters'] / 1e6:.2f} M | {r['peak_rss_bytes'] / 1e9:.2f} "
            f"| {r['tokens_per_second']:.0f} |"
        )
    return "\n".join(lines)


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
    parser.add_argument("--only", nargs="+", default=[*PARTS, "memory"], choices=[*PARTS, "memory"])
    parser.add_argument("--print", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / f"healing-{args.model.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    rows, peaks = before.get("rows", []), before.get("memory", [])
    there = {(r["part"], r["name"], r["keep"]) for r in rows}

    def save() -> None:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        result = {"model": args.model.name, "machine": machine, "rows": rows, "memory": peaks}
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")

    today = datetime.date.today().isoformat()
    for part in () if args.print else [p for p in args.only if p in PARTS]:
        for name in PARTS[part]:
            if (part, name, args.keep) not in there:
                rows.append({**measure(args.model, name, args.keep, args.folder, part), "date": today})
                print(json.dumps(rows[-1]), flush=True)
                save()
    if "memory" in args.only and not args.print:
        peaks = memory(args.model, args.folder)
        save()
    print(markdown(rows))
    print(memory_markdown(peaks))


if __name__ == "__main__":
    main()
