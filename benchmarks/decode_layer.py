"""One decode step of one attention layer: latents as latentize attends them, as transformers does, and GQA at its best.

    python benchmarks/decode_layer.py [--context 1024 4096 16384] [--batch 1] [--threads 1]

Sizes of Llama-3-8B and DeepSeek-V3's cache: 32 query heads, 8 kv heads of 128; 512 + 64 cached values. bfloat16, random
tensors, every contender in turn within each round, medians. Queries are given; for the latent forms the products
with ``W_UK`` and ``W_UV`` are part of what is timed, caches are not updated. Writes
``benchmarks/results/decode-layer.json`` and prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from latentize.runtime.cache import LatentLayer
from latentize.runtime.heads import Up, decode

ROOT = Path(__file__).resolve().parents[1]
H, G, D_HEAD, RANK, ROPE, NOPE, V = 32, 8, 128, 512, 64, 128, 128
SCALE = (NOPE + ROPE) ** -0.5
FORMATS = (None, "int8", "int4", "fp8")


def grouped(batch: int, context: int) -> dict[str, Callable[[], Any]]:
    """GQA-8 in several forms; the cache is contiguous, as a static one is."""
    q = torch.randn(batch, H, 1, D_HEAD, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, G, context, D_HEAD, dtype=torch.bfloat16) for _ in range(2))
    folded = q.view(batch, G, H // G, D_HEAD)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    splits = context // 2048

    def split() -> Any:
        size = context // splits
        parts = (batch * G * splits, 1, size, D_HEAD)
        queries = folded[:, :, None].expand(-1, -1, splits, -1, -1).reshape(batch * G * splits, 1, H // G, D_HEAD)
        out, lse = flash(queries, k.view(parts), v.view(parts), 0.0, False, scale=SCALE)
        share = lse.view(batch * G, splits, H // G).softmax(1)
        return (out.view(batch * G, splits, H // G, D_HEAD) * share[..., None]).sum(1)

    def products() -> Any:
        score = (k @ folded.mT).mT * SCALE
        return score.float().softmax(-1).to(v.dtype) @ v

    def narrow_products() -> Any:
        return ((folded * SCALE) @ k.mT).softmax(-1) @ v

    forms = {
        "GQA-8, SDPA enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "GQA-8, SDPA, group as queries": lambda: F.scaled_dot_product_attention(folded, k, v),
        "GQA-8, matrix products": products,
        "GQA-8, matrix products, scores in bf16": narrow_products,
    }
    return forms | ({"GQA-8, split": split} if splits > 1 else {})


def latent(batch: int, context: int, formats: tuple[str | None, ...]) -> dict[str, Callable[[], Any]]:
    """Absorbed decode, from caches of several formats."""
    w_HNr, w_HVr = (torch.randn(H, n, RANK, dtype=torch.bfloat16) / RANK**0.5 for n in (NOPE, V))
    q_nope, q_rope = (torch.randn(batch, H, 1, n, dtype=torch.bfloat16) for n in (NOPE, ROPE))
    c, k_rope = (torch.randn(batch, 1, context, n, dtype=torch.bfloat16) for n in (RANK, ROPE))
    up, forms = Up(w_HNr, w_HVr, SCALE), {}
    for name in formats:
        layer = LatentLayer(name, None if name is None else "int8", None, 0, 0)
        layer.attends_rows = True
        rows, _ = layer.update(c, k_rope)
        label = "latentize" if name is None else f"latentize, {name}+int8"
        forms[label] = lambda rows=rows: decode(q_nope, q_rope, rows, up, None)
    return forms


def stock(batch: int, context: int) -> dict[str, Callable[[], Any]]:
    """transformers: expand all keys and values, then SDPA."""
    config = DeepseekV3Config(
        hidden_size=1024,
        num_attention_heads=H,
        num_key_value_heads=H,
        kv_lora_rank=RANK,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=NOPE,
        v_head_dim=V,
        q_lora_rank=None,
    )
    module = DeepseekV3Attention(config, 0).to(torch.bfloat16).eval()
    q = torch.randn(batch, H, 1, NOPE + ROPE, dtype=torch.bfloat16)
    c, k_rope = (torch.randn(batch, 1, context, n, dtype=torch.bfloat16) for n in (RANK, ROPE))

    def run() -> Any:
        k, v = module.expand_kv(c, k_rope)
        return F.scaled_dot_product_attention(q, k, v, scale=SCALE)

    return {"transformers MLA": run}


@torch.no_grad()
def measure(batch: int, context: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each contender; slow ones are run less often."""
    forms = {**latent(batch, context, FORMATS), **grouped(batch, context), **stock(batch, context)}
    took: dict[str, list[float]] = {name: [] for name in forms}
    for run in forms.values():
        run()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(took["transformers MLA"]) < 3:
        for name, run in forms.items():
            if name == "transformers MLA" and len(took[name]) >= 5:
                continue
            before = time.perf_counter()
            run()
            took[name].append(1e3 * (time.perf_counter() - before))
    return {name: statistics.median(times) for name, times in took.items()}


def product_rate() -> float:
    """FLOP per second of a large bfloat16 product, the best of several: what arithmetic cannot be faster than."""
    a, b = (torch.randn(1024, 1024, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(15):
        before = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - before)
    return 2 * 1024**3 / min(times)


def absorbed_flop(batch: int, context: int) -> int:
    """Of scores and sums of latents: ``2 H (r + R)`` and ``2 H r`` a cached token."""
    return 2 * H * (2 * RANK + ROPE) * batch * context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each context and batch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, rate = [], product_rate()
    for batch in args.batch:
        for context in args.context:
            times = measure(batch, context, args.seconds)
            best = min(t for name, t in times.items() if name.startswith("GQA"))
            arithmetic = 1e3 * absorbed_flop(batch, context) / rate
            row = {"batch": batch, "context": context, "milliseconds": times, "best_gqa": best}
            rows.append({**row, "absorbed_arithmetic": arithmetic})
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "bf16_product_flop_per_second": rate,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "decode-layer.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    names = list(rows[-1]["milliseconds"])
    print("| ms | " + " | ".join(f"B{r['batch']}, {r['context']:,}" for r in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(f"{r['milliseconds'].get(name, float('nan')):.2f}" for r in rows) + " |")
    bound = [f"{r['absorbed_arithmetic']:.2f}" for r in rows]
    print(f"| absorbed arithmetic alone, at {rate / 1e9:.0f} GFLOP/s | " + " | ".join(bound) + " |")
    for label in ("best GQA / latentize", "transformers / latentize"):
        top = [r["best_gqa"] if "GQA" in label else r["milliseconds"]["transformers MLA"] for r in rows]
        shown = [f"{t / r['milliseconds']['latentize']:.2f}" for t, r in zip(top, rows, strict=True)]
        print(f"| {label} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
