"""The parts of a conversion, on attention that has nothing to say: zeros, and what they make of prices and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.common import FP32, FP64, random_tokens, relative_error
from tests.latent_models import mixture
from tests.unit.layers import D, attention_spec, inputs, random_attention, stats_of
from torch import Tensor

from latentize.attention.grouped import AttentionWeights, grouped_attention
from latentize.conversion.allocate import exchange, price
from latentize.conversion.draft import naming_layer
from latentize.conversion.limits import finite_numbers
from latentize.errors import NumericsError
from latentize.formats.deepseek_v3 import LatentNorm
from latentize.methods.care import whitened_svd
from latentize.methods.lower_rank import LatentMoments, lower
from latentize.methods.pooling import pool_heads
from latentize.methods.position import linearised
from latentize.methods.transmla import balanced_pca
from latentize.modeling.unread import without_unread
from latentize.training.refine import _correction


def head(w: AttentionWeights, name: str, number: int, dim: int = 0) -> AttentionWeights:
    changed = getattr(w, name).clone()
    changed.select(dim, number).zero_()
    return replace(w, **{name: changed})


# Damage of a layer of four heads, two kv heads; and what is zero after it, by name and number.
UNREAD: dict[str, tuple[Callable[[AttentionWeights], AttentionWeights], dict[str, list[int]]]] = {
    "all is read": (lambda w: w, {}),
    "one head's output": (lambda w: head(w, "o_DHd", 1, 1), {"q_HdD": [1]}),
    "a group's output": (
        lambda w: head(head(w, "o_DHd", 0, 1), "o_DHd", 1, 1),
        {"q_HdD": [0, 1], "k_GdD": [0], "v_GdD": [0]},
    ),
    "one head's query": (lambda w: head(w, "q_HdD", 3), {"q_HdD": [3]}),
    "a group's queries": (lambda w: head(head(w, "q_HdD", 2), "q_HdD", 3), {"q_HdD": [2, 3], "k_GdD": [1]}),
    "a key": (lambda w: head(w, "k_GdD", 0), {"q_HdD": [0, 1], "k_GdD": [0]}),
    "a value": (lambda w: head(w, "v_GdD", 1), {"q_HdD": [2, 3], "k_GdD": [1], "v_GdD": [1], "o_DHd": [2, 3]}),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_nothing_reads_becomes_zero(kind: str) -> None:
    damage, gone = UNREAD[kind]
    spec, x = attention_spec(), inputs()
    w = damage(random_attention(spec))
    made = without_unread(w)
    assert relative_error(grouped_attention(x, made, spec), grouped_attention(x, w, spec)) <= FP64
    for name in ("q_HdD", "k_GdD", "v_GdD"):
        assert [i for i, part in enumerate(getattr(made, name)) if not part.any()] == gone.get(name, []), name
    if not gone:
        assert all(getattr(made, name) is tensor for name, tensor in vars(w).items())


def test_biases_are_read() -> None:
    """A key or a value of nothing but a bias is something."""
    spec, x = attention_spec(), inputs()
    w = random_attention(spec, biases=True)
    for name in ("q_HdD", "k_GdD", "v_GdD"):
        w = replace(w, **{name: torch.zeros_like(getattr(w, name))})
    made = without_unread(w)
    assert all(getattr(made, name) is tensor for name, tensor in vars(w).items())
    assert float(grouped_attention(x, made, spec).abs().max()) > 0


def test_a_norm_over_all_heads_reads_every_head() -> None:
    spec, x = attention_spec(qk_norm=True, qk_norm_across=True), inputs()
    norms = {"q_norm_d": torch.ones(4, 16).double(), "k_norm_d": torch.ones(2, 16).double()}
    w = head(replace(random_attention(spec), **norms), "k_GdD", 0)
    w = head(head(w, "q_HdD", 2), "q_HdD", 3)
    made = without_unread(w)
    assert made.q_HdD is w.q_HdD
    assert made.k_GdD is w.k_GdD
    assert relative_error(grouped_attention(x, made, spec), grouped_attention(x, w, spec)) <= FP64


@pytest.mark.parametrize("kind", ["a group's output", "a value"])
def test_a_pool_of_a_living_and_a_dead_head_is_the_living_one(kind: str) -> None:
    spec, x = attention_spec(), inputs()
    w = without_unread(UNREAD[kind][0](random_attention(spec)))
    pooled = grouped_attention(x, pool_heads(w, 1), attention_spec(1))
    assert relative_error(pooled, grouped_attention(x, w, spec)) <= FP64


@pytest.mark.parametrize("nothing", ["keys", "values", "inputs"])
@pytest.mark.parametrize("method", [balanced_pca, whitened_svd])
def test_factors_of_nothing(method: Callable[..., Any], nothing: str) -> None:
    """What is left is kept whole where the rank allows it."""
    draw = torch.Generator().manual_seed(0)
    k_CD, v_ED = (torch.randn(6, D, generator=draw, dtype=torch.float64) for _ in range(2))
    k_CD, v_ED = k_CD * (nothing != "keys"), v_ED * (nothing != "values")
    x = inputs() * (nothing != "inputs")
    found = method(k_CD, v_ED, stats_of(random_attention(attention_spec()), x), 12 if nothing == "inputs" else 6)
    made = torch.cat([found.k_up_Cr, found.v_up_Er]) @ found.down_rD
    assert relative_error(made, torch.cat([k_CD, v_ED])) <= FP64


def test_what_rounding_has_left_of_keys_takes_no_room() -> None:
    draw = torch.Generator().manual_seed(0)
    v_ED = torch.randn(6, D, generator=draw, dtype=torch.float64)
    k_CD = 1e-16 * torch.randn(6, D, generator=draw, dtype=torch.float64)
    found = balanced_pca(k_CD, v_ED, stats_of(random_attention(attention_spec())), 6)
    assert relative_error(found.v_up_Er @ found.down_rD, v_ED) <= FP64


def test_a_linear_fit_to_nothing() -> None:
    """Inputs that are zero, or weights: biases that no linear function makes, and no NaN."""
    spec = attention_spec(qkv_bias=True)
    w = replace(random_attention(spec, biases=True), o_bias_D=torch.ones(D).double())
    fitted = linearised(w, stats_of(w, 0 * inputs()))
    assert torch.equal(fitted.k_GdD, w.k_GdD)
    none = replace(w, o_DHd=torch.zeros_like(w.o_DHd), v_GdD=torch.zeros_like(w.v_GdD))
    made = vars(linearised(none, stats_of(none))).values()
    assert all(bool(t.isfinite().all()) for t in made if isinstance(t, torch.Tensor))


def test_normalised_heads_of_zeros_stay_zero() -> None:
    spec = attention_spec(qk_norm=True)
    w = head(
        replace(random_attention(spec), q_norm_d=torch.ones(16).double(), k_norm_d=torch.ones(16).double()), "k_GdD", 0
    )
    stats = stats_of(w)
    cross = {name: torch.randn(len(m), 16, D).double() for name, m in (("qx_HdD", w.q_HdD), ("kx_GdD", w.k_GdD))}
    cross["kx_GdD"][0] = 0
    fitted = linearised(w, replace(stats, **cross))
    assert bool(fitted.k_GdD.isfinite().all())
    assert not fitted.k_GdD[0].any()


def test_no_correction_is_made_of_nothing() -> None:
    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(rows), 5, 3), torch.ones(len(rows), 5, 4)

    assert torch.equal(_correction(read, [torch.arange(2)], torch.ones(2, 5), False), torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9])
def test_a_latent_of_nothing_is_not_enlarged(size: float, dtype: torch.dtype) -> None:
    norm = LatentNorm.stored_as(dtype, size, size)
    assert norm.latent == 1
    assert norm.weight * norm.up == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("nothing", ["kv_a_proj_with_mqa", "kv_b_proj", "kv_a_layernorm", "o_proj"])
@torch.no_grad()
def test_a_lower_rank_of_nothing(nothing: str) -> None:
    """A latent that is zero, or that nothing reads, has the same output at any rank."""
    model = mixture("deepseek_v3")
    attention, rank = model.model.layers[0].self_attn, 8
    full = attention.kv_lora_rank
    weight = attention.get_submodule(nothing).weight.data
    weight[: full if nothing == "kv_a_proj_with_mqa" else None] = 0
    seen = LatentMoments(attention.kv_a_layernorm.variance_epsilon)
    x = torch.randn(200, attention.kv_a_proj_with_mqa.in_features, generator=torch.Generator().manual_seed(0))
    q = torch.randn(200, attention.num_heads, attention.qk_nope_head_dim, generator=torch.Generator().manual_seed(1))
    seen.add(attention.kv_a_proj_with_mqa(x)[:, :full], q)
    made = lower(attention.state_dict(), seen, rank, scale=float(attention.scaling))
    assert all(bool(t.isfinite().all()) for t in made.tensors.values())
    tokens = random_tokens(1, 20)
    before = model(tokens).logits
    attention.kv_lora_rank = rank
    for name, tensor in made.tensors.items():
        module, _, kind = name.rpartition(".")
        setattr(attention.get_submodule(module), kind, torch.nn.Parameter(tensor))
    assert relative_error(model(tokens).logits, before) <= FP32


# Prices and errors.

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("odd", [NAN, INF, 0.0, -1.0, 1e300])
@pytest.mark.parametrize("at", [8, 16, 24])
def test_ranks_are_exchanged_whatever_a_price_is(odd: float, at: int) -> None:
    prices = [price({8: 0.4, 16: 0.1, 24: 0.05, at: odd}), price({8: 0.2, 16: 0.1, 24: 0.05})]
    ranks = exchange([16, 16], prices, [(4, 32), (4, 32)])
    assert sum(ranks) == 32
    assert all(4 <= rank <= 32 for rank in ranks)
    assert all(math.isfinite(at_(rank)) for at_ in prices for rank in range(4, 33))


def test_prices_that_are_no_numbers_move_nothing() -> None:
    assert exchange([16, 16], [lambda rank: NAN] * 2, [(4, 32)] * 2) == [16, 16]


def test_what_overflows_costs_most() -> None:
    at = price({8: NAN, 16: 0.1, 24: 0.05})
    assert at(8) > 1e6 > at(16) == pytest.approx(0.1)
    assert exchange([16, 16], [at, price({8: 0.2, 16: 0.1, 24: 0.05})], [(8, 24)] * 2)[0] >= 16


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), FloatingPointError("diverged"), OverflowError("large")]
)
def test_errors_of_arithmetic_name_the_layer(error: ArithmeticError) -> None:
    with pytest.raises(NumericsError, match="layer 3: ") as caught, finite_numbers([]), naming_layer(3):
        raise error
    assert caught.value.code == "LZ601"


def test_a_factorisation_that_fails_names_the_layer() -> None:
    with pytest.raises(NumericsError, match="layer 1: "), finite_numbers([]), naming_layer(1):
        torch.linalg.cholesky(-torch.eye(2))
