"""The Triton kernels in Triton's interpreter, against their twin in float64, over random shapes.

    python -m tests.interpreted --latent int4 --count 40 --seed 0
    python -m tests.interpreted --latent coded --count 200

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
from tests.coded_rows import coded_call, coded_configuration, roomy
from torch import Tensor

from latentize.runtime.codecs import FORMATS, codec
from latentize.runtime.kernels.launch import Tiles, absorbed_decode, coded_decode
from latentize.runtime.kernels.reference import absorbed_decode_reference, coded_decode_reference
from latentize.runtime.kernels.storage import Part, Stored


def part(c_BSr: Tensor, k_BSR: Tensor, latent: str, rope: str, first: int, factors: int) -> Part:
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
    factors_BSK = roomy(1 + torch.randn(c_BSr.shape[0], S, factors).abs(), more) if factors else None
    return Part(*stored, count=S, first=first, factors_BSK=factors_BSK)


def configuration(latent: str) -> dict:
    """Random sizes; small ones, for an interpreter."""
    many = random.random() < 0.15
    new = random.choice([1, 1, 2, 3])
    rows = random.randint(new, 90)
    window = random.choice([None, None, random.randint(1, 12), random.randint(1, 60)])
    heads = random.randint(17, 24) if many else random.randint(1, 4)
    return {
        "latent": latent,
        "rope": random.choice(FORMATS),
        "dtype": random.choice(["float32", "float16"]),
        "batch": 1 if many else random.randint(1, 3),
        "heads": heads,
        "factors": random.choice([0, 0, 1, heads, 2 if heads % 2 == 0 else 1]),
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
    spans = enumerate(itertools.pairwise(cuts))
    parts = [part(c[:, a:b], k[:, a:b], *formats[n], a, made["factors"]) for n, (a, b) in spans]
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


def coded_errors(made: dict) -> dict:
    """As :func:`errors`, for rows in codes."""
    call, options = coded_call(made)
    got = coded_decode(*call, **options, splits=made["splits"], cut=Tiles(16, made["tile"], 4, 1))
    return compared(*got, *coded_decode_reference(*call, **options), call[0].dtype)


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
