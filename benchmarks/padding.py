"""What zeros cost that make a model fit an engine's kernels (``convert --for``): bytes of weights, and time.

    python benchmarks/padding.py PLAIN PADDED [--context 2048] [--rounds 5] [--threads 2]

The same conversion without zeros and with them, in llama.cpp and transformers, interleaved, in float32: the machine
here has no kernel that is the faster for them. Medians over the rounds. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_speed import STEPS, Llama, Transformers

import latentize


def sizes(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    names = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    heads, nope, rope, value = (config[name] for name in names)
    return f"{heads} heads of {nope} + {rope}, values of {value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("padded", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = torch.randint(1000, 4000, (args.context,), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as place:
        runs: dict[tuple[Path, str], Any] = {}
        for folder in (args.plain, args.padded):
            file = Path(place) / f"{folder.name}.gguf"
            latentize.export(folder, file, kind="f32")
            runs[folder, "llama.cpp"] = Llama(file, args.context + STEPS + 1, args.threads)
            runs[folder, "transformers"] = Transformers(folder, accelerated=False)
        times: dict[tuple[Path, str], list[list[float]]] = {key: [] for key in runs}
        for turn in range(args.rounds + 1):
            for key, run in runs.items():
                found = run(ids)
                if turn:
                    times[key].append(found)
        for run in runs.values():
            if isinstance(run, Llama):
                run.process.terminate()
    print("| model | weights, MB | engine | prompt, tokens a second | decode, tokens a second |")
    print("| -- | -- | -- | -- | -- |")
    for (folder, engine), found in times.items():
        prompt, decode = (median(t[i] for t in found) for i in (0, 1))
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
        print(f"| {sizes(folder)} | {weights:.0f} | {engine} | {args.context / prompt:.0f} | {STEPS / decode:.1f} |")


if __name__ == "__main__":
    main()
