"""Coded rows: their basis is exact, their rounding is what theory says, and gradients go through it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.common import FP32, relative_error

from latentize.attention.cache import GrowingCache
from latentize.attention.codebooks import VALUES_AT_ONCE, codebook
from latentize.attention.coding import RowCode
from latentize.attention.latent import LatentWeights, latent_attention
from latentize.attention.quantizer import WIDTHS, coded
from latentize.attention.rope import rope_angles, rotate_half, rotate_interleaved
from latentize.errors import CheckpointError

# Mean squared error of the best quantiser of one Gaussian value of variance one (Max 1960, table I).
MAX_ERRORS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def row_code(keys: int, pairs: int, latent: int = 8, *, seed: int = 0, sinks: int = 2, newest: int = 0) -> RowCode:
    """Some code: a quarter of the values in 6 bits, a quarter in 3, the rest in none."""
    g = torch.Generator().manual_seed(seed)
    count = keys * pairs
    order = torch.arange(pairs).repeat_interleave(keys)[torch.randperm(count, generator=g)]

    def segments(size: int) -> tuple[tuple[int, int], ...]:
        return tuple((bits, n) for bits, n in ((6, size // 4), (3, size // 4), (0, size - 2 * (size // 4))) if n)

    mix = torch.randn(count, keys, 2, generator=g) * 4
    mean, frequencies = 3 * torch.randn(count, 2, generator=g), torch.rand(pairs, generator=g)
    latent_mix = torch.eye(latent) + 0.2 * torch.randn(latent, latent, generator=g)
    tensors = (3 * latent_mix, mix, order.int(), mean, frequencies)
    return RowCode(segments(latent), segments(2 * count), *tensors, (1.0, 1.1), sinks, newest)


@given(st.integers(0, 10**6), st.sampled_from([(1, 4), (2, 3), (3, 8)]), st.integers(1, 3), st.integers(1, 5))
def test_components_hold_what_the_keys_hold(seed: int, shape: tuple[int, int], share: int, tokens: int) -> None:
    keys, pairs = shape
    code = row_code(keys, pairs, seed=seed)
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(2, keys, tokens, 2 * pairs, generator=g)
    q = torch.randn(2, keys * share, 3, 2 * pairs, generator=g)
    z = code.components(k)
    assert z.shape == (2, tokens, 2 * keys * pairs)
    # Random mixes may be near to singular.
    assert relative_error(code.keys(z), k) < 1e-3
    expected = q @ k.repeat_interleave(share, dim=1).mT
    assert relative_error(code.queries(q)[..., : z.shape[-1]] @ z[:, None].mT, expected) < 1e-3


def test_components_turn_as_keys_do() -> None:
    code, frequencies = row_code(3, 4), torch.tensor([1.0, 0.3, 0.1, 0.02])
    k = torch.randn(1, 3, 6, 8)
    cos, sin = rope_angles(frequencies[None], torch.arange(6)[None] * 7)
    turned_first = code.components(rotate_half(k, cos, sin))
    own_cos, own_sin = (part[:, 0][..., code.pair_J.long()] for part in (cos[..., :4], sin[..., :4]))
    assert relative_error(rotate_interleaved(code.components(k), own_cos, own_sin), turned_first) < FP32


@pytest.mark.parametrize("bits", [bits for bits in WIDTHS if bits])
def test_the_error_lies_between_the_bound_and_one_value_at_a_time(bits: int) -> None:
    x = torch.randn(1, 2000, 64)
    error = float((coded(x, ((bits, 64),), 1.0) - x).square().mean() / x.square().mean())
    best = MAX_ERRORS.get(bits, MAX_ERRORS[5] / 3.7 ** (bits - 5))
    # The gain takes the spread of a token's own size out of it, which a Gaussian has little of. Four values together
    # gain more than two, and at higher rates.
    share = {1: 0.9, 2: 0.85, 3: 0.77, 4: 0.85, 5: 0.82, 6: 0.82, 8: 1.02}[bits]
    assert 4.0**-bits < error < share * best


@pytest.mark.parametrize("bits", list(VALUES_AT_ONCE))
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_word_that_is_found_is_about_the_nearest(bits: int, spread: float) -> None:
    book = codebook(bits, torch.device("cpu"))
    x = spread * torch.randn(4000, book.values, generator=torch.Generator().manual_seed(bits))
    distances = torch.cdist(x, book.words_kv, compute_mode="donot_use_mm_for_euclid_dist")
    found = distances.gather(1, book.nearest(x).long()[:, None])[:, 0].square().mean()
    assert float(found / distances.amin(1).square().mean()) < (1.1 if spread > 1 else 1.02)


def test_a_word_does_not_depend_on_what_is_looked_up_beside_it() -> None:
    for bits in VALUES_AT_ONCE:
        book = codebook(bits, torch.device("cpu"))
        x = torch.randn(257, book.values)
        assert torch.equal(book.nearest(x), torch.cat([book.nearest(each) for each in x.split(1)]))


def test_nothing_breaks_on_what_is_no_number() -> None:
    x = torch.tensor([[[float("nan")] * 8, [float("inf")] * 8, [-1e30] * 8, [0.0] * 8]])
    for bits in VALUES_AT_ONCE:
        assert coded(x, ((bits, 8),), 1.0).shape == x.shape


def test_a_token_may_be_of_any_size() -> None:
    x, segments = torch.randn(1, 5, 16), ((4, 8), (2, 8))
    made = coded(x, segments, 1.0)
    for power in (-9, -1, 3, 12):
        assert torch.equal(coded(x * 2.0**power, segments, 1.0), made * 2.0**power)
    assert coded(torch.zeros(1, 1, 16), segments, 1.0).abs().max() < 1e-3
    assert torch.equal(coded(x, ((3, 8), (0, 8)), 1.0)[..., 8:], torch.zeros(1, 5, 8)), "no bits, no value"


def test_exact_tokens_are_the_first_of_each_text() -> None:
    code = row_code(1, 4, sinks=2)
    at = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [1, 1, 0, 1, 2], [50, 51, 90, 91, 92]])
    first = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(code.exact(at, 0), first)
    assert torch.equal(code.exact(torch.tensor([[1, 2, 3]]), 1), torch.tensor([[True, False, False]]))
    assert not code.exact(torch.tensor([[700]]), 700).any()


def test_gradients_go_through() -> None:
    code = row_code(2, 4)
    c, k = torch.randn(1, 1, 5, 8, requires_grad=True), torch.randn(1, 2, 5, 8, requires_grad=True)
    exact = torch.tensor([[True, True, False, False, False]])
    c_hat, k_hat = code.rounded(c, k, exact, torch.arange(5)[None])
    for put, back in ((c, c_hat), (k, k_hat)):
        assert torch.equal(back[:, :, :2], put[:, :, :2])
        assert not torch.allclose(back[:, :, 2:], put[:, :, 2:])
        (gradient,) = torch.autograd.grad(back.square().sum(), put)
        assert torch.equal(gradient, 2 * back)


def test_a_config_says_what_tensors_do_not() -> None:
    code = row_code(2, 4)
    assert code.describe()["codebooks"] == "gaussian"
    again = RowCode.described(
        code.describe(), code.latent_mix_rr, code.mix_JP2, code.pair_J, code.mean_J2, code.frequencies_F
    )
    assert vars(again) == vars(code)
    assert code.row_bytes == 2 + 6 * 1 + 3 * 1 + 6 * 1 + 3 * 1, "eight values of a width at a time"


def test_other_codebooks_are_refused() -> None:
    code = row_code(2, 4)
    tensors = (code.latent_mix_rr, code.mix_JP2, code.pair_J, code.mean_J2, code.frequencies_F)
    for entry in (code.describe() | {"codebooks": "laplacian"}, {"latent_bits": [[4, 8]]}):
        with pytest.raises(CheckpointError, match="convert the source again"):
            RowCode.described(entry, *tensors)


def test_a_mean_costs_nothing() -> None:
    """Whatever mean the keys have before RoPE, the codes are the same."""
    code, at = row_code(2, 4), torch.arange(6)[None]
    z = 2 * torch.randn(1, 6, 16)
    plain = replace(code, mean_J2=torch.zeros_like(code.mean_J2))
    keys = (plain.keys(z), code.keys(z + code.means(code.angles(at))))
    none = torch.zeros(1, 6, dtype=torch.bool)
    lost = [c.rounded(torch.zeros(1, 1, 6, 8), k, none, at)[1] - k for c, k in zip((plain, code), keys, strict=True)]
    assert relative_error(*lost) < 1e-3
    cos, sin = rope_angles(code.frequencies_F[None], at)
    own_cos, own_sin = (part[:, 0][..., code.pair_J.long()] for part in (cos[..., :4], sin[..., :4]))
    unturned, means = (code.means(code.angles(where)) for where in (torch.zeros(1, 6), at))
    assert relative_error(rotate_interleaved(unturned, own_cos, own_sin), means) < FP32
    q, own = code.queries(torch.randn(1, 4, 3, 8)).tensor_split([means.shape[-1]], dim=-1)
    assert relative_error(own @ code.angles(at)[:, None].mT, q @ means[:, None].mT) < FP32


@pytest.mark.parametrize("absorb", [True, False])
def test_the_readable_form_attends_to_rounded_rows(absorb: bool) -> None:
    H, N, R, r, P, V, D = 4, 5, 8, 8, 2, 3, 12
    shapes = [(H, N, D), (H, R, D), (r, D), (P, R, D), (2, N, r), (2, V, r), (D, H, V)]
    w = LatentWeights(*map(torch.randn, shapes), torch.rand(1, R // 2).expand(P, -1), 0.3)
    code, x = row_code(P, R // 2, r), torch.randn(1, 9, D)
    plain, rounded = (latent_attention(x, each, absorb=absorb) for each in (w, replace(w, code=code)))
    assert torch.equal(plain[:, :2], rounded[:, :2]), "the first tokens are exact"
    assert relative_error(rounded, plain) > 1e-3
    cache, made = GrowingCache(), []
    for token in x.split(1, dim=1):
        made.append(latent_attention(token, replace(w, code=code), absorb=absorb, cache=cache))
    assert relative_error(torch.cat(made, dim=1), rounded) < FP32
