"""Bits go where an error costs most, and a basis that is exact changes nothing by itself."""

from __future__ import annotations

from math import log2

import pytest
import torch
from tests.common import relative_error

from latentize.attention.latent import LatentWeights, cache_rows, latent_attention
from latentize.errors import OptionError
from latentize.methods.rate import Components, RowSamples, apply_plan, components, measured_factors, plans

TOKENS, RANK, KEYS, PAIRS = 4096, 16, 2, 4
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.03])


def samples(seed: int = 0, scale: float = 1.0) -> RowSamples:
    """Rows that are correlated, and gradients that are."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    spread = torch.logspace(1, -2, RANK)
    c = drawn(TOKENS, RANK) * spread @ torch.linalg.qr(drawn(RANK, RANK))[0]
    by_c = scale * 1e-2 * drawn(TOKENS, RANK) @ drawn(RANK, RANK)
    k = torch.einsum("npr,pq->nqr", drawn(TOKENS, KEYS, 2 * PAIRS), drawn(KEYS, KEYS))
    return RowSamples(c, by_c, k, scale * 1e-2 * drawn(TOKENS, KEYS, 2 * PAIRS), torch.arange(TOKENS))


@pytest.fixture(scope="module")
def layer() -> Components:
    return components(samples(), FREQUENCIES)


def weights() -> LatentWeights:
    g = torch.Generator().manual_seed(1)
    H, N, V, D, R = 4, 3, 5, 12, 2 * PAIRS
    shapes = [(H, N, D), (H, R, D), (RANK, D), (KEYS, R, D), (2, N, RANK), (2, V, RANK), (D, H, V)]
    tensors = [torch.randn(shape, generator=g) for shape in shapes]
    return LatentWeights(*tensors, FREQUENCIES.expand(KEYS, -1), 0.2)


def test_components_are_uncorrelated_and_their_errors_add_up(layer: Components) -> None:
    rows = samples()
    z = rows.c_nr.double() @ layer.encode_rr.mT
    moment = z.mT @ z / TOKENS
    assert relative_error(moment.diagonal().diag(), moment) < 1e-6
    by_z = rows.by_c_nr.double() @ torch.linalg.inv(layer.encode_rr)
    information = 0.5 * by_z.mT @ by_z / TOKENS
    assert relative_error(torch.eye(RANK).double(), information) < 0.05, "in nats: half of a gradient's square is one"


def test_roped_components_cost_what_their_gradients_say(layer: Components) -> None:
    """Small errors of random direction: half of the squared product with the gradient, on average."""
    rows, g = samples(), torch.Generator().manual_seed(2)
    error = 1e-3 * torch.randn(TOKENS, KEYS, 2 * PAIRS, generator=g)
    nats = float(0.5 * (error * rows.by_k_rope_nPR).sum((1, 2)).square().mean())
    re, im = error.chunk(2, dim=-1)
    pair_J = layer.pair_J.long()
    delta_JPn = torch.complex(re, im).permute(2, 1, 0)[pair_J].to(torch.complex128)
    z_Jn = (layer.mix_JP[:, :, None] * delta_JPn).sum(1)
    assert float(z_Jn.abs().square().sum(0).mean()) == pytest.approx(nats, rel=0.1)


def test_what_matters_more_gets_more_bits(layer: Components) -> None:
    (plan,) = plans([layer], [(1.0, 1.0)], 16.0)
    assert plan.row_bytes <= 16
    assert plan.latent_m[0] > plan.latent_m[-1]
    assert plan.latent_m.diff().max() <= 0 and plan.rope_m.diff().max() <= 0, "the widest come first"
    more, less = plans([layer, components(samples(scale=0.1), FREQUENCIES)], [(1.0, 1.0)] * 2, 16.0)
    assert more.row_bytes > less.row_bytes
    assert more.row_bytes + less.row_bytes <= 32
    raised, same = plans([layer, layer], [(100.0, 100.0), (1.0, 1.0)], 16.0)
    assert raised.row_bytes > same.row_bytes


def test_a_bit_more_takes_three_quarters_of_the_error(layer: Components) -> None:
    costs = [plans([layer], [(1.0, 1.0)], size)[0].nats for size in (8.0, 12.0, 16.0, 20.0, 24.0)]
    assert costs == sorted(costs, reverse=True)
    # 32 values: four bytes are a bit of each, six decibels; more where it is some values that get one more.
    assert 0.8 < log2(costs[0] / costs[-1]) / 2 / 4 < 1.5


def test_no_bytes_for_anything_are_refused(layer: Components) -> None:
    with pytest.raises(OptionError, match="too few"):
        plans([layer], [(1.0, 1.0)], 2.5)


def test_more_bits_come_nearer_to_the_layer() -> None:
    w, errors = weights(), []
    at = torch.arange(TOKENS)[None]
    c, k = cache_rows(torch.randn(1, TOKENS, 12), w, at)
    by_c, by_k = torch.randn_like(c), torch.randn_like(k)
    rows = (t.transpose(1, 2)[0] for t in (c, by_c, k, by_k))
    c, by_c, k, by_k = rows
    layer, x = components(RowSamples(c[:, 0], by_c[:, 0], k, by_k, at[0]), FREQUENCIES), torch.randn(1, 30, 12)
    for size in (10.0, 16.0, 28.0):
        (plan,) = plans([layer], [(1.0, 1.0)], size)
        made = apply_plan(w, layer, plan, sinks=4, newest=0)
        assert made.code is not None
        assert made.code.row_bytes == plan.row_bytes
        plain, rounded = (latent_attention(x, each, absorb=False) for each in (w, made))
        errors.append(float((rounded - plain).norm()))
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2] > 0


def test_layers_that_cost_more_than_they_should_are_measured(layer: Components) -> None:
    trial = plans([layer, layer], [(1.0, 1.0)] * 2, 8.0)
    costs = {"latent": layer.latent.cost(trial[0].latent_m), "rope": layer.rope.cost(trial[0].rope_m)}
    found = measured_factors([layer, layer], trial, lambda number, half: costs[half] * (9.0 if number else 1.0))
    assert found[0] == pytest.approx((1.0, 1.0))
    assert found[1] == pytest.approx((3.0, 3.0))
