"""How long a conversion takes alone, and beside another of the same: with threads that soon sleep while they wait for
others, as the command line has them, with threads that sleep at once, and with threads that spin.

    python benchmarks/neighbours.py --json benchmarks/results/neighbours.json

Seconds from start to end, the shorter of two runs, which take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "models" / "tiny-llama-gqa"
# What the environment says of it; where it says nothing, the command line decides.
WAITING = {
    "soon sleep": {},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin": {"OMP_WAIT_POLICY": "ACTIVE"},
}


def seconds(source: Path, folder: Path, together: int, waiting: str) -> float:
    """From the start of so many conversions to the end of the last."""
    outs = [folder / f"{together}-{time.monotonic_ns()}-{index}" for index in range(together)]
    command = [sys.executable, "-m", "latentize", "convert", source]
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | WAITING[waiting]
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [*command, out, "--keep", "50%", "--fast", "--json"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for out in outs
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a conversion failed")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [(waiting, together) for waiting in WAITING for together in (1, 2)]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            for waiting, together in cases:
                found[waiting, together].append(seconds(args.source, Path(folder), together, waiting))
                print(waiting, together, f"{found[waiting, together][-1]:.1f} s", flush=True)
    print("| threads that wait | alone, s | two together, s | ratio |", "|---|---|---|---|", sep="\n")
    rows = {}
    for waiting in WAITING:
        alone, two = (min(found[waiting, together]) for together in (1, 2))
        rows[waiting] = {"alone": alone, "together": two}
        print(f"| {waiting} | {alone:.1f} | {two:.1f} | {two / alone:.2f} |")
    if args.json is not None:
        facts = {"source": args.source.name, "date": f"{date.today()}", "cores": os.cpu_count(), "seconds": rows}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
