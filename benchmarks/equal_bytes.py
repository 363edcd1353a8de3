"""Every way to a smaller cache on one model, at equal bytes: pooled heads, MLA by each method, windows, 8 and 4 bits.

    python benchmarks/equal_bytes.py                              # the bundled model
    python benchmarks/equal_bytes.py --outputs build/methods      # on what `methods.py --outputs` has kept there
    python benchmarks/equal_bytes.py --print                      # the tables of what was measured before

Conversions that the folder lacks are made (ten minutes each for the calibrated ones, on one core). Then one
``latentize compare`` measures all of them on the same tokens. For each alternative to the calibrated method, the second
table has the best of its rows that takes no more bytes, and whether that loses less. Writes
``benchmarks/results/equal-bytes-<model>.json`` and a chart beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from methods import BUDGETS, ROOT, ROWS

import latentize
from latentize.api import compare
from latentize.errors import OptionError
from latentize.evaluation.grouped import SINKS
from latentize.report.pareto import pareto_chart

OURS = "calibrated"
METHODS = (OURS, "transmla", "mha2mla", "gqa (mean pool)", "mqa (mean pool)")
CACHES = ("int8", "int4")
LENGTH = 512
# Two measurements of the same weights in float32 differ by the order of their sums.
ROUNDING = 1e-4
KEYS = ("perplexity", "excess_loss", "kl", "top1_agreement")


def converted(model: Path, outputs: Path) -> tuple[dict[str, Path], list[str]]:
    """Folders by ``METHOD BUDGET``, made where they are not there; and which cannot be."""
    found: dict[str, Path] = {}
    impossible = []
    for keep in BUDGETS:
        for name in METHODS:
            # The name that methods.py gives it.
            out = outputs / f"{model.name} {name} {keep}".replace(" ", "-").replace(",", "")
            try:
                if not out.exists():
                    latentize.convert(model, out, keep=keep, **ROWS[name])
            except OptionError as error:
                impossible.append(f"{name} {keep}: {error.what}")
                continue
            found[f"{name} {keep}"] = out
    return found, impossible


def hashes(folders: dict[str, Path]) -> dict[str, str]:
    return {
        name: json.loads((f / "latentize.json").read_text())["files"]["model.safetensors"]
        for name, f in folders.items()
    }


def distinct(folders: dict[str, Path]) -> tuple[dict[str, Path], list[str]]:
    """Without what another one is, byte for byte, as GQA and MQA by pooling are where one head is left."""
    kept: dict[str, Path] = {}
    first: dict[str, str] = {}
    notes = []
    for name, digest in hashes(folders).items():
        if digest in first:
            notes.append(f"{name} is {first[digest]}")
            continue
        first[digest] = name
        kept[name] = folders[name]
    return kept, notes


def measure(model: Path, outputs: Path, tokens: int) -> dict[str, Any]:
    folders, impossible = converted(model, outputs)
    folders, same = distinct(folders)
    # As many bytes as the budget: 508 tokens of a context of 512 would be all but the first four.
    windows = [round(LENGTH * float(keep.rstrip("%")) / 100) - SINKS for keep in BUDGETS]
    names = {folder.name: name for name, folder in folders.items()}
    result = compare(
        model, [str(f) for f in folders.values()], cache=CACHES, source_windows=windows, tokens=tokens, progress=tell
    )
    for row in result["rows"]:
        row["model"] = names.get(Path(row["model"]).name, model.name)
        for key in ("name", "dominated_by"):
            row[key] = plain(row[key], names)
    return {
        "model": model.name,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "command": f"python benchmarks/equal_bytes.py --tokens {tokens}",
        "tokens": result["tokens"],
        "text": result["text"],
        "weights_sha256": hashes(folders),
        "notes": [*impossible, *same, *result["notes"]],
        "rows": result["rows"],
    }


def plain(name: str | None, names: dict[str, str]) -> str | None:
    """A row's name with the method and budget instead of the folder."""
    if name is None:
        return None
    folder, comma, rest = name.partition(", ")
    return names.get(folder, folder) + comma + rest


def tell(what: str, done: int, total: int, detail: str = "") -> None:
    if done == total:
        print(what, flush=True)


def is_ours(row: dict[str, Any]) -> bool:
    return row["name"].startswith(f"{OURS} ")


def rival(row: dict[str, Any], rows: list[dict[str, Any]], *, as_stored: bool) -> dict[str, Any] | None:
    """The row of the calibrated method that loses least among those of no more bytes.

    Args:
        row: An alternative.
        rows: All.
        as_stored: Only among those in as many bits as the alternative, so that attention is compared, not formats.
    """
    able = [r for r in rows if is_ours(r) and r["cache_bytes_per_token"] <= row["cache_bytes_per_token"]]
    if as_stored:
        able = [r for r in able if r["cache"] == row["cache"]]
    return min(able, key=lambda r: r["excess_loss"], default=None)


def table(result: dict[str, Any]) -> str:
    """All rows, most bytes first."""
    lines = [
        "| share | bytes a token | | perplexity | excess, nats | KL, nats | same top-1 | another is no worse in both |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(result["rows"], key=lambda r: (-r["cache_bytes_per_token"], r["excess_loss"])):
        lines.append(
            f"| {r['cache_share']:.1%} | {r['cache_bytes_per_token']:,.0f} | {r['name']} | {r['perplexity']:.2f} "
            f"| {r['excess_loss']:.4f} | {r['kl']:.4f} | {r['top1_agreement']:.1%} | {r['dominated_by'] or ''} |"
        )
    return "\n".join(lines)


def duels(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]]:
    """Each alternative, the best of ours in no more bytes, and the same in the same format."""
    rows = [r for r in result["rows"] if not is_ours(r) and r["cache_share"] < 1]
    rows.sort(key=lambda r: (-r["cache_bytes_per_token"], r["excess_loss"]))
    return [(r, rival(r, result["rows"], as_stored=False), rival(r, result["rows"], as_stored=True)) for r in rows]


def verdicts(result: dict[str, Any]) -> str:
    """Whether the calibrated method loses less in no more bytes, alternative by alternative; and how often."""
    lines = [
        "| bytes a token | alternative | excess, nats | calibrated in no more bytes, any format | in the same format |",
        "|---|---|---|---|---|",
    ]
    won = {"any": [0, 0], "same": [0, 0]}
    for row, *rivals in duels(result):
        cells = []
        for kind, other in zip(won, rivals, strict=True):
            if other is None:
                cells.append("none is as small")
                continue
            better = other["excess_loss"] <= row["excess_loss"]
            won[kind][0] += better
            won[kind][1] += 1
            said = "better" if better else "**worse**"
            cells.append(f"{said}: {other['excess_loss']:.4f} ({other['name']}, {other['cache_bytes_per_token']:,.0f})")
        lines.append(
            f"| {row['cache_bytes_per_token']:,.0f} | {row['name']} | {row['excess_loss']:.4f} | {' | '.join(cells)} |"
        )
    lines += [
        "",
        f"In any format it loses no more than {won['any'][0]} of {won['any'][1]}, in the same format than "
        f"{won['same'][0]} of {won['same'][1]}.",
    ]
    return "\n".join(lines)


def unlike(result: dict[str, Any], methods: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Rows that were measured by ``methods.py``, too, on the same weights and tokens; and which of them differ.

    Args:
        result: What was measured here.
        methods: Rows of ``benchmarks/results/methods-<model>.json``, which the README shows.
    """
    theirs = {r["weights_sha256"]: r for r in methods if "weights_sha256" in r}
    same, other = [], []
    for row in result["rows"]:
        measured = theirs.get(result["weights_sha256"].get(row["name"], ""))
        if measured is None or measured["tokens"] != result["tokens"]:
            continue
        same.append(row["name"])
        if not all(math.isclose(row[key], measured[key], rel_tol=ROUNDING, abs_tol=ROUNDING / 10) for key in KEYS):
            other.append(row["name"])
    return same, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-llama-gqa")
    parser.add_argument("--outputs", type=Path, default=ROOT / "build" / "equal-bytes", help="converted models")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tokens", type=int, default=32_768, help="held-out tokens")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / f"equal-bytes-{args.model.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not args.print:
        result = measure(args.model, args.outputs, args.tokens)
        path.write_text(json.dumps(result, indent=2) + "\n")
        path.with_suffix(".svg").write_text(pareto_chart(result["rows"]), encoding="utf-8")
    result = json.loads(path.read_text())
    print(table(result), verdicts(result), *result["notes"], sep="\n\n")
    methods = args.out / f"methods-{args.model.name}.json"
    same, other = unlike(result, json.loads(methods.read_text())["rows"]) if methods.exists() else ([], [])
    print(
        f"\nAs methods.py found them, {len(same)} of the same conversions: {', '.join(same)}; unlike: {other or 'none'}"
    )


if __name__ == "__main__":
    main()
