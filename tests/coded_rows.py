"""Rows in codes of random sizes and plans, as decode finds them in caches. What must not be read is NaN."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from latentize.attention.quantizer import GROUP, WIDTHS, Segments
from latentize.runtime.codecs import Coded
from latentize.runtime.kernels.storage import Part, Stored, plain_part
from latentize.runtime.means import Means


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
        "leading": random.choice([0, 0, 1, 4]),
        "padded": random.random() < 0.4,
        "masked": random.random() < 0.3,
        "ragged": random.random() < 0.5,
        "splits": random.choice([1, 1, 1, 3]),
        "tile": random.choice([16, 32, 32]),
    }


def coded_call(made: dict) -> tuple[tuple, dict]:
    """Arguments of a decode: first and newest rows among those in codes apart, as in a static cache, or first rows
    before them, and recent ones after them, as in a growing one."""
    B, H, S, E, r = (made[n] for n in ("batch", "heads", "rows", "recent", "rank"))
    n = sum(count for _, count in made["rope"])
    dtype, total = getattr(torch, made["dtype"]), S + E
    rows = torch.randn(B, total, r + n) * (2.0 ** torch.randint(-5, 3, (B, total, 1)))
    lead = min(made["leading"], S - 1)
    halves = []
    for segments, spread, x_BSn in zip(
        (made["latent"], made["rope"]), made["spreads"], rows.split([r, n], -1), strict=True
    ):
        own = Coded(segments, spread)
        (byte_BSm,) = own.encode(x_BSn[:, :S])
        halves.append(Stored((roomy(byte_BSm, random.randint(0, 5))[:, lead:],), "coded", x_BSn.shape[-1], own))
    starts_B = torch.randint(0, 9, (B,)) if made["padded"] else torch.zeros(B, dtype=torch.long)
    first_BE = starts_B[:, None] + torch.arange(0 if lead else made["sinks"])
    newest_BE = (S - 1 - torch.randperm(made["newest"])).expand(B, -1)
    first_BE = first_BE.where((first_BE[..., None] != newest_BE[:, None]).all(-1) & (first_BE < S), -1)
    newest_BE = newest_BE.where(newest_BE >= lead, -1)
    apart = []
    for at_BE in (first_BE, newest_BE):
        exact_BEd = rows.gather(1, at_BE.clamp_min(0)[..., None].expand(-1, -1, r + n)).to(dtype)
        exact_BEd[at_BE < 0] = float("nan")
        apart += [plain_part(exact_BEd, r, at_BE.shape[1], numbers_BE=at_BE)] if at_BE.shape[1] else []
    elsewhere = torch.cat([part.numbers_BE for part in apart], dim=1) if apart else None
    recent = plain_part(roomy(rows[:, S:].to(dtype), 2), r, E, first=S)
    parts = [Part(*halves, S - lead, lead, apart_BA=elsewhere), *apart, *([recent] if E else [])]
    if lead:
        parts.insert(1, plain_part(roomy(rows[:, :lead].to(dtype), 1), r, lead))
    frequencies_F = torch.rand(made["pairs"])
    means = Means(frequencies_F, starts_B.to(torch.int32))
    q, q_rope = torch.randn(B, H, 1, r).to(dtype), torch.randn(B, H, 1, n + 2 * made["pairs"]).to(dtype)
    lengths = torch.randint(0, total + 1, (B,)) if made["ragged"] else torch.full((B,), total)
    mask = torch.rand(random.choice([1, B]), 1, total) < 0.7 if made["masked"] else None
    options = {"means": means, "mask_BTS": mask}
    call = (q, q_rope, parts, lengths.to(torch.int32), (r + n) ** -0.5 / 4)
    return call, options
