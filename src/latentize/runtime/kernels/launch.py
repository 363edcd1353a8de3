"""Absorbed decode by the Triton kernels: what they are launched with.

B sequences, H query heads, T new tokens, Q = H T, S cached rows, r kv_lora_rank, R values of all roped keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from latentize.runtime.codecs import all_words
from latentize.runtime.kernels.storage import Part
from latentize.runtime.means import Means

__all__ = [
    "LARGEST_FLOAT32_RANK",
    "LARGEST_RANK",
    "LARGEST_ROPE",
    "Tiles",
    "absorbed_decode",
    "coded_constants",
    "coded_decode",
    "coded_tiles",
    "compute_types",
    "constants",
    "split_count",
    "tiles",
]

# Beyond it, the sums of a few queries do not fit into registers; tiles of float32 not into 99 KiB of shared memory.
LARGEST_RANK = 1024
LARGEST_FLOAT32_RANK = 512
# Beyond it, tiles of roped keys do not fit beside those of latents.
LARGEST_ROPE = 256
_ROWS_A_SPLIT, _MOST_SPLITS = 256, 128
_MERGED_DIMS = 64
# Roped components that are multiplied at once, in codes.
_ROPED_AT_ONCE = 64


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        queries, rows: Of one tile; powers of two, 16 at least.
        warps, stages: Of a program.
    """

    queries: int
    rows: int
    warps: int
    stages: int


def tiles(queries: int, rank: int, dtype: torch.dtype) -> Tiles:
    """What fits into 99 KiB of shared memory, the least of any chip from Ampere on; not tuned on one."""
    wide = _power(rank)
    block = 16 if queries <= 16 or wide > 512 else 32
    rows = 64 if wide <= 128 else 32 if wide <= 512 else 16
    if dtype == torch.float32:
        block, rows = 16, 16 if wide > 128 else 32
    return Tiles(block, rows, 8 if block * wide > 16 * 256 else 4, 1 if dtype == torch.float32 else 2)


def coded_tiles(heads: int, rank: int, dtype: torch.dtype) -> Tiles:
    """The same for rows in codes: values pass through shared memory on their way from bytes to the matrix units.

    Beyond a rank of 512 there is room for that on chips for servers alone.
    """
    cut = tiles(heads, rank, dtype)
    return replace(cut, queries=min(cut.queries, 16 if _power(rank) > 256 else 32), stages=1)


def split_count(rows: int, programs: int, processors: int) -> int:
    """Programs that share a sequence's rows: a power of two, enough for all processors, none with too little to do."""
    wanted = min(rows // _ROWS_A_SPLIT, -(-2 * processors // programs), _MOST_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _block(size: int, kind: str) -> int:
    return _power((size + 1) // 2 if kind == "int4" else size)


def compute_types() -> dict[torch.dtype, Any]:
    """What the matrix units may be fed with, as Triton calls it."""
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def constants(part: Part, cut: Tiles, dtype: torch.dtype, window: bool, turned: bool, masked: bool) -> dict[str, Any]:
    """The compile-time arguments of ``attend_splits``; no length is among them."""
    latent, rope = part.latent, part.rope
    return {
        "RANK": latent.size,
        "ROPE": rope.size,
        "LATENT": latent.kind,
        "ROPED": rope.kind,
        "WINDOW": window,
        "SINKS_TURNED": turned,
        "MASKED": masked,
        "FACTORED": part.factors_BSK is not None,
        "COMPUTE": compute_types()[dtype],
        "BLOCK_Q": cut.queries,
        "BLOCK_N": cut.rows,
        "BLOCK_RANK": _block(latent.size, latent.kind),
        "BLOCK_ROPE": _block(rope.size, rope.kind),
    }


def absorbed_decode(
    q_BHTr: Tensor,
    q_rope_BHTR: Tensor,
    parts: Sequence[Part],
    lengths_B: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: int = 0,
    gone: int = 0,
    q_sink_BHTR: Tensor | None = None,
    mask_BTS: Tensor | None = None,
    splits: int | None = None,
    cut: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of a few new tokens, the last ones of their sequences, over cached rows.

    Args:
        q_BHTr, q_rope_BHTR: Absorbed queries, in the basis that latents are stored in, and roped ones; in bfloat16,
            float16 or float32, which products are made in, too. Sums are in float32.
        parts: The cache's rows, in order.
        lengths_B: Rows of every sequence, the new ones included, int32. Read on the device.
        scale: Factor on the logits.
        window: Rows that a query sees, itself included; ``None`` is all of them.
        sinks: First rows that are seen beside a window.
        gone: Rows that were let go of between the sinks and the rest; only the mask knows them.
        q_sink_BHTR: Roped queries for the sinks, turned back where sinks are to seem nearer than they are.
        mask_BTS: Boolean, and in force beside the rest; the columns are rows, with those that are gone.
        splits: Programs that share the rows of one part, instead of what suits the device.
        cut: Instead of :func:`tiles`.

    Returns:
        Sums of latents ``[B, H, T, r]``, and log-sum-exps of the logits ``[B, H, T]`` in float32. A query that sees
        nothing gets zeros, and ``-inf``.
    """
    from latentize.runtime.kernels import latent_decode

    # A kernel is launched through an index, with arguments that its decorator adds.
    attend_splits: Any = latent_decode.attend_splits
    batch, heads, new, rank = q_BHTr.shape
    count, dtype, device = heads * new, q_BHTr.dtype, q_BHTr.device
    assert rank <= LARGEST_RANK and dtype in compute_types() and q_rope_BHTR.dtype == dtype
    assert all(t.stride(-1) == 1 for part in parts for half in (part.latent, part.rope) for t in half.tensors)
    assert all(part.factors_BSK is None or part.factors_BSK.stride(-1) == 1 for part in parts)
    cut = cut or tiles(count, rank, dtype)
    q_tiles = -(-count // cut.queries)
    read = [part.count if window is None else min(part.count, sinks + window + new) for part in parts]
    shares = [splits or split_count(n, batch * q_tiles, _processors(device)) for n in read]
    total = sum(shares)
    out_Qsr = torch.empty(batch * count, total, rank, dtype=torch.float32, device=device)
    lse_Qs = torch.empty(batch * count, total, dtype=torch.float32, device=device)
    q, q_rope = q_BHTr.contiguous(), q_rope_BHTR.contiguous()
    q_sink = q_rope if q_sink_BHTR is None else q_sink_BHTR.to(dtype).contiguous()
    # Where there is no mask, any tensor stands for it; and so on.
    mask = q if mask_BTS is None else mask_BTS.contiguous().view(torch.uint8)
    mask_strides = (0, 0) if mask_BTS is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(1))
    with torch.cuda.device_of(q):
        done = 0
        for part, share in zip(parts, shares, strict=True):
            stored = [t for half in (part.latent, part.rope) for t in (half.codes, half.scale)]
            factors = part.factors_BSK
            stored.append(part.latent.codes if factors is None else factors)
            per_factor = count if factors is None else count // factors.shape[-1]
            attend_splits[(q_tiles, share, batch)](
                *(q, q_rope, q_sink, *stored, lengths_B, mask, out_Qsr, lse_Qs),
                *(scale, count, new, per_factor, part.first, part.first + part.count, window or 0, sinks, gone),
                *(share, done, total),
                *(stride for t in stored for stride in t.stride()[:2]),
                *mask_strides,
                **constants(part, cut, dtype, window is not None, q_sink_BHTR is not None, mask_BTS is not None),
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
            done += share
        return _merged(out_Qsr, lse_Qs, q)


def _merged(out_Qsr: Tensor, lse_Qs: Tensor, q_BHTr: Tensor) -> tuple[Tensor, Tensor]:
    """One attention out of those of all splits, as wide as the queries; log-sum-exps ``[B, H, T]``."""
    from latentize.runtime.kernels import latent_decode

    merge_splits: Any = latent_decode.merge_splits
    (count, total, rank), out_BHTr = out_Qsr.shape, torch.empty_like(q_BHTr)
    lse_BHT = torch.empty(q_BHTr.shape[:3], dtype=torch.float32, device=q_BHTr.device)
    merge_splits[(count, -(-rank // _MERGED_DIMS))](
        *(out_Qsr, lse_Qs, out_BHTr, lse_BHT, total),
        RANK=rank,
        BLOCK_S=1 << (total - 1).bit_length(),
        BLOCK_RANK=_MERGED_DIMS,
    )
    return out_BHTr, lse_BHT


def coded_constants(part: Part, cut: Tiles, dtype: torch.dtype, means: Means, masked: bool) -> dict[str, Any]:
    """The compile-time arguments of ``attend_coded_splits``; neither lengths nor widths are among them."""
    pairs = len(means.frequencies_F)
    return {
        "RANK": part.latent.size,
        "ROPE": part.rope.size,
        "PAIRS": pairs,
        "CODED": part.latent.kind == "coded",
        "NUMBERED": part.numbers_BE is not None,
        "APART": 0 if part.apart_BA is None else part.apart_BA.shape[1],
        "MASKED": masked,
        "COMPUTE": compute_types()[dtype],
        "BLOCK_Q": cut.queries,
        "BLOCK_N": cut.rows,
        "BLOCK_RANK": _power(part.latent.size),
        "BLOCK_ROPE": min(_power(part.rope.size), _ROPED_AT_ONCE),
        "BLOCK_PAIRS": _power(pairs),
    }


def coded_decode(
    q_BHTr: Tensor,
    q_rope_BHTR: Tensor,
    parts: Sequence[Part],
    lengths_B: Tensor,
    scale: float,
    *,
    means: Means,
    mask_BTS: Tensor | None = None,
    splits: int | None = None,
    cut: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`absorbed_decode` for one new token over rows in codes, and others that are as they are.

    Args:
        q_BHTr: Absorbed queries, in the basis that latents are stored in, ``T = 1``.
        q_rope_BHTR: Queries for components, then for the cosines and the sines that the mean is turned by: ``n + 2 F``
            values (``RowCode.queries``).
        parts: The cache's rows, both halves in codes or both as they are.
        lengths_B, scale, mask_BTS, splits, cut: As there.
        means: What turns the mean of the keys.

    Returns:
        As there.
    """
    from latentize.runtime.kernels import coded_decode as kernels

    attend_splits: Any = kernels.attend_coded_splits
    (batch, heads, new, rank), dtype, device = q_BHTr.shape, q_BHTr.dtype, q_BHTr.device
    assert new == 1 and rank <= LARGEST_RANK and dtype in compute_types() and q_rope_BHTR.dtype == dtype
    assert q_rope_BHTR.shape[-1] == parts[0].rope.size + 2 * len(means.frequencies_F)
    cut = cut or coded_tiles(heads, rank, dtype)
    q_tiles = -(-heads // cut.queries)
    shares = [splits or split_count(part.count, batch * q_tiles, _processors(device)) for part in parts]
    total = sum(shares)
    out_Qsr = torch.empty(batch * heads, total, rank, dtype=torch.float32, device=device)
    lse_Qs = torch.empty(batch * heads, total, dtype=torch.float32, device=device)
    q, q_rope = q_BHTr.contiguous(), q_rope_BHTR.contiguous()
    # Where there is none, any tensor stands for it.
    mask = q if mask_BTS is None else mask_BTS.contiguous().view(torch.uint8)
    mask_outer = 0 if mask_BTS is None or len(mask) == 1 else mask.stride(0)
    with torch.cuda.device_of(q):
        done = 0
        for part, share in zip(parts, shares, strict=True):
            halves = (part.latent, part.rope)
            numbers, apart = (lengths_B if t is None else t for t in (part.numbers_BE, part.apart_BA))
            places = [lengths_B if half.coded is None else half.coded.places(device) for half in halves]
            attend_splits[(q_tiles, share, batch)](
                *(q, q_rope, *(half.codes for half in halves), *places, all_words(device)),
                *(means.frequencies_F, means.starts_B, numbers, apart, lengths_B, mask, out_Qsr, lse_Qs),
                *(scale, heads, part.first, part.count, share, done, total),
                *(stride for half in halves for stride in half.codes.stride()[:2]),
                *(numbers.stride(0), apart.stride(0), mask_outer),
                **coded_constants(part, cut, dtype, means, mask_BTS is not None),
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
            done += share
        return _merged(out_Qsr, lse_Qs, q)
