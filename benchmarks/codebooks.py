"""The codebooks that cached rows are stored with, made anew, and what they lose.

    python benchmarks/codebooks.py [--samples 1000000] [--rounds 25] [--out codebooks.safetensors]

Those that latentize has were made from 500,000 samples a round.

Each is trained on Gaussian vectors (Linde, Buzo & Gray, IEEE Trans. Commun. 28, 1980), from points that are as dense as
the best ones are (Zador, IEEE Trans. Inf. Theory 28, 1982: for ``v`` values, the density to the power ``v / (v + 2)``).
Prints a Markdown table of mean squared errors, relative to the variance: of the best uniform quantiser of one value, of
the best quantiser of one value (Max, IRE Trans. Inf. Theory 6, 1960), of the codebook, searched as the library does it
and exhaustively, and the bound of any code (Cover & Thomas, theorem 10.3.2).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentize.attention import codebooks
from latentize.attention.codebooks import VALUES_AT_ONCE, Codebook

ROOT = Path(__file__).resolve().parents[1]


def nearest(x_nv: Tensor, words_kv: Tensor) -> Tensor:
    """The number of the nearest word, all words tried."""
    half_k = words_kv.square().sum(1) / 2
    parts = x_nv.split(max(1, (1 << 22) // len(words_kv)))
    return torch.cat([torch.addmm(-half_k, part_nv, words_kv.T).argmax(1) for part_nv in parts])


def trained(bits: int, values: int, samples: int, rounds: int) -> Tensor:
    """A codebook of ``2^(bits · values)`` words, ``[k, values]``."""
    count = 1 << (bits * values)
    even_kv = torch.quasirandom.SobolEngine(values, scramble=True, seed=bits).draw(count).clamp(1e-6, 1 - 1e-6)
    words_kv = ((values + 2) / values) ** 0.5 * torch.special.ndtri(even_kv)
    generator = torch.Generator().manual_seed(bits)
    for _ in range(rounds):
        x_nv = torch.randn(samples, values, generator=generator)
        found_n = nearest(x_nv, words_kv)
        sums_kv = torch.zeros_like(words_kv).index_add_(0, found_n, x_nv)
        counts_k1 = torch.bincount(found_n, minlength=count)[:, None]
        words_kv = torch.where(counts_k1 > 0, sums_kv / counts_k1.clamp_min(1), words_kv)
    return words_kv


def scalar_errors(bits: int) -> tuple[float, float]:
    """Of the best uniform and of the best quantiser of one value."""
    x_n = torch.special.ndtri((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000)
    half, uniform = 2 ** (bits - 1), []
    for step in torch.logspace(-2.5, 0.5, 400, dtype=torch.float64).tolist():
        back_n = ((x_n / step).floor().clamp(-half, half - 1) + 0.5) * step
        uniform.append(float((back_n - x_n).square().mean()))
    levels_k = 3**0.5 * torch.special.ndtri((torch.arange(2 * half, dtype=torch.float64) + 0.5) / (2 * half))
    for _ in range(4000):
        found_n = torch.bucketize(x_n, (levels_k[1:] + levels_k[:-1]) / 2)
        counts_k = torch.bincount(found_n, minlength=2 * half)
        sums_k = torch.zeros_like(levels_k).index_add_(0, found_n, x_n)
        moved_k = torch.where(counts_k > 0, sums_k / counts_k.clamp_min(1), levels_k)
        if float((moved_k - levels_k).abs().max()) < 1e-6:
            break
        levels_k = moved_k
    return min(uniform), float((levels_k[found_n] - x_n).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    made = {}
    print("| bits | values | uniform | one value | codebook | searched | bound |\n" + "| -- " * 7 + "|")
    for bits, values in VALUES_AT_ONCE.items():
        kept = trained(bits, values, args.samples, args.rounds).half() if args.out else codebooks.words(bits)
        made[str(bits)], words_kv = kept.contiguous(), kept.float()
        x_nv = torch.randn(args.samples, values, generator=torch.Generator().manual_seed(99))
        all_n, found_n = nearest(x_nv, words_kv), Codebook(words_kv).nearest(x_nv).long()
        errors = [float((words_kv[index_n] - x_nv).square().mean()) for index_n in (all_n, found_n)]
        row = [*scalar_errors(bits), *errors, 4.0**-bits]
        print(f"| {bits} | {values} | " + " | ".join(f"{error:.6f}" for error in row) + " |", flush=True)
    if args.out:
        save_file(made, args.out)


if __name__ == "__main__":
    main()
