"""What converting a published model costs: every method at every budget, reported on text that nothing was chosen by.

    python benchmarks/real_model.py HuggingFaceTB/SmolLM2-135M-Instruct --calibrate valid.txt --report test.txt
    python benchmarks/real_model.py model.gguf --calibrate valid.txt --report raw=raw.txt detokenised=plain.txt
    python benchmarks/real_model.py model.gguf --print                # the table of what was measured before

The model is a folder, a hub name or a GGUF file; a text is a file or the name of a hub data set. All rows of one
budget are evaluated together, beside their source, on the same tokens. Writes
``benchmarks/results/real-model-<model>.json``, where rows that are not made again stay, as does what the same model did
on other texts, and prints Markdown. Converted models are kept in ``--outputs``, and what is there already is only
evaluated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch

import latentize
from latentize.checkpoint import resolve
from latentize.errors import LatentizeError
from latentize.evaluation.predict import predictor
from latentize.evaluation.quality import measure
from latentize.modeling.load import load_model
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

ROOT = Path(__file__).resolve().parents[1]
ROWS: dict[str, dict[str, Any]] = {
    "calibrated": {"format": "deepseek_v3"},
    "calibrated, native": {"format": "native"},
    "calibrated --fast": {"format": "deepseek_v3", "fast": True},
    "transmla": {"method": "transmla"},
    "care": {"method": "care"},
    "mha2mla": {"method": "mha2mla"},
}
KEPT = ("kv_lora_rank", "qk_rope_head_dim", "cache_values_per_token_layer", "format", "seconds", "peak_rss_bytes")


def converted(model: str, name: str, keep: str, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The folder of a row and what its conversion reported, made unless it is there."""
    out = args.outputs / f"{Path(model).stem}-{name}-{keep}".replace(" ", "").replace(",", "-").replace("%", "")
    facts = out.parent / f"{out.name}.json"
    if not out.exists():
        made = latentize.convert(model, out, keep=keep, tokens=args.calibration, data=(args.calibrate,), **ROWS[name])
        facts.write_text(json.dumps(made))
    return out, json.loads(facts.read_text())


def evaluated(
    model: str, folders: list[Path], args: argparse.Namespace
) -> list[dict[str, dict[str, float | int | None]]]:
    """For each folder, by name of the text, its quality beside the source's."""
    tokenizer = load_tokenizer(resolve(model))
    source = predictor(load_model(resolve(model)))
    subjects = [predictor(load_model(folder)) for folder in folders]
    found: list[dict[str, Any]] = [{} for _ in folders]
    for text in args.report:
        name, _, place = text.rpartition("=")
        rows = pack(tokenizer, documents((place,), "all"), tokens=args.tokens, sequence_length=args.length)
        for entries, quality in zip(found, measure(subjects, source, rows), strict=True):
            told = quality.describe()
            some = ("perplexity", "reference_perplexity", "excess_loss", "kl", "top1_agreement", "tokens")
            entries[name or Path(place).stem] = {key: told[key] for key in some}
    return found


def cell(text: dict[str, float] | None) -> str:
    """What the table says of a row on one text."""
    if text is None:
        return "not measured"
    return f"{text['reference_perplexity']:.2f} → {text['perplexity']:.2f}, {text['excess_loss']:.4f}, {text['kl']:.4f}"


def markdown(rows: list[dict[str, Any]]) -> str:
    texts = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    head = " | ".join(f"{name}: perplexity, excess, KL" for name in texts)
    lines = [f"| keep | method | format | sizes | minutes | {head} |", "|---" * (5 + len(texts)) + "|"]
    for row in rows:
        sizes = f"{row['kv_lora_rank']:g} + {row['qk_rope_head_dim']:g}"
        cells = [cell(row["texts"].get(name)) for name in texts]
        minutes = f"{row['seconds'] / 60:.1f}"
        lines.append(
            f"| {row['keep']} | {row['method']} | {row['format']} | {sizes} | {minutes} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a hub name or a GGUF file")
    parser.add_argument("--calibrate", help="text to calibrate on, and to choose by")
    parser.add_argument("--report", nargs="+", default=[], metavar="[NAME=]TEXT", help="text to report on")
    parser.add_argument("--keep", nargs="+", default=["75%", "50%", "33%"])
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--calibration", type=int, default=131_072, help="calibration tokens")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of each text that is reported on")
    parser.add_argument("--length", type=int, default=2048, help="context they are evaluated in")
    parser.add_argument("--outputs", type=Path, default=ROOT / "build" / "real-model", help="where models are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / f"real-model-{Path(args.model).stem}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    if not args.print and not (args.calibrate and args.report):
        parser.error("name the text to calibrate on with --calibrate, that to report on with --report")
    args.outputs.mkdir(parents=True, exist_ok=True)
    for keep in () if args.print else args.keep:
        made: dict[str, tuple[Path, dict[str, Any]]] = {}
        for name in args.methods:
            try:
                made[name] = converted(args.model, name, keep, args)
            except LatentizeError as error:
                print(f"{name} at {keep}: {error}", flush=True)
        found = evaluated(args.model, [folder for folder, _ in made.values()], args)
        for (name, (_, facts)), texts in zip(made.items(), found, strict=True):
            row = {"method": name, "keep": keep, **{key: facts[key] for key in KEPT}, "texts": texts}
            row["date"] = datetime.date.today().isoformat()
            before = [r for r in rows if (r["method"], r["keep"]) == (name, keep)]
            # What the same model did on other texts stays; what an earlier one did does not.
            if before and all(before[0][key] == row[key] for key in KEPT):
                row["texts"] = {**before[0]["texts"], **texts}
            rows = [r for r in rows if r not in before] + [row]
        rows.sort(key=lambda r: (-float(r["keep"].strip("%")), list(ROWS).index(r["method"])))
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        settings = {"calibration_tokens": args.calibration, "sequence_length": args.length, "machine": machine}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model": Path(args.model).stem, **settings, "rows": rows}, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
