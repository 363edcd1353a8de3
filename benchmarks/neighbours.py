"""How long a conversion takes alone, and beside another of the same: with threads that sleep while they wait for
others, as the command line has them, and with threads that spin, as OpenMP's default is.

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


def seconds(source: Path, folder: Path, together: int, policy: str) -> float:
    """From the start of so many conversions to the end of the last."""
    outs = [folder / f"{policy}-{together}-{time.monotonic_ns()}-{index}" for index in range(together)]
    command = [sys.executable, "-m", "latentize", "convert", source]
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [*command, out, "--keep", "50%", "--fast", "--json"],
            env={**os.environ, "OMP_WAIT_POLICY": policy},
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
    cases = [(policy, together) for policy in ("passive", "active") for together in (1, 2)]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            for policy, together in cases:
                found[policy, together].append(seconds(args.source, Path(folder), together, policy))
                print(policy, together, f"{found[policy, together][-1]:.1f} s", flush=True)
    print("| threads that wait | alone, s | two together, s | ratio |", "|---|---|---|---|", sep="\n")
    rows = {}
    for policy in ("passive", "active"):
        alone, two = (min(found[policy, together]) for together in (1, 2))
        rows[policy] = {"alone": alone, "together": two}
        print(f"| {'sleep' if policy == 'passive' else 'spin'} | {alone:.1f} | {two:.1f} | {two / alone:.2f} |")
    if args.json is not None:
        facts = {"source": args.source.name, "date": f"{date.today()}", "cores": os.cpu_count(), "seconds": rows}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
