"""Tasks of lm-eval on several conversions of one model, with the intervals of their differences from it.

    python benchmarks/tasks.py SOURCE --models 50%=out-50 12.5%=out-coded --tasks piqa_local.yaml,lambada_local.yaml
    python benchmarks/tasks.py SOURCE --print

As ``latentize eval --tasks --reference``, but the source is asked once for all of them. Writes
``benchmarks/results/tasks-<model>.json`` after each and prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

from latentize.checkpoint import resolve
from latentize.evaluation import tasks

ROOT = Path(__file__).resolve().parents[1]


def asked_once() -> None:
    """Keep what a model answered, so that the source is not asked again."""
    answered, kept = tasks._answered, {}

    def once(folder: Path, *rest: Any) -> Any:
        if folder not in kept:
            kept[folder] = answered(folder, *rest)
        return kept[folder]

    tasks._answered = once


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | task | metric | examples | source | model | difference |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        span = f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}"
        cells = [row["name"], row["task"], row["metric"], f"{row['examples']:,}", f"{row['reference_value']:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{row['value']:.4f}", f"{row['difference']:+.4f} ({span})"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--tasks", default="", help="names, or paths of YAML")
    parser.add_argument("--limit", type=int, help="examples of each task, at most")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--print", action="store_true", help="ask nothing")
    args = parser.parse_args()
    path = args.out / f"tasks-{Path(args.source).stem}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    asked_once()
    for model in [] if args.print else args.models:
        (name, _, folder), began = model.partition("="), time.monotonic()
        options = {"tasks": args.tasks.split(","), "limit": args.limit, "batch_size": args.batch_size}
        found = tasks.run_tasks(Path(folder), resolve(args.source), **options)
        facts = {"name": name, "date": datetime.date.today().isoformat(), "minutes": (time.monotonic() - began) / 60}
        rows = [row for row in rows if row["name"] != name]
        rows += [{**facts, **row} for row in found["rows"] if row["difference_low"] is not None]
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: found[key] for key in ("lm_eval", "draws")}
        path.write_text(json.dumps({"model": Path(args.source).stem, **settings, "rows": rows}, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
