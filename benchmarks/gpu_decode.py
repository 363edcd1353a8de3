"""Decode on a GPU, in one command: is it right, and how fast.

    python benchmarks/gpu_decode.py [--stages correctness graphs layer model conversion] [--points 64x4096 8x65536]
    python benchmarks/gpu_decode.py --cpu

Correctness: the Triton kernels against float64, in every format; static caches under CUDA graphs against growing ones.
Time: our kernels in all formats, GQA-8 by PyTorch (flash, cuDNN), transformers' MLA, FlashInfer and FlashMLA where they
are installed, against the bandwidth of a copy; steps of an 8 B-shaped model, source and converted; a conversion.
Prints tables and writes ``benchmarks/results/gpu-decode.json``.

Without a GPU (``--cpu`` says that none is wanted) the kernels run in Triton's interpreter at small sizes, every part is
checked, and nothing is timed. Status: 0 if all that was asked for was done and is right; 1 if something is wrong; 3 if
there is no GPU to measure, and ``--cpu`` did not say so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("correctness", "graphs", "layer", "model", "conversion")
POINTS = ((64, 4096), (8, 65_536), (1, 262_144), (256, 1024))


def point(text: str) -> tuple[int, int]:
    batch, _, rows = text.partition("x")
    return int(batch), int(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="check in Triton's interpreter, time nothing")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--points", nargs="+", type=point, default=list(POINTS), help="sequences x cached rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--convert-layers", nargs=2, type=int, default=(1, 3), help="of the models that are converted")
    parser.add_argument("--out", type=Path, help="JSON; on a GPU benchmarks/results/gpu-decode.json by default")
    return parser.parse_args()


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All stages that were asked for."""
    from gpu import conversion, correctness, layer, machine, model

    torch.manual_seed(args.seed)
    timed = device.type == "cuda"
    bandwidth = machine.copy_bandwidth(device) if timed else None
    result: dict[str, Any] = {"machine": machine.describe(device), "timed": timed, "copy_bytes_per_second": bandwidth}
    result |= {name: [] for name in STAGES}
    if "correctness" in args.stages:
        for number, case in enumerate(correctness.cases(device)):
            result["correctness"].append(correctness.check(case, args.seed * 1000 + number, device))
        result["correctness"] += correctness.codes(device)
    if "graphs" in args.stages:
        result["graphs"] = model.check(device)
    if "layer" in args.stages:
        sizes = layer.Sizes() if timed else layer.Sizes(4, 2, 8, 32, 8, 8, 8)
        result["sizes"] = str(sizes)
        dtype = torch.bfloat16 if timed else torch.float32
        for batch, rows in args.points if timed else [(2, 64)]:
            for make in layer.contenders(batch, rows, device, dtype, sizes):
                result["layer"].append(told(layer.measure(make, batch, rows, dtype, bandwidth)))
    if "model" in args.stages and bandwidth is not None:
        result["model"] = models(args.points, device, bandwidth)
    if "conversion" in args.stages:
        result["conversion"] = converted(conversion, args, device)
    return result


def models(points: list[tuple[int, int]], device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """Source and converted, one model in memory at a time."""
    from gpu import model

    rows, built, of = [], None, None
    for name, (config, new_cache) in model.subjects(*model.large(), timed=True).items():
        if of is not config:
            built = None
            torch.cuda.empty_cache()
            built, of = model.build(config, device, torch.bfloat16), config
        for batch, context in points:
            rows.append(told(model.measure(built, name, new_cache, batch, context, bandwidth)))
    return rows


def converted(conversion: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """With a GPU a part of an 8 B-shaped model; without, a tiny one, to see that it runs."""
    from gpu import model

    source = (model.large() if device.type == "cuda" else model.small())[0]
    recipe: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "fast": True}
    if device.type != "cuda":
        recipe = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "fast": True, "tokens": 512, "sequence_length": 64}
        recipe |= {"evaluation_tokens": 128, "selection_tokens": 128}
    try:
        return told(conversion.measure(source, tuple(args.convert_layers), device, **recipe))
    except Exception as error:  # told, and counted as wrong
        return told({"trouble": f"{type(error).__name__}: {error}"[:300], "right": False})


def told(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), flush=True)
    return row


def status(result: dict[str, Any], *, wanted: bool) -> int:
    """What the process ends with; ``wanted``: something was to be timed."""
    conversion = [result["conversion"]] if result["conversion"] else []
    rows = [*result["correctness"], *result["graphs"], *result["layer"], *result["model"], *conversion]
    ours = [row for row in rows if "trouble" in row and "latentize" in row.get("name", "")]
    if ours or not all(row.get("right", True) for row in rows):
        return 1
    return 3 if wanted and not result["timed"] else 0


def main() -> int:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    if device.type == "cpu":
        # Settled when triton is imported, which nothing has done yet.
        os.environ["TRITON_INTERPRET"] = "1"
        print("No GPU: kernels are interpreted at small sizes, NOTHING IS TIMED.", flush=True)
    from gpu.report import markdown

    result = run(args, device)
    out = args.out or (ROOT / "benchmarks" / "results" / "gpu-decode.json" if result["timed"] else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    print("\n" + markdown(result))
    code = status(result, wanted=not args.cpu)
    print(
        {0: "All right.", 1: "SOMETHING IS WRONG.", 3: "Right as far as it ran; without a GPU nothing was timed."}[code]
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
