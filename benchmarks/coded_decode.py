"""A decode step over coded rows, layer after layer, beside int4 and bfloat16 rows of the same width.

    python benchmarks/coded_decode.py                     # SmolLM2-135M's sizes, 8,192 cached tokens
    python benchmarks/coded_decode.py --tokens 32768

Interleaved in one run: milliseconds of a layer to attend to all rows, as a ratio to int4, too, and to store a token.
All layers have the same lengths, as in a model: what PyTorch prepares for a new shape serves all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from latentize.attention.coding import RowCode
from latentize.attention.projections import Up
from latentize.attention.quantizer import Segments
from latentize.runtime.heads import decode
from latentize.runtime.layer import LatentLayer

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


def filled(latent: str | None, rope: str | None, plan: RowCode | None, tokens: int, sizes: tuple[int, int, int]):
    heads, rank, head_dim = sizes
    layer = LatentLayer(latent, rope, None, 4, 0)
    layer.attends_rows = True
    if plan is not None:
        layer.codes(plan, torch.arange(tokens)[None] < plan.sinks)
    c, k = torch.randn(1, 1, tokens, rank).bfloat16(), torch.randn(1, heads, tokens, head_dim).bfloat16()
    layer.update(c[:, :, :-1], k[:, :, :-1])
    return layer, c[:, :, -1:], k[:, :, -1:]


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
    kinds = {"bf16": (None, None, None), "int4": ("int4", "int4", None), "coded": (None, None, plan)}
    caches = {name: [filled(*kind, args.tokens, sizes) for _ in range(args.layers)] for name, kind in kinds.items()}
    up = Up(torch.zeros(heads, 0, rank).bfloat16(), torch.randn(heads, head_dim, rank).bfloat16(), head_dim**-0.5)
    q_nope = torch.zeros(1, args.queries, 1, 0).bfloat16()
    q_rope = torch.randn(1, args.queries, 1, head_dim).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    stored: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.times):
        for name, layers in caches.items():
            began, storing = time.perf_counter(), 0.0
            for layer, c, k in layers:
                started = time.perf_counter()
                if layer.coder is not None:
                    layer.codes(layer.coder.code, torch.zeros(1, 1, dtype=torch.bool))
                rows, _ = layer.update(c, k)
                storing += time.perf_counter() - started
                decode(q_nope, q_rope, rows, up, None)
            stored[name].append(storing / args.layers)
            times[name].append((time.perf_counter() - began - storing) / args.layers)
    least = {name: statistics.median(found[3:]) for name, found in times.items()}
    for name, ((layer, *_), *_) in caches.items():
        of = layer.nbytes / layer.seen
        once = 1e3 * statistics.median(stored[name][3:])
        ratio = least[name] / least["int4"]
        attended = f"attended in {1e3 * least[name]:.2f} ms, {ratio:.2f} of int4"
        print(f"{name}: {attended}; a token stored in {once:.2f} ms; {of:.1f} bytes a token")


if __name__ == "__main__":
    main()
