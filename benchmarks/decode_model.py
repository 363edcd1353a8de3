"""Decode of a whole model against context: latentize, transformers' deepseek_v3, and the GQA model it could come from.

    python benchmarks/decode_model.py [--context 512 2048 8192] [--threads 2]

Random weights: 8 layers, hidden 1,024, MLP 2,816, 16 query heads of 64, 4 kv heads (512 cached values a token and
layer); as MLA at half of that, 224 + 32. bfloat16, 4,096 tokens of vocabulary. Each decode step of every model in
turn. Writes ``benchmarks/results/decode-model.json`` and a chart beside it
(``docs/decode.svg`` is a copy), prints Markdown with the break-even context.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, LlamaConfig

from latentize.bench.decode import Subject, copy_bandwidth, measure
from latentize.report.chart import line_chart
from latentize.runtime.accelerate import accelerate
from latentize.runtime.cache import LatentCache

ROOT = Path(__file__).resolve().parents[1]
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "vocab_size": 4096,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": True,
}


def subjects(formats: list[str]) -> list[Subject]:
    source = LlamaConfig(**SHAPE, num_key_value_heads=4, head_dim=64)
    latent = DeepseekV3Config(
        **SHAPE,
        num_key_value_heads=16,
        kv_lora_rank=224,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        q_lora_rank=None,
        first_k_dense_replace=8,
    )
    llama, stock, fast = (
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval() for config in (source, latent, latent)
    )
    accelerate(fast)
    found = [Subject("latentize", fast, lambda: LatentCache(fast.config))]
    for name in formats:
        found.append(
            Subject(f"latentize, {name}", fast, lambda name=name: LatentCache(fast.config, latent=name, rope="int8"))
        )
    return [*found, Subject("transformers MLA", stock, DynamicCache), Subject("GQA source", llama, DynamicCache)]


def markdown(rows: list[dict[str, Any]]) -> str:
    contexts = sorted({r["context"] for r in rows})
    names = list(dict.fromkeys(r["name"] for r in rows))
    time = {(r["name"], r["context"]): r["milliseconds_per_token"] for r in rows}
    lines = ["| ms a token | " + " | ".join(f"{c:,}" for c in contexts) + " |", "|---" * (len(contexts) + 1) + "|"]
    lines += [f"| {n} | " + " | ".join(f"{time[n, c]:.2f}" for c in contexts) + " |" for n in names]
    for other in ("transformers MLA", "GQA source"):
        ratios = " | ".join(f"{time[other, c] / time['latentize', c]:.2f}" for c in contexts)
        lines.append(f"| {other} / latentize | {ratios} |")
    ahead = [c for c in contexts if time["GQA source", c] >= time["latentize", c]]
    lines.append("")
    lines.append(
        f"Break-even with the source: {ahead[0] if ahead else 'beyond ' + str(contexts[-1])} tokens of context."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--formats", nargs="*", default=["int8", "int4"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models, bandwidth, rows = subjects(args.formats), copy_bandwidth(), []
    for context in args.context:
        rows += [row.describe() for row in measure(models, context=context, steps=args.steps, bandwidth=bandwidth)]
        print(json.dumps(rows[-len(models) :]), flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "decode-model.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(row["name"], []).append((row["context"], row["milliseconds_per_token"]))
    chart = line_chart(series, title="Milliseconds a decoded token", x_label="tokens of context")
    path.with_suffix(".svg").write_text(chart)
    print(markdown(rows))


if __name__ == "__main__":
    main()
