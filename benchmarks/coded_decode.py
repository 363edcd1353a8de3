"""A decode step over coded rows, layer after layer, beside int4 and bfloat16 rows of the same width.

    python benchmarks/coded_decode.py                     # SmolLM2-135M's sizes, 8,192 cached tokens
    python benchmarks/coded_decode.py --tokens 32768

Interleaved in one run: milliseconds of a layer to attend to all rows and to store a token, and both as a ratio to int4.
All layers have the same lengths, as in a model: what PyTorch prepares for a new shape serves all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig

from latentize.attention.coding import RowCode
from latentize.attention.projections import Up
from latentize.attention.quantizer import Segments
from latentize.runtime.cache import LatentCache
from latentize.runtime.heads import decode

# Widths as a plan for 12.5 % has them, on average: (bits, share of the values).
SHARES = ((5, 1 / 24), (4, 1 / 6), (3, 1 / 4), (2, 1 / 4), (1, 1 / 8), (0, 1 / 6))


def segments(values: int) -> Segments:
    found, left = [], values
    for bits, share in SHARES[:-1]:
        count = 8 * round(share * values / 8)
        found.append((bits, count))
        left -= count
    return (*found, (0, left))


def code(heads: int, rank: int, pairs: int) -> RowCode:
    count = heads * pairs
    mix = torch.randn(count, heads, 2)
    tensors = (torch.eye(rank), mix, torch.arange(pairs).repeat_interleave(heads).int(), torch.randn(count, 2))
    frequencies = torch.logspace(0, -4, pairs)
    return RowCode(segments(rank), segments(2 * count), *tensors, frequencies)


def filled(
    formats: dict[str, str], plan: RowCode | None, layers: int, tokens: int, sizes: tuple[int, int, int]
) -> LatentCache:
    heads, rank, head_dim = sizes
    cache = LatentCache(LlamaConfig(num_hidden_layers=layers), **formats)
    for number, layer in enumerate(cache.layers):
        layer.attends_rows = True
        if plan is not None:
            layer.codes(plan, torch.arange(tokens)[None] < plan.sinks)
        c, k = torch.randn(1, 1, tokens, rank).bfloat16(), torch.randn(1, heads, tokens, head_dim).bfloat16()
        cache.update(c, k, number)
    return cache


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--queries", type=int, default=9)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--times", type=int, default=15)
    args = parser.parse_args()
    heads, head_dim = args.heads, args.head_dim
    rank = heads * head_dim
    sizes = (heads, rank, head_dim)
    plan = code(heads, rank, head_dim // 2)
    kinds = {"bf16": ({}, None), "int4": ({"latent": "int4", "rope": "int4"}, None), "coded": ({}, plan)}
    caches = {name: filled(*kind, args.layers, args.tokens, sizes) for name, kind in kinds.items()}
    up = Up(torch.zeros(heads, 0, rank).bfloat16(), torch.randn(heads, head_dim, rank).bfloat16(), head_dim**-0.5)
    q_nope = torch.zeros(1, args.queries, 1, 0).bfloat16()
    q_rope = torch.randn(1, args.queries, 1, head_dim).bfloat16()
    c, k = torch.randn(1, 1, 1, rank).bfloat16(), torch.randn(1, heads, 1, head_dim).bfloat16()
    attended: dict[str, list[float]] = {name: [] for name in kinds}
    stored: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.times):
        for name, cache in caches.items():
            began, storing = time.perf_counter(), 0.0
            for number, layer in enumerate(cache.layers):
                started = time.perf_counter()
                if layer.coder is not None:
                    layer.codes(layer.coder.code, torch.zeros(1, 1, dtype=torch.bool))
                rows, _ = cache.update(c, k, number)
                storing += time.perf_counter() - started
                decode(q_nope, q_rope, rows, up, None)
            stored[name].append(storing / args.layers)
            attended[name].append((time.perf_counter() - began - storing) / args.layers)
    print("| rows | attending, ms | storing, ms | both, of int4 | bytes a token |\n" + "| -- " * 5 + "|")
    both = {name: [a + s for a, s in zip(attended[name][3:], stored[name][3:], strict=True)] for name in kinds}
    for name, cache in caches.items():
        attending, storing = (1e3 * statistics.median(found[name][3:]) for found in (attended, stored))
        # Of the same round: a machine that is slow for a while is so for all.
        ratio = statistics.median(own / other for own, other in zip(both[name], both["int4"], strict=True))
        of = cache.nbytes / args.layers / (args.tokens + args.times)
        print(f"| {name} | {attending:.2f} | {storing:.2f} | {ratio:.2f} | {of:.1f} |")


if __name__ == "__main__":
    main()
