"""Rows in axes and scales for caches of one width: the layer computes the same, and rounding costs less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.common import relative_error
from tests.unit.methods.test_rate import KEYS, PAIRS, RANK, TOKENS, samples, weights
from torch import Tensor

from latentize.attention.latent import LatentWeights, latent_attention
from latentize.methods.even import CACHES, EvenCache, suited
from latentize.methods.rate import RowSamples


def heavy_tailed() -> RowSamples:
    """Tokens of all sizes; the largest ones matter least."""
    rows, g = samples(), torch.Generator().manual_seed(3)
    size = (1.5 * torch.randn(TOKENS, 1, generator=g)).exp()
    pair_R = torch.logspace(1, -1, PAIRS).repeat(2)
    k, by_k = rows.k_rope_nPR * pair_R * size[..., None], rows.by_k_rope_nPR / size[..., None]
    return replace(rows, c_nr=rows.c_nr * size, by_c_nr=rows.by_c_nr / size, k_rope_nPR=k, by_k_rope_nPR=by_k)


def changed(w: LatentWeights, made: LatentWeights) -> tuple[Tensor, Tensor]:
    """What the latent was multiplied by, ``[r, r]``, and the roped keys, ``[P, R]``."""
    axes_rr = torch.linalg.lstsq(w.kv_a_rD.double().T, made.kv_a_rD.double().T).solution.T
    return axes_rr, (made.k_rope_PRD / w.k_rope_PRD).mean(-1)


def wide() -> LatentWeights:
    """Inputs wide enough to tell what happened to latents."""
    w, g = weights().to(torch.float64), torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, 32, generator=g, dtype=torch.float64)

    tensors = {"q_nope_HND": drawn(4, 3), "q_rope_HRD": drawn(4, 2 * PAIRS), "kv_a_rD": drawn(RANK)}
    o_DHV = torch.randn(32, 4, 5, generator=g, dtype=torch.float64)
    return replace(w, **tensors, k_rope_PRD=drawn(KEYS, 2 * PAIRS), o_DHV=o_DHV)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_layer_computes_the_same(name: str, biased: bool) -> None:
    w = wide()
    if biased:
        w = replace(
            w, q_rope_bias_HR=torch.randn(4, 2 * PAIRS).double(), k_rope_bias_PR=torch.randn(KEYS, 2 * PAIRS).double()
        )
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    made = suited(w, heavy_tailed(), CACHES[name], seed=0)
    assert relative_error(latent_attention(x, made, absorb=True), latent_attention(x, w, absorb=True)) < 1e-9
    assert not torch.allclose(made.kv_a_rD, w.kv_a_rD)


def steps(x_nm: Tensor, block: int) -> Tensor:
    """Rounded to 15 steps between the largest and the smallest of a block."""
    parts = x_nm.unflatten(-1, (-1, block or x_nm.shape[-1]))
    scale = parts.abs().amax(-1, keepdim=True) / 7
    return ((parts / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize("name", ["int4", "q4_0"])
def test_rounding_costs_less(name: str) -> None:
    """Squared products of errors and gradients; a plain rotation is what caches do by themselves."""
    w, rows, block = wide(), heavy_tailed(), 8
    axes_rr, factor_PR = changed(w, suited(w, rows, replace(CACHES[name], block=block), seed=0))
    turn_rr = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(0)))[0].double()
    cost = {}
    for how, to_rr in (("rotated", turn_rr), ("suited", axes_rr)):
        c = rows.c_nr.double() @ to_rr.mT
        error = (steps(c, block) - c) @ torch.linalg.inv(to_rr).mT
        cost[how] = float((error * rows.by_c_nr).sum(1).square().mean())
    assert cost["suited"] < 0.5 * cost["rotated"]
    keys, by_keys = (t[:, 0].double() for t in (rows.k_rope_nPR, rows.by_k_rope_nPR))
    # Pairs side by side, as engines have them.
    keys, by_keys = (t.unflatten(1, (2, -1)).mT.flatten(1) for t in (keys, by_keys))
    factor_R = factor_PR[0].unflatten(0, (2, -1)).mT.flatten()
    for how, by_R in (("as it is", torch.ones(2 * PAIRS)), ("suited", factor_R)):
        error = (steps(keys * by_R, block) - keys * by_R) / by_R
        cost[how] = float((error * by_keys).square().sum(1).mean())
    assert cost["suited"] < 0.7 * cost["as it is"]


def test_without_a_scale_values_have_the_size_that_fp8_holds_best() -> None:
    w, rows = wide(), samples(scale=30.0)
    rows = replace(rows, c_nr=1e-5 * rows.c_nr, k_rope_nPR=3e4 * rows.k_rope_nPR)
    axes_rr, factor_PR = changed(w, suited(w, rows, CACHES["fp8"], seed=0))
    for values in (rows.c_nr.double() @ axes_rr.mT, rows.k_rope_nPR * factor_PR):
        assert 4 <= float(values.square().mean().sqrt()) <= 16 and float(values.abs().max()) <= 224


def test_what_has_a_norm_or_no_gradient_keeps_its_roped_keys() -> None:
    w, rows = wide(), samples()
    normed = replace(w, k_norm_R=torch.ones(2 * PAIRS).double(), q_norm_R=torch.ones(2 * PAIRS).double())
    assert torch.equal(suited(normed, rows, CACHES["int4"], seed=0).k_rope_PRD, w.k_rope_PRD)
    unread = replace(rows, by_c_nr=0 * rows.by_c_nr, by_k_rope_nPR=0 * rows.by_k_rope_nPR)
    made = suited(w, unread, CACHES["int4"], seed=0)
    assert torch.equal(made.k_rope_PRD, w.k_rope_PRD) and bool(made.k_up_UNr.isfinite().all())


def test_values_of_any_number_share_a_step_where_blocks_do_not_fit() -> None:
    made = suited(wide(), samples(), EvenCache(block=6), seed=0)
    assert bool(made.k_rope_PRD.isfinite().all())
