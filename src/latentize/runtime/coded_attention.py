"""Attention of one new token over rows in codes, in plain PyTorch, fast.

The kernel's plain twin (``kernels.reference``) restores whole rows first. Here little more is made than the codes say:
components without bits are zero and left out, a token's gains go to its scores and probabilities, and the angles that
the mean of the keys is turned by stay a table of their own.

B batch, H query heads, S cached tokens, s rows of a block, r kv_lora_rank, n values of the roped components, F pairs,
b values that have bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from latentize.machine import multiplies_bfloat16
from latentize.runtime.absorbed import additive, attend_block, merge, products, softmax_with_lse, sums
from latentize.runtime.kernels.storage import Part
from latentize.runtime.means import BLOCK_OF_CODES, Means

__all__ = ["attend_codes"]

# Rows are attended to in multiples of so many, and what a step has too many is hidden: products are compiled for each
# size, 0.3 ms each, and a size that lasts for many steps is compiled once.
_ALIKE = 64


def attend_codes(
    q_BHTr: Tensor | None,
    q_rope_BHTR: Tensor,
    parts: Sequence[Part],
    lengths_B: Tensor,
    scale: float,
    *,
    means: Means,
    mask_BTS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of latents, ``[B, H, 1, r]``, and log-sum-exps, ``[B, H, 1]``.

    The arguments are those of ``kernels.launch.coded_decode``, but ``q_BHTr`` is ``None`` where all of every key is
    roped.
    """
    dtype = q_rope_BHTR.dtype
    if dtype != torch.bfloat16 or not multiplies_bfloat16(q_rope_BHTR.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    q_rope_BHm = (q_rope_BHTR[:, :, 0] * scale).to(dtype)
    q_BHr = None if q_BHTr is None else (q_BHTr[:, :, 0] * scale).to(dtype)
    found, apart = [], []
    for part in parts:
        hidden_BS = _hidden(part, lengths_B, mask_BTS)
        if part.latent.coded is None:
            apart.append((part, hidden_BS))
            continue
        start = 0
        while start < part.count:
            # Of the rows that share a table of angles.
            end = start + BLOCK_OF_CODES - (part.first + start) % BLOCK_OF_CODES
            stop = min(end, part.count)
            hidden_Bs = None if hidden_BS is None else hidden_BS[:, start:stop]
            end = min(end, start + -(-(stop - start) // _ALIKE) * _ALIKE, part.stored)
            found.append(_block(q_BHr, q_rope_BHm, part, (start, stop, end), hidden_Bs, means))
            start = stop
    if apart:
        found.append(_plain(q_BHr, q_rope_BHm, apart, means))
    summed_BHr, lse_BH = merge(found)
    return summed_BHr[:, :, None].to(q_rope_BHTR.dtype), lse_BH[..., None]


def _numbers(part: Part, device: torch.device) -> Tensor:
    """Of a part's rows, each in its sequence, ``[B, S]`` or ``[1, S]``."""
    if part.numbers_BE is not None:
        return part.numbers_BE
    return torch.arange(part.first, part.first + part.count, device=device)[None]


def _hidden(part: Part, lengths_B: Tensor, mask_BTS: Tensor | None) -> Tensor | None:
    """Which rows of a part the token does not see there, ``[B, S]``; ``None`` if it sees all."""
    if part.full and part.numbers_BE is None and part.apart_BA is None and mask_BTS is None:
        return None
    numbers_BS = _numbers(part, lengths_B.device)
    hidden_BS = (numbers_BS >= lengths_B[:, None]) | (numbers_BS < 0)
    if mask_BTS is not None:
        mask_BS = mask_BTS[:, 0].expand(len(lengths_B), -1)
        at_BS = numbers_BS.clamp(0, mask_BS.shape[1] - 1).expand(len(lengths_B), -1)
        hidden_BS |= ~mask_BS.gather(1, at_BS)
    if part.apart_BA is not None:
        # One column more than there are rows takes what lies elsewhere.
        at_BA = part.apart_BA - part.first
        at_BA = at_BA.where((at_BA >= 0) & (at_BA < part.count), part.count)
        hidden_BS = F.pad(hidden_BS, (0, 1)).scatter(1, at_BA.expand(len(lengths_B), -1), True)[:, :-1]
    return hidden_BS


def _block(
    q_BHr: Tensor | None,
    q_rope_BHm: Tensor,
    part: Part,
    where: tuple[int, int, int],
    hidden_Bs: Tensor | None,
    means: Means,
) -> tuple[Tensor, Tensor]:
    """Sums and log-sum-exps over some rows in codes, as ``absorbed.attend_block`` has them, in float32.

    ``where`` they begin and stop, and where what is read ends: what is stored beyond them is seen by nobody.
    """
    start, stop, end = where
    latent, rope = part.latent.coded, part.rope.coded
    assert latent is not None and rope is not None
    codes = [(half.tensors[0][:, start:end],) for half in (part.latent, part.rope)]
    c_Bsb, z_Bsb = (own.even(t, q_rope_BHm.dtype) for own, t in zip((latent, rope), codes, strict=True))
    gain_B1s, rope_gain_B1s = (own.gains(t, torch.float32).mT for own, t in zip((latent, rope), codes, strict=True))
    angles_Bsm = means.from_row(part.first + start, end - start, q_rope_BHm.dtype)
    score_BHs = products(q_rope_BHm[..., : z_Bsb.shape[-1]], z_Bsb) * rope_gain_B1s
    score_BHs += products(q_rope_BHm[..., part.rope.size :], angles_Bsm)
    if q_BHr is not None:
        score_BHs.addcmul_(products(q_BHr[..., : c_Bsb.shape[-1]], c_Bsb), gain_B1s)
    score_BHs[..., stop - start :] = -torch.inf
    if hidden_Bs is not None:
        score_BHs[..., : stop - start].masked_fill_(hidden_Bs[:, None], -torch.inf)
    p_BHs, lse_BH = softmax_with_lse(score_BHs, blind=hidden_Bs is not None)
    p_BHs *= gain_B1s
    summed_BHb = sums(p_BHs.to(c_Bsb.dtype), c_Bsb, None).float()
    return F.pad(summed_BHb, (0, part.latent.size - summed_BHb.shape[-1])), lse_BH


def _plain(
    q_BHr: Tensor | None, q_rope_BHm: Tensor, parts: Sequence[tuple[Part, Tensor | None]], means: Means
) -> tuple[Tensor, Tensor]:
    """The same over rows that are seen as they are, all together."""
    # So few that products in bfloat16 take longer to begin than those in float32 take.
    dtype, rank, batch = torch.promote_types(q_rope_BHm.dtype, torch.float32), parts[0][0].latent.size, len(q_rope_BHm)
    found = []
    for part, _ in parts:
        if part.numbers_BE is None:
            angles_BEm = means.from_row(part.first, part.count, dtype)
        else:
            angles_BEm = means.at(part.numbers_BE).to(dtype)
        found.append(torch.cat([*part.rows(dtype), angles_BEm.expand(batch, -1, -1)], dim=-1))
    rows_BEd = torch.cat(found, dim=1)
    q_BHr = q_rope_BHm.new_zeros(*q_rope_BHm.shape[:2], rank) if q_BHr is None else q_BHr
    mask_B1E = None
    if any(hidden_BS is not None for _, hidden_BS in parts):
        hidden_BE = torch.cat(
            [
                rows_BEd.new_zeros(batch, part.count, dtype=torch.bool) if own is None else own.expand(batch, -1)
                for part, own in parts
            ],
            dim=1,
        )
        # Nothing that is not seen may matter, whatever it is.
        rows_BEd = rows_BEd.masked_fill(hidden_BE[..., None], 0)
        mask_B1E = additive(~hidden_BE, dtype)[:, None]
    q_BHd = torch.cat([q_BHr, q_rope_BHm], dim=-1).to(dtype)
    return attend_block(q_BHd, rows_BEd, 1.0, mask_B1E, size=rank)
