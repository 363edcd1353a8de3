"""Peak memory of converting a one-billion-parameter checkpoint, beside what was predicted and what it should be.

    python benchmarks/memory.py [--tokens 32768] [--folder DIR]
    python benchmarks/memory.py --others              # other shapes and efforts, predicted and measured only
    python benchmarks/memory.py --print               # the table of what was measured before

Writes a synthetic Llama-shaped checkpoint (16 layers, hidden 2,048, as Llama-3.2-1B; bf16, three shards, 2.5 GB) into
a temporary folder, converts it in a process of its own, and takes that process's peak from the operating system. The
weights are random: this measures memory and time only. It should stay below one and a half times what a conversion has
to hold: the largest layer in float32, one shard of the output, the hidden states of the texts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from latentize.cli.demo import bundled_model
from latentize.families import model_spec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
SHARDS = 3
ROOT = Path(__file__).resolve().parents[1]
EVALUATION_TOKENS, DRAFT_TOKENS = 1024, 16_384
# Half of the cache. One setting, so that no candidates have to be compared: minutes are saved.
OPTIONS = ["--fast", "--kv-lora-rank", "448", "--qk-rope-head-dim", "64"]
# As the command line; but small models give freed memory back as large ones do, so that what is held counts.
CONVERT = (
    "import math; from latentize import cli; from latentize.conversion import limits; "
    "limits._ROOM = math.inf; cli.main()"
)
MLP = {"hidden_size": 512, "intermediate_size": 16_384, "num_attention_heads": 8, "num_key_value_heads": 2}
MIDDLE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
HALF = ["--kv-lora-rank", "224", "--qk-rope-head-dim", "32"]
QUARTER = ["--kv-lora-rank", "112", "--qk-rope-head-dim", "16"]
# What differs from the large one (nothing given: the bundled model), options, calibration tokens.
OTHERS: dict[str, tuple[dict[str, int] | None, list[str], int]] = {
    "its first 2 layers": ({"num_hidden_layers": 2}, OPTIONS, 4096),
    "2 layers, hidden 512, MLP 16,384": ({"num_hidden_layers": 2, **MLP}, ["--fast", *QUARTER], 8192),
    "4 layers, hidden 1,024, 32,000 rows": (
        {"num_hidden_layers": 4, "vocab_size": 32_000, **MIDDLE},
        ["--no-polish", *HALF],
        8192,
    ),
    "the same, polished": ({"num_hidden_layers": 4, "vocab_size": 32_000, **MIDDLE}, ["--polish", *HALF], 1024),
    "the bundled model, `--fast`": (None, ["--fast"], 32_768),
    "the bundled model": (None, [], 16_384),
}


def write_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Random weights in three shards; returns the number of parameters."""
    folder.mkdir(parents=True)
    shapes = model_spec(config).tensor_shapes()
    generator = torch.Generator().manual_seed(0)
    names, weight_map, total = list(shapes), {}, 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {}
        for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            shape = shapes[name]
            random = torch.randn(shape, generator=generator) * 0.02
            tensors[name] = (random if len(shape) > 1 else 1 + random).to(torch.bfloat16)
            weight_map[name], total = file, total + tensors[name].numel()
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bundled_model() / name).read_bytes())
    return total


def held(tokens: int, out: Path) -> dict[str, int]:
    """Bytes of what a conversion has to hold."""
    spec = model_spec(CONFIG)
    shapes, prefix = spec.tensor_shapes(), spec.layer_prefix(0)
    texts = tokens + min(tokens, DRAFT_TOKENS) + 2 * EVALUATION_TOKENS
    return {
        "layer": 4 * sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix)),
        "shard": max(path.stat().st_size for path in out.glob("*.safetensors")),
        "texts": 4 * texts * spec.attention.hidden_size,
    }


def written(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint, if the folder is not there yet."""
    if folder.exists():
        return
    # In a process of its own: Linux counts the peak of whoever starts a process towards that one's.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        print(f"{pool.submit(write_checkpoint, folder, config).result():,} parameters written", file=sys.stderr)


def converted(model: Path, out: Path, options: list[str], tokens: int) -> dict[str, Any]:
    """What a conversion, a process of its own, says of itself, and what the system says of it."""
    options = [*options, "--tokens", str(tokens)]
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary) / "recipe.yaml"
        recipe.write_text(f"evaluation_tokens: {EVALUATION_TOKENS}\n")
        command = [sys.executable, "-c", CONVERT, "convert", str(model), str(out), *options, "--recipe", str(recipe)]
        with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report = json.loads(printed.splitlines()[-1])
    return {"options": options, "peak_rss_bytes": peak} | {
        "reported_peak_rss_bytes": report["peak_rss_bytes"],
        "predicted_peak_rss_bytes": report["predicted_peak_rss_bytes"],
        "predicted_over_measured": report["predicted_peak_rss_bytes"] / peak,
        "seconds": report["seconds"],
        "format": report["format"],
    }


def libraries() -> int:
    """What a process has that has only imported what a conversion imports."""
    code = "import latentize.api, latentize.machine as m; from transformers import AutoTokenizer; print(m.rss_bytes())"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout)


def measured(folder: Path, tokens: int) -> dict[str, Any]:
    """Everything that is to be known of the large conversion."""
    written(folder / "model", CONFIG)
    result = converted(folder / "model", folder / "out", OPTIONS, tokens)
    parts = held(tokens, folder / "out")
    result |= {"libraries_bytes": libraries(), "held_bytes": parts, "bound_bytes": round(1.5 * sum(parts.values()))}
    result["peak_over_bound"] = result["peak_rss_bytes"] / result["bound_bytes"]
    beyond = result["peak_rss_bytes"] - result["libraries_bytes"]
    result["peak_without_libraries_over_bound"] = beyond / result["bound_bytes"]
    return result


def other(folder: Path, what: str) -> dict[str, Any]:
    """Predicted and measured of another conversion."""
    changes, options, tokens = OTHERS[what]
    model = bundled_model()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        if changes is not None:
            model = Path(temporary) / "model"
            written(model, {**CONFIG, **changes})
        return {"model": what, **converted(model, Path(temporary) / "out", options, tokens)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Bytes in millions."""
    lines = ["| model | options | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = [f"{row[f'{name}_rss_bytes'] / 1e6:,.0f}" for name in ("predicted_peak", "peak")]
        cells = [row["model"], f"`{' '.join(row['options'])}`", *numbers, f"{row['predicted_over_measured']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the files here instead of in a temporary folder")
    parser.add_argument("--tokens", type=int, default=32_768, help="calibration tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--others", nargs="*", choices=list(OTHERS), help="not the large one, but all others, or these")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / "memory.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    threads = os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()
    machine = f"{platform.machine()}, {threads} threads, torch {torch.__version__}"
    about = {"date": datetime.date.today().isoformat(), "machine": machine}

    def save() -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.others is not None and not args.print:
            for what in args.others or OTHERS:
                rows = {row["model"]: row for row in result.get("others", ())}
                rows[what] = {**about, **other(folder, what)}
                result["others"] = [rows[name] for name in OTHERS if name in rows]
                save()
        elif not args.print:
            what = "synthetic, the shapes of Llama-3.2-1B, bf16, 3 shards"
            command = f"python benchmarks/memory.py --tokens {args.tokens}"
            kept = {"others": result["others"]} if "others" in result else {}
            result = {"model": what, "command": command, **about, **measured(folder, args.tokens), **kept}
            save()
    print(json.dumps({name: value for name, value in result.items() if name != "others"}, indent=2))
    print(markdown([result, *result.get("others", ())]))


if __name__ == "__main__":
    main()
