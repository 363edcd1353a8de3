"""The Triton kernels in Triton's interpreter, against their twin in float64, over random shapes.

    python tests/interpreted.py --latent int4 --count 40 --seed 0
    python tests/interpreted.py --latent coded --count 200

A process of its own: whether Triton interprets is settled when it is imported. Prints one JSON object a configuration.
What a kernel must not read is NaN, and so are its outputs before it writes them. float32 and float16: the interpreter's
products of bfloat16 are wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from latentize.attention.coding import GROUP, WIDTHS, Segments
from latentize.runtime.codecs import FORMATS, Coded, codec
from latentize.runtime.kernels.launch import Tiles, absorbed_decode, coded_decode
from latentize.runtime.kernels.reference import absorbed_decode_reference, coded_decode_reference
from latentize.runtime.kernels.storage import Means, Part, Stored, plain_part


def poison(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """NaN, or for codes the largest ones."""
    worst = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(shape, worst, dtype=like.dtype)


def roomy(t_BSm: Tensor, more: int) -> Tensor:
    """The same rows in a storage with room for more, as a growing cache's are."""
    B, S, m = t_BSm.shape
    room = poison(t_BSm, (B, S + more, m))
    room[:, :S] = t_BSm
    return room


def part(c_BSr: Tensor, k_BSR: Tensor, latent: str, rope: str, first: int) -> Part:
    """Rows as a cache stores them."""
    S = c_BSr.shape[1]
    more = random.randint(0, 5)
    halves = [codec(f, x.shape[-1]).encode(x) for f, x in ((latent, c_BSr), (rope, k_BSR))]
    if latent == rope and latent in ("bf16", "fp16", "fp32"):
        # Both halves are views of one row, as in a cache that quantises nothing.
        row = roomy(torch.cat([halves[0][0], halves[1][0]], dim=-1), more)
        halves = [(row[..., : c_BSr.shape[-1]],), (row[..., c_BSr.shape[-1] :],)]
    else:
        halves = [tuple(roomy(t, more) for t in half) for half in halves]
    stored = [Stored(t, f, x.shape[-1]) for t, f, x in zip(halves, (latent, rope), (c_BSr, k_BSR), strict=True)]
    return Part(*stored, count=S, first=first)


def configuration(latent: str) -> dict:
    """Random sizes; small ones, for an interpreter."""
    many = random.random() < 0.15
    new = random.choice([1, 1, 2, 3])
    rows = random.randint(new, 90)
    window = random.choice([None, None, random.randint(1, 12), random.randint(1, 60)])
    return {
        "latent": latent,
        "rope": random.choice(FORMATS),
        "dtype": random.choice(["float32", "float16"]),
        "batch": 1 if many else random.randint(1, 3),
        "heads": random.randint(17, 24) if many else random.randint(1, 4),
        "new": new,
        # One value may sum to nearly nothing, and its relative error says nothing.
        "rank": random.choice([7, 16, 24, 33, 40, 70]),
        "rope_dim": random.choice([2, 6, 16, 20]),
        "rows": rows,
        "parts": random.choice([1, 1, 2]) if rows > 1 else 1,
        "window": window,
        "sinks": random.choice([0, 1, 4, 20]) if window else 0,
        "turned": window is not None and random.random() < 0.5,
        "gone": random.choice([0, 9]) if window else 0,
        "masked": random.random() < 0.3,
        "ragged": random.random() < 0.7,
        "splits": random.choice([1, 2, 4]),
        "tile": random.choice([16, 32]),
    }


def errors(made: dict) -> dict:
    """Largest errors: of a query's sum relative to its largest value, of its log-sum-exp relative to 1 or more."""
    B, H, T, S, r, R = (made[n] for n in ("batch", "heads", "new", "rows", "rank", "rope_dim"))
    dtype = getattr(torch, made["dtype"])
    c, k = torch.randn(B, S, r) * 2 ** random.uniform(-6, 3), torch.randn(B, S, R)
    q, q_rope, q_sink = (torch.randn(B, H, T, n).to(dtype) for n in (r, R, R))
    q = (q / float(c.abs().max())).to(dtype)
    cuts = [0, random.randint(1, S - 1), S] if made["parts"] == 2 else [0, S]
    own = "fp32" if dtype == torch.float32 else "fp16"
    formats = [(made["latent"], made["rope"]), (own, own)]
    parts = [part(c[:, a:b], k[:, a:b], *formats[n], a) for n, (a, b) in enumerate(itertools.pairwise(cuts))]
    lengths = torch.randint(0, S + 1, (B,)) if made["ragged"] else torch.full((B,), S)
    lengths = lengths.to(torch.int32)
    mask = torch.rand(random.choice([1, B]), T, S + made["gone"]) < 0.7 if made["masked"] else None
    options = {n: made[n] for n in ("window", "sinks", "gone")}
    options |= {"q_sink_BHTR": q_sink if made["turned"] else None, "mask_BTS": mask}
    call = (q, q_rope, parts, lengths, (r + R) ** -0.5)
    got = absorbed_decode(*call, **options, splits=made["splits"], cut=Tiles(16, made["tile"], 4, 1))
    return compared(*got, *absorbed_decode_reference(*call, **options), dtype)


def compared(got: Tensor, got_lse: Tensor, want: Tensor, want_lse: Tensor, dtype: torch.dtype) -> dict:
    """Largest errors of a call."""
    blind = want_lse == -torch.inf
    assert got.dtype == dtype and got.isfinite().all()
    assert torch.equal(got_lse == -torch.inf, blind) and not got[blind].any()
    error = (got.double() - want).abs().amax(-1) / want.abs().amax(-1)
    lse_error = (got_lse - want_lse).abs() / want_lse.abs().clamp_min(1)
    seen = int((~blind).sum())
    largest = [float(e[~blind].max()) if seen else 0.0 for e in (error, lse_error)]
    return {"error": largest[0], "lse_error": largest[1], "queries": seen, "blind": int(blind.sum())}


def plan(size: int) -> Segments:
    """Random widths, the widest first; all but the last in whole groups, as a plan has them."""
    widths = sorted(random.sample(WIDTHS[1:], random.randint(1, 4)), reverse=True)
    found, left = [], size
    for number, bits in enumerate(widths):
        count = min(left, GROUP * random.randint(0 if number else 1, 3))
        found.append((bits, count))
        left -= count
    return (*(entry for entry in found if entry[1]), (random.choice([0, 0, 1, 3]), left))


def coded_configuration() -> dict:
    """Random sizes and widths of rows in codes."""
    rank, keys, pairs = random.choice([7, 16, 24, 40, 72]), random.choice([1, 2, 3]), random.choice([1, 3, 8, 16])
    return {
        "latent": plan(rank),
        "rope": plan(2 * keys * pairs),
        "spreads": [random.uniform(0.7, 1.4), random.uniform(0.7, 1.4)],
        "dtype": random.choice(["float32", "float32", "float16"]),
        "batch": random.randint(1, 2),
        "heads": random.choice([1, 2, 4, 4, 18]),
        "rank": rank,
        "pairs": pairs,
        "rows": random.randint(1, 50),
        "recent": random.randint(0, 6),
        "sinks": random.choice([0, 1, 4]),
        "newest": random.choice([0, 4]),
        "padded": random.random() < 0.4,
        "masked": random.random() < 0.3,
        "ragged": random.random() < 0.5,
        "splits": random.choice([1, 1, 1, 3]),
        "tile": random.choice([16, 32, 32]),
    }


def coded_errors(made: dict) -> dict:
    """As :func:`errors`, for rows in codes: first and newest ones among them apart, as in a static cache, and recent
    ones after them, as in a growing one."""
    B, H, S, E, r = (made[n] for n in ("batch", "heads", "rows", "recent", "rank"))
    n = sum(count for _, count in made["rope"])
    dtype, total = getattr(torch, made["dtype"]), S + E
    rows = torch.randn(B, total, r + n) * (2.0 ** torch.randint(-5, 3, (B, total, 1)))
    halves = []
    for segments, spread, x_BSn in zip(
        (made["latent"], made["rope"]), made["spreads"], rows.split([r, n], -1), strict=True
    ):
        own = Coded(segments, spread)
        (byte_BSm,) = own.encode(x_BSn[:, :S])
        halves.append(Stored((roomy(byte_BSm, random.randint(0, 5)),), "coded", x_BSn.shape[-1], own))
    starts_B = torch.randint(0, 9, (B,)) if made["padded"] else torch.zeros(B, dtype=torch.long)
    first_BE = starts_B[:, None] + torch.arange(made["sinks"])
    newest_BE = (S - 1 - torch.randperm(made["newest"])).expand(B, -1)
    first_BE = first_BE.where((first_BE[..., None] != newest_BE[:, None]).all(-1) & (first_BE < S), -1)
    newest_BE = newest_BE.clamp_min(-1)
    apart = []
    for at_BE in (first_BE, newest_BE):
        exact_BEd = rows.gather(1, at_BE.clamp_min(0)[..., None].expand(-1, -1, r + n)).to(dtype)
        exact_BEd[at_BE < 0] = float("nan")
        apart += [plain_part(exact_BEd, r, at_BE.shape[1], numbers_BE=at_BE)] if at_BE.shape[1] else []
    elsewhere = torch.cat([part.numbers_BE for part in apart], dim=1) if apart else None
    recent = plain_part(roomy(rows[:, S:].to(dtype), 2), r, E, first=S)
    parts = [Part(*halves, S, apart_BA=elsewhere), *apart, *([recent] if E else [])]
    frequencies_F = torch.rand(made["pairs"])
    means = Means(frequencies_F, starts_B.to(torch.int32))
    q, q_rope = torch.randn(B, H, 1, r).to(dtype), torch.randn(B, H, 1, n + 2 * made["pairs"]).to(dtype)
    lengths = torch.randint(0, total + 1, (B,)) if made["ragged"] else torch.full((B,), total)
    mask = torch.rand(random.choice([1, B]), 1, total) < 0.7 if made["masked"] else None
    options = {"means": means, "mask_BTS": mask}
    call = (q, q_rope, parts, lengths.to(torch.int32), (r + n) ** -0.5 / 4)
    got = coded_decode(*call, **options, splits=made["splits"], cut=Tiles(16, made["tile"], 4, 1))
    return compared(*got, *coded_decode_reference(*call, **options), dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", choices=(*FORMATS, "coded"), nargs="+", default=FORMATS)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Fills what is allocated with NaN.
    torch.use_deterministic_algorithms(True)
    for latent in args.latent:
        random.seed(f"{latent} {args.seed}")
        torch.manual_seed(random.randrange(2**31))
        for _ in range(args.count):
            made = coded_configuration() if latent == "coded" else configuration(latent)
            found = coded_errors(made) if latent == "coded" else errors(made)
            print(json.dumps(made | found), flush=True)


if __name__ == "__main__":
    main()
