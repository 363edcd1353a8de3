"""Statistics stream: sums of batches are the statistics of all."""

from __future__ import annotations

import pytest
import torch
from tests.common import FP32, FP64, relative_error
from tests.unit.layers import attention_spec, inputs, random_attention, stats_of

from latentize.attention.grouped import AttentionWeights
from latentize.methods.statistics import CalibrationStats

FIELDS = ("x_D", "xx_DD", "q_norm_HF", "k_norm_GF")


def weights(*, biases: bool = False) -> AttentionWeights:
    return random_attention(attention_spec(), biases=biases).to(torch.float32)


def test_adding_equals_seeing_all() -> None:
    w = weights(biases=True)
    a, b = inputs(seed=1).float(), inputs(batch=2, length=7, seed=2).float()
    both = CalibrationStats.of(torch.cat([a.flatten(0, 1), b.flatten(0, 1)])[None], w)
    added = CalibrationStats.of(a, w) + CalibrationStats.of(b, w)
    assert added.tokens == both.tokens == 150 + 14
    for name in FIELDS:
        assert relative_error(getattr(added, name), getattr(both, name)) <= FP32, name
        assert getattr(added, name).dtype == torch.float64


@pytest.mark.parametrize("biases", [False, True])
def test_sums_against_float64(biases: bool) -> None:
    w, x = weights(biases=biases), inputs().float()
    streamed, exact = CalibrationStats.of(x, w), stats_of(w.to(torch.float64), x.double())
    assert streamed.tokens == exact.tokens
    for name in FIELDS:
        assert relative_error(getattr(streamed, name), getattr(exact, name)) <= FP32, name


@pytest.mark.parametrize("biases", [False, True])
def test_pair_norms_against_a_loop_over_tokens(biases: bool) -> None:
    spec = attention_spec()
    w, x = weights(biases=biases), inputs(batch=1, length=9).float()
    stats = CalibrationStats.of(x, w)
    assert stats.q_norm_HF is not None
    assert stats.k_norm_GF is not None
    for weight, bias, norms in ((w.q_HdD, w.q_bias_Hd, stats.q_norm_HF), (w.k_GdD, w.k_bias_Gd, stats.k_norm_GF)):
        assert norms.shape == (len(weight), spec.head_dim // 2)
        for head in range(len(weight)):
            for pair in range(spec.head_dim // 2):
                total = 0.0
                for token in x[0]:
                    y = weight[head] @ token + (bias[head] if bias is not None else 0.0)
                    total += float((y[pair] ** 2 + y[pair + spec.head_dim // 2] ** 2).sqrt())
                assert float(norms[head, pair]) == pytest.approx(total, rel=FP32)


def test_norms_are_gathered_where_they_are_asked_for() -> None:
    x, w = inputs().float(), weights()
    bare, full = CalibrationStats.of(x), CalibrationStats.of(x, w)
    assert bare.q_norm_HF is bare.k_norm_GF is None
    assert torch.equal(bare.xx_DD, full.xx_DD)
    assert (bare + bare).tokens == 2 * bare.tokens
    with pytest.raises(ValueError, match="kinds"):
        bare + full


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_moment_of_outputs_against_the_outputs(lead: tuple[int, ...], biased: bool) -> None:
    x = inputs()
    stats = stats_of(random_attention(attention_spec()), x)
    w = torch.randn(*lead, 6, x.shape[-1], dtype=torch.float64)
    bias = torch.randn(*lead, 6, dtype=torch.float64) if biased else None
    y = torch.einsum("...oD,nD->...no", w, x.flatten(0, 1))
    y = y if bias is None else y + bias[..., None, :]
    expected = y.mT @ y / y.shape[-2]
    assert relative_error(stats.moment_of(w, bias), expected) <= FP64
