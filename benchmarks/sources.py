"""Train the siblings of the bundled model that the benchmarks compare.

    python benchmarks/sources.py                     # into build/sources, about 50 minutes for each pair
    python benchmarks/sources.py tiny-llama-mha      # only this one

Same text, steps and seed as the bundled model; only the kv heads or the family differ. Those of another family see
half as many tokens. Two train at a time, one thread each: on two cores that is faster than one after the other on
both. What is there already stays.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "tiny-llama-mha": ("--kv-heads", "8"),
    "tiny-llama-mqa": ("--kv-heads", "1"),
    "tiny-qwen3-gqa": ("--family", "qwen3", "--tokens", "4000000"),
    "tiny-qwen2-gqa": ("--family", "qwen2", "--tokens", "4000000"),
}


def train(name: str, folder: Path) -> None:
    out = folder / name
    if (out / "config.json").exists():
        print(f"{out} is there already", flush=True)
        return
    command = [sys.executable, str(ROOT / "examples" / "train_tiny_llama.py"), str(out), *SOURCES[name]]
    print(" ".join(command), flush=True)
    log_file = ROOT / "build" / f"{name}.log"
    log_file.parent.mkdir(exist_ok=True)
    with log_file.open("w") as log:
        subprocess.run(command, check=True, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SOURCES), help="default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sources")
    parser.add_argument("--jobs", type=int, default=2, help="models that train at the same time")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SOURCES):
        parser.error(f"no such source: {', '.join(sorted(unknown))}; there are {', '.join(SOURCES)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: train(name, args.folder), args.names))


if __name__ == "__main__":
    main()
