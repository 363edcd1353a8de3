"""Attended distances, the constants that follow from them, and the split that is chosen by their cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.common import FP32, FP64, relative_error
from tests.unit.layers import attention_spec, inputs, random_attention, stats_of
from tests.unit.methods.test_rope_split import project, source_logits, split_logits
from torch import Tensor

from latentize.attention.grouped import attend, grouped_attention, queries_keys
from latentize.attention.latent import latent_attention
from latentize.attention.masks import causal_mask
from latentize.attention.rope import rope_angles, rotate_half
from latentize.attention.spec import AttentionSpec, RopeSpec
from latentize.methods import distances as distance
from latentize.methods.closed_form import linear_fit
from latentize.methods.distances import attended_distances, expected_rotation
from latentize.methods.position import (
    assign_rungs,
    costliest,
    key_components,
    ladder,
    linearised,
    on_ladder,
    position_aware_split,
    rope_cost,
    rung_gains,
)
from latentize.methods.statistics import CalibrationStats, Needed, gather


@pytest.mark.parametrize("budget", [1 << 25, 100, 1])
def test_attended_distances_against_a_loop(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk of queries, in several, and one query at a time."""
    monkeypatch.setattr(distance, "_SCORES_AT_ONCE", budget)
    q, k = torch.randn(2, 4, 9, 6), torch.randn(2, 2, 9, 6)
    expected = torch.zeros(4, 9, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for t in range(9):
                p = (0.7 * (k[b, h // 2, : t + 1] @ q[b, h, t])).softmax(0)
                for s in range(t + 1):
                    expected[h, t - s] += float(p[s])
    got = attended_distances(q, k, 0.7)
    assert relative_error(got, expected) <= FP32
    assert torch.allclose(got.sum(1), torch.full((4,), 18.0, dtype=torch.float64))


@pytest.mark.parametrize("budget", [1 << 25, 100])
def test_attended_distances_of_tokens_that_are_not_in_a_row(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "_SCORES_AT_ONCE", budget)
    q, k = torch.randn(2, 2, 9, 6), torch.randn(2, 1, 9, 6)
    in_a_row = torch.arange(9).repeat(2, 1)
    same = attended_distances(q, k, 0.7, positions_BT=in_a_row)
    assert relative_error(same, attended_distances(q, k, 0.7)) <= FP32
    positions = torch.tensor([[0, 1, 2, 3, 4, 15, 16, 17, 18], list(range(9))])
    expected = torch.zeros(2, 20, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for t in range(9):
                p = (0.7 * (k[b, 0, : t + 1] @ q[b, h, t])).softmax(0)
                for s in range(t + 1):
                    expected[h, positions[b, t] - positions[b, s]] += float(p[s])
    got = attended_distances(q, k, 0.7, positions_BT=positions, reach=20)
    assert relative_error(got, expected) <= FP32


def test_expected_rotation_against_a_loop() -> None:
    histogram, w = torch.rand(3, 7, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    got = expected_rotation(w, histogram)
    for h in range(3):
        for f in range(4):
            mean = sum(histogram[h, t] * torch.exp(1j * w[f] * t) for t in range(7)) / histogram[h].sum()
            assert abs(complex(got[h, f]) - complex(mean)) <= FP64


def test_the_expected_rotation_is_the_best_constant() -> None:
    """``E|e^{iωΔ} - ρ|²`` is ``1 - |ρ|²``, and larger for any other."""
    histogram, w = torch.rand(1, 9, dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    rho = complex(expected_rotation(w, histogram)[0, 0])
    weight = histogram[0] / histogram[0].sum()
    turn = torch.exp(1j * w * torch.arange(9))

    def cost(constant: complex) -> float:
        return float((weight * (turn - constant).abs().square()).sum())

    assert cost(rho) == pytest.approx(1 - abs(rho) ** 2)
    for shift in (0.01, -0.01, 0.01j, -0.01j):
        assert cost(rho + shift) > cost(rho)


@given(stride=st.floats(0.5, 4.0), rope=st.sampled_from([2, 4, 8, 16]))
def test_a_ladder_is_a_plain_base(stride: float, rope: int) -> None:
    """Stock engines read one ``rope_theta``: ``θ' = θ^(σ R / d)``."""
    ours = ladder(1e4, 16, rope, stride)
    theirs = RopeSpec(1e4 ** (stride * rope / 16), rope).frequencies
    assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-9)


def test_strides_of_one_and_of_all() -> None:
    source = RopeSpec(1e4, 16).frequencies
    assert torch.allclose(ladder(1e4, 16, 8, 1.0), torch.tensor(source[:4], dtype=torch.float64))
    assert torch.allclose(ladder(1e4, 16, 8, 2.0), torch.tensor(source[::2], dtype=torch.float64))


def position_stats(spec: AttentionSpec, seed: int = 3) -> tuple[CalibrationStats, Tensor]:
    """Statistics with distances that fall off, each head a little differently."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.exp(-torch.arange(40, dtype=torch.float64) / 5)
    histogram = fall * (0.5 + torch.rand(spec.num_heads, 40, generator=generator, dtype=torch.float64))
    return replace(stats_of(random_attention(spec)), distances_HT=histogram), histogram


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_components_against_the_tokens(kv_heads: int) -> None:
    """At each frequency: energies are those of the keys on the axes, weighted by the query energy of their groups."""
    spec = attention_spec(kv_heads)
    w, (stats, _) = random_attention(spec), position_stats(spec)
    c = key_components(w, spec, stats)
    x = inputs().flatten(0, 1)
    q, k = (torch.complex(y[..., :8], y[..., 8:]) for y in (project(x, w.q_HdD, None), project(x, w.k_GdD, None)))
    for f in range(8):
        weight = torch.stack(
            [
                q[g * spec.group_size : (g + 1) * spec.group_size, :, f].abs().square().mean(1).sum()
                for g in range(kv_heads)
            ]
        )
        assert relative_error(c.weight_FG[f], weight) <= 1e-9
        component = c.axes_FGG[f].mH @ (weight.sqrt()[:, None] * k[:, :, f])
        energy = component.abs().square().mean(1)
        assert torch.allclose(c.energy_FG[f], energy, rtol=1e-8, atol=1e-10 * float(energy.max()))
        assert c.energy_FG[f].tolist() == sorted(c.energy_FG[f].tolist(), reverse=True)
        unit = c.axes_FGG[f].mH @ c.axes_FGG[f]
        assert float((unit - torch.eye(kv_heads)).abs().max()) <= FP64


def test_gains_against_a_sum_over_distances() -> None:
    """What a constant loses, less what the rung's own frequency loses."""
    spec = attention_spec(2)
    stats, histogram = position_stats(spec)
    c = key_components(random_attention(spec), spec, stats)
    rungs = ladder(50.0, 16, 6, 1.3)
    gain = rung_gains(c, rungs)
    weight = histogram.sum(0) / histogram.sum()
    t = torch.arange(40, dtype=torch.float64)
    for j in range(3):
        for f in range(8):
            turn, rung = torch.exp(1j * c.frequencies_F[f] * t), torch.exp(1j * rungs[j] * t)
            best = (weight * turn).sum()
            constant = float((weight * (turn - best).abs().square()).sum())
            mismatch = float((weight * (turn - rung).abs().square()).sum())
            for component in range(2):
                expected = float(c.energy_FG[f, component]) * (constant - mismatch)
                assert float(gain[j, f, component]) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_every_rung_gets_its_own_component() -> None:
    gain = torch.tensor([[[5.0, 1.0], [4.0, 0.0]], [[6.0, 2.0], [3.0, 0.0]]])
    # Rung 1 has the largest gain of all, (0, 0); of what is left rung 0 gains most from (1, 0).
    assert assign_rungs(gain).tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_at_distance_zero_only_the_constants_count(kv_heads: int, biases: bool) -> None:
    """With ``ρ = 1`` (everything looks at itself) the split is ``q · k``, whichever components rotate."""
    spec = attention_spec(kv_heads)
    w = random_attention(spec, biases=biases)
    here = torch.zeros(4, 40, dtype=torch.float64)
    here[:, 0] = 1
    stats = replace(stats_of(w), distances_HT=here)
    c = key_components(w, spec, stats)
    split = position_aware_split(w, spec, c, *on_ladder(c, ladder(50.0, 16, 8, 1.0)))
    x = inputs(batch=1, length=6)[0]
    got, exact = split_logits(split, x, rotate=False), source_logits(w, spec, x, rotate=False)
    # The bias of an un-roped key adds the same to all logits of a query; a softmax does not see that.
    assert relative_error(got - got.mean(-1, keepdim=True), exact - exact.mean(-1, keepdim=True)) <= FP64
    assert biases or relative_error(got, exact) <= FP64
    assert split.k_rope_PRD.shape[:2] == (1, 8)


def test_one_head_with_a_rung_for_each_frequency_is_exact() -> None:
    spec = attention_spec(1)
    w, (stats, _) = random_attention(spec), position_stats(spec)
    c = key_components(w, spec, stats)
    split = position_aware_split(w, spec, c, *on_ladder(c, ladder(50.0, 16, 16, 1.0)))
    x = inputs(batch=1, length=9)[0]
    assert relative_error(split_logits(split, x, rotate=True), source_logits(w, spec, x, rotate=True)) <= FP64
    assert float(split.k_nope_CD.abs().max()) <= FP64


def test_it_loses_less_than_an_even_ladder() -> None:
    """Error of the logits, weighted with the distances that are attended, against every other frequency roped."""
    spec = attention_spec(2)
    w, (stats, histogram) = random_attention(spec), position_stats(spec)
    c = key_components(w, spec, stats)
    x = inputs(batch=1, length=40)[0]
    exact = source_logits(w, spec, x, rotate=True)
    t = torch.arange(40)
    distance_TS = t[:, None] - t[None, :]
    weight_HTS = torch.where(distance_TS >= 0, histogram[:, distance_TS.clamp_min(0)], 0.0)

    def loss(stride: float, *, constants: bool = True) -> float:
        used = c if constants else replace(c, rho_HF=torch.ones_like(c.rho_HF))
        split = position_aware_split(w, spec, used, *on_ladder(used, ladder(50.0, 16, 8, stride)))
        gap = split_logits(split, x, rotate=True) - exact
        return float((weight_HTS * gap.square()).sum())

    assert loss(1.0) < loss(2.0)
    assert loss(1.0) < loss(1.0, constants=False), "the constants earn their place"


def test_free_frequencies_lose_no_more_than_any_ladder() -> None:
    spec = attention_spec(2)
    w, (stats, _) = random_attention(spec), position_stats(spec)
    c = key_components(w, spec, stats)
    at_J2, rungs_J = costliest(c, 4)
    assert rungs_J.tolist() == sorted(rungs_J.tolist(), reverse=True)
    # Each rotates at its own frequency: what is lost is what is given up.
    constant_F = 1 - expected_rotation(c.frequencies_F, c.distances_T[None])[0].abs().square()
    cost_Fc = constant_F[:, None] * c.energy_FG
    lost = float(cost_Fc.sum() - cost_Fc[at_J2[:, 0], at_J2[:, 1]].sum())
    for stride in (1.0, 1.3, 2.0):
        assert lost <= rope_cost(c, ladder(50.0, 16, 8, stride)) + FP64


def test_the_linear_fit_of_a_linear_layer_is_the_layer() -> None:
    spec = attention_spec(2)
    w = random_attention(spec)
    fit = linearised(w, stats_of(w))
    for name in ("q_HdD", "k_GdD", "v_GdD", "o_DHd"):
        assert torch.equal(getattr(fit, name), getattr(w, name)), name


def assert_least_squares(x_nD: Tensor, w_hdD: Tensor, y_nk: Tensor) -> None:
    """It leaves what LAPACK's solution leaves, but for the damping that unseen directions need."""
    left = (x_nD @ w_hdD.flatten(0, 1).T - y_nk).square().sum()
    best = (x_nD @ torch.linalg.lstsq(x_nD, y_nk).solution - y_nk).square().sum()
    assert best > 1e-6 * y_nk.square().sum(), "a fit that is exact would prove nothing"
    assert float(left - best) <= 1e-3 * float(y_nk.square().sum())


def test_the_linear_fit_of_biases_is_least_squares() -> None:
    """Against numpy's own solver on the tokens themselves."""
    spec = attention_spec(2)
    w = random_attention(spec, biases=True)
    x_nD = inputs(batch=8, length=40).flatten(0, 1) + 0.5
    fit = linearised(w, CalibrationStats.of(x_nD[None].float()))
    assert w.k_bias_Gd is not None
    y_nk = x_nD @ w.k_GdD.flatten(0, 1).T + w.k_bias_Gd.flatten()
    assert_least_squares(x_nD, fit.k_GdD, y_nk)
    assert fit.q_bias_Hd is None and fit.v_bias_Gd is None


def test_the_linear_fit_of_norms_is_least_squares() -> None:
    spec = replace(attention_spec(2), qk_norm=True)
    w = random_attention(spec)
    w = replace(w, q_norm_d=torch.rand(16, dtype=torch.float64) + 0.5, k_norm_d=torch.rand(16, dtype=torch.float64))
    x_BTD = inputs(batch=8, length=40)
    fit = linearised(w, gather(x_BTD, w.to(torch.float32), spec, Needed(cross=True)))
    q_BHTd, k_BGTd = queries_keys(x_BTD, w, spec.norm_eps)
    for y, got in ((q_BHTd, fit.q_HdD), (k_BGTd, fit.k_GdD)):
        y_nk = y.transpose(1, 2).flatten(2).flatten(0, 1)
        assert_least_squares(x_BTD.flatten(0, 1), got, y_nk)
    assert fit.q_norm_d is None


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_where_an_input_is_constant_the_linear_fit_of_biases_is_exact(kv_heads: int) -> None:
    """All of them, that of the output too, and nothing is compressed: the layer as it was."""
    spec = replace(attention_spec(kv_heads), qkv_bias=True, o_bias=True)
    w = random_attention(spec, biases=True)
    reachable_D = torch.einsum("DHd->D", w.o_DHd)
    w = replace(w, o_bias_D=reachable_D)
    x_BTD = inputs()
    x_BTD[..., 0] = 30.0
    fit = linear_fit(w, spec, stats_of(w, x_BTD))
    assert fit.o_bias_D is None and fit.q_rope_bias_HR is None
    # The fit is damped, so a constant that is not the largest direction by far would not come out whole.
    assert relative_error(latent_attention(x_BTD, fit, absorb=False), grouped_attention(x_BTD, w, spec)) <= 1e-2


def test_gathered_distances_are_those_of_the_layer() -> None:
    spec = attention_spec(2)
    w = random_attention(spec, biases=True)
    x_BTD = inputs(batch=2, length=12)
    histogram = gather(x_BTD, w.to(torch.float32), spec, Needed(distances=True)).distances_HT
    assert histogram is not None
    assert torch.allclose(histogram.sum(1), torch.full((4,), 24.0, dtype=torch.float64))
    # The layer itself with values that say where they are: Σ p (t - s), as values of every head.
    positions = torch.arange(12, dtype=torch.float64)
    frequencies = torch.tensor([spec.rope.frequencies], dtype=torch.float64)
    cos, sin = rope_angles(frequencies, positions[None])
    q_BHTd, k_BGTd = (rotate_half(y, cos, sin) for y in queries_keys(x_BTD, w, spec.norm_eps))
    k_BHTd = k_BGTd.repeat_interleave(2, dim=1)
    where_BHT1 = positions[None, None, :, None].expand(2, 4, 12, 1)
    mean_BHT1 = attend(q_BHTd, k_BHTd, where_BHT1, causal_mask(12, 12), spec.softmax_scale)
    far = (where_BHT1 - mean_BHT1).sum((0, 2, 3))
    assert relative_error(histogram @ positions, far) <= 1e-5
