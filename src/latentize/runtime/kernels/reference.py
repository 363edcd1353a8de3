"""The naive twins of what ``launch`` has, in plain PyTorch: what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentize.runtime.kernels.storage import Part
from latentize.runtime.means import Means

__all__ = ["absorbed_decode_reference", "coded_decode_reference", "visible"]


def visible(
    lengths_B: Tensor,
    new: int,
    rows: int,
    *,
    window: int | None = None,
    sinks: int = 0,
    gone: int = 0,
    mask_BTS: Tensor | None = None,
) -> Tensor:
    """Who may look at whom, boolean ``[B, T, S]``, for the first ``S = rows`` rows."""
    row_S = torch.arange(rows, device=lengths_B.device)
    at_BT1 = (lengths_B[:, None] - new + torch.arange(new, device=lengths_B.device))[..., None]
    seen_BTS = row_S <= at_BT1
    if window is not None:
        seen_BTS = seen_BTS & ((at_BT1 - row_S < window) | (row_S < sinks))
    if mask_BTS is not None:
        seen_BTS = seen_BTS & mask_BTS[..., torch.where(row_S < sinks, row_S, row_S + gone)]
    return seen_BTS


def absorbed_decode_reference(
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
) -> tuple[Tensor, Tensor]:
    """As ``launch.absorbed_decode``, in float64; rows and masks are built in full."""
    q, q_rope = q_BHTr.double(), q_rope_BHTR.double()
    q_sink = q_rope if q_sink_BHTR is None else q_sink_BHTR.double()
    rows = [part.rows(torch.float64) for part in parts]
    c_B1Sr, k_B1SR = (torch.cat(halves, dim=1)[:, None] for halves in zip(*rows, strict=True))
    row_S, turned = torch.arange(c_B1Sr.shape[2], device=q.device), sinks if window is not None else 0
    seen_BTS = visible(lengths_B, q.shape[2], len(row_S), window=window, sinks=sinks, gone=gone, mask_BTS=mask_BTS)
    # Nothing that no query sees may matter, whatever it is.
    read_BS = seen_BTS.any(1)[:, None, :, None]
    c_B1Sr, k_B1SR = c_B1Sr.where(read_BS, 0.0), k_B1SR.where(read_BS, 0.0)
    rope_BHTS = torch.where(row_S < turned, q_sink @ k_B1SR.mT, q_rope @ k_B1SR.mT)
    score_BHTS = scale * (q @ c_B1Sr.mT + rope_BHTS)
    factors = [part.factors_BSK[:, : part.count] for part in parts if part.factors_BSK is not None]
    if factors:
        factor_BKS = torch.cat(factors, dim=1).mT.double()
        score_BHTS = score_BHTS * factor_BKS.repeat_interleave(q.shape[1] // factor_BKS.shape[1], 1)[:, :, None]
    score_BHTS = score_BHTS.masked_fill(~seen_BTS[:, None], -torch.inf)
    lse_BHT = score_BHTS.logsumexp(-1)
    p_BHTS = (score_BHTS - lse_BHT.clamp_min(torch.finfo(torch.float64).min)[..., None]).exp()
    return p_BHTS @ c_B1Sr, lse_BHT


def coded_decode_reference(
    q_BHTr: Tensor,
    q_rope_BHTR: Tensor,
    parts: Sequence[Part],
    lengths_B: Tensor,
    scale: float,
    *,
    means: Means,
    mask_BTS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``launch.coded_decode``, in float64; all rows are restored, with the angles of their positions beside them."""
    c, k, seen = [], [], []
    for part in parts:
        latent_BEr, rope_BEn = part.rows(torch.float64)
        numbers_BE = part.numbers_BE
        if numbers_BE is None:
            numbers_BE = (part.first + torch.arange(part.count, device=q_BHTr.device)).expand(len(latent_BEr), -1)
        angle_BEF = (numbers_BE - means.starts_B[:, None])[..., None].double() * means.frequencies_F.double()
        seen_BE = (numbers_BE >= 0) & (numbers_BE < lengths_B[:, None])
        if part.apart_BA is not None:
            seen_BE &= (numbers_BE[..., None] != part.apart_BA[:, None]).all(-1)
        if mask_BTS is not None:
            mask_BS = mask_BTS[:, 0].expand(len(seen_BE), -1)
            seen_BE &= mask_BS.gather(1, numbers_BE.clamp(0, mask_BS.shape[1] - 1).long())
        c.append(latent_BEr)
        k.append(torch.cat([rope_BEn, angle_BEF.cos(), angle_BEF.sin()], dim=-1))
        seen.append(seen_BE)
    c_B1Er, k_B1En, seen_B1E = (torch.cat(t, dim=1)[:, None] for t in (c, k, seen))
    # Nothing that is not seen may matter, whatever it is.
    c_B1Er, k_B1En = (t.where(seen_B1E[..., None], 0.0) for t in (c_B1Er, k_B1En))
    score_BHTE = scale * (q_BHTr.double() @ c_B1Er.mT + q_rope_BHTR.double() @ k_B1En.mT)
    score_BHTE = score_BHTE.masked_fill(~seen_B1E[:, :, None], -torch.inf)
    lse_BHT = score_BHTE.logsumexp(-1)
    p_BHTE = (score_BHTE - lse_BHT.clamp_min(torch.finfo(torch.float64).min)[..., None]).exp()
    return p_BHTE @ c_B1Er, lse_BHT
