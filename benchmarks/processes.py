"""Seconds of each stage of a conversion, by one process or several that share it.

    OMP_NUM_THREADS=1 python benchmarks/processes.py MODEL --data valid.txt --layers 6
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/processes.py MODEL --data valid.txt --layers 6

Half of the values, without the polish. With ``--layers`` only the first ones of MODEL, a folder, are converted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import latentize
from latentize.checkpoint import open_checkpoint


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", nargs="+", default=())
    parser.add_argument("--layers", type=int, help="the first of the model; all by default")
    parser.add_argument("--tokens", type=int, default=32_768)
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    seen = time.time()

    def progress(stage: str, *_: Any) -> None:
        nonlocal seen
        now = time.time()
        seconds[stage], seen = seconds.get(stage, 0.0) + now - seen, now

    with tempfile.TemporaryDirectory() as name:
        model = first_layers(args.model, args.layers, Path(name) / "model") if args.layers else args.model
        options: dict[str, Any] = {"tokens": args.tokens, "polish": False, "self_generated": 0}
        options |= {"evaluation_tokens": 2048, "progress": progress}
        # Only the first process writes, and only there it is read.
        report = latentize.convert(model, Path(name) / "out", keep="50%", data=tuple(args.data), **options)
    if report:
        print(f"{report.get('processes', 1)} processes, KL {report['kl']:.4f}\n\n| stage | seconds |\n| -- | -- |")
        for stage, spent in [*seconds.items(), ("all", report["seconds"])]:
            print(f"| {stage} | {spent:.1f} |")


if __name__ == "__main__":
    main()
