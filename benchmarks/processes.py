"""Seconds of each stage of a conversion, by one process or several that share it.

    OMP_NUM_THREADS=1 python benchmarks/processes.py MODEL --data valid.txt --layers 6
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/processes.py MODEL --data valid.txt --layers 6

Half of the values, without the polish. With ``--layers`` only the first ones of MODEL, a folder, are converted. Beside
what was measured stands what the counted work says, from products and sums of gradients that this machine is timed at.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import latentize
from latentize.checkpoint import open_checkpoint
from latentize.conversion.rates import rates_of
from latentize.families.opening import open_source
from latentize.machine import multiplies_bfloat16
from latentize.planning.forecast import Forecast, forecast
from latentize.processes import team, together
from latentize.recipe import Recipe

# Of sums that are timed: float32 numbers, and how often.
_SUMMED, _TIMES = 1 << 20, 20


def first_layers(model: Path, count: int, folder: Path) -> Path:
    """The model without the layers beyond so many."""
    checkpoint = open_checkpoint(model)
    names = [name for name in checkpoint.names() if ".layers." not in name or int(name.split(".")[2]) < count]
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file({name: checkpoint.load(name) for name in names}, folder / "model.safetensors", {"format": "pt"})
    config = {**json.loads((model / "config.json").read_text()), "num_hidden_layers": count}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sent() -> float:
    """Bytes a second that a process hands to others while tensors are summed; called by all of them."""
    tensor, processes = torch.ones(_SUMMED), team()
    if processes.size == 1:
        return float("inf")
    processes.add_up([tensor])
    started = time.perf_counter()
    for _ in range(_TIMES):
        processes.add_up([tensor])
    handed = 4 * _SUMMED * 2 * (processes.size - 1) / processes.size
    return _TIMES * handed / (time.perf_counter() - started)


def predicted(model: Path, options: dict[str, Any]) -> Forecast:
    """What the counted work says of a conversion on this machine; called by all processes."""
    _, spec = open_source(model)
    with together("cpu"):
        rates = replace(rates_of(spec, "cpu"), sent=sent())
        faster = multiplies_bfloat16("cpu")
        return forecast(spec, Recipe(**options), rates, faster=faster, processes=team().size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", nargs="+", default=())
    parser.add_argument("--layers", type=int, help="the first of the model; all by default")
    parser.add_argument("--tokens", type=int, default=32_768)
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    seen = time.time()

    def progress(what: str, done: int, total: int, detail: str = "") -> None:
        nonlocal seen
        now = time.time()
        seconds[what], seen = seconds.get(what, 0.0) + now - seen, now

    with tempfile.TemporaryDirectory() as name:
        model = first_layers(args.model, args.layers, Path(name) / "model") if args.layers else args.model
        options: dict[str, Any] = {"tokens": args.tokens, "polish": False, "self_generated": 0}
        options |= {"evaluation_tokens": 2048, "keep": "50%", "data": tuple(args.data)}
        # Only the first process writes, and only there it is read.
        report = latentize.convert(model, Path(name) / "out", **options, progress=progress)
        counted = predicted(model, options)
    if report:
        print(f"{report.get('processes', 1)} processes, KL {report['kl']:.4f}\n")
        print("| stage | seconds | counted |\n| -- | -- | -- |")
        for stage, spent in seconds.items():
            print(f"| {stage} | {spent:.1f} | {counted.stages.get(stage, 0.0):.1f} |")
        print(f"| all | {report['seconds']:.1f} | {counted.seconds:.1f} |")


if __name__ == "__main__":
    main()
