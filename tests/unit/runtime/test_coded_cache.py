"""A cache that stores a model's own codes gives back what the model was made with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.common import FP32, relative_error
from tests.unit.attention.test_coding import row_code
from tests.unit.runtime.test_latent_cache import layer, up, weights
from torch import Tensor

from latentize.attention.coding import RowCode
from latentize.attention.latent import LatentWeights, absorbed_heads, cache_rows, queries
from latentize.runtime.cache import LatentLayer, cache_formats
from latentize.runtime.heads import decode, heads, prefill
from latentize.runtime.layer import Rows
from latentize.runtime.static import StaticLatentLayer

D, R, RANK = 12, 8, 16


def coded_weights(seed: int, H: int, U: int, P: int) -> LatentWeights:
    w = weights(seed, H=H, U=U, P=P, r=RANK, R=R)
    # Keys of all heads turn alike.
    w = replace(w, frequencies_PF=w.frequencies_PF[:1].expand(P, -1))
    code = replace(row_code(P, R // 2, RANK, seed=seed, sinks=3), frequencies_F=w.frequencies_PF[0])
    return replace(w, code=code, kv_a_rD=3 * w.kv_a_rD)


def rows_of(w: LatentWeights, tokens: int, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, latents and roped keys."""
    x = torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))
    return x, *cache_rows(x, w, torch.arange(tokens)[None])


def filled(w: LatentWeights, c: Tensor, k: Tensor, stops: list[int], residual: int = 0) -> LatentLayer:
    made, start = layer(residual=residual), 0
    for stop in stops:
        at = torch.arange(start, stop)[None].expand(len(c), -1)
        assert w.code is not None
        assert made.codes(w.code, w.code.exact(at, start))
        made.update(c[:, :, start:stop], k[:, :, start:stop])
        start = stop
    return made


def rounded(w: LatentWeights, c: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(w.code, RowCode)
    at = torch.arange(c.shape[2])[None].expand(len(c), -1)
    return w.code.rounded(c, k, at < w.code.sinks, at)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    past=st.integers(0, 30),
    new=st.integers(1, 20),
    shape=st.sampled_from([(4, 4, 1), (4, 2, 2), (6, 3, 3), (1, 1, 1)]),
)
def test_heads_over_codes_against_the_reference(seed: int, B: int, past: int, new: int, shape: tuple) -> None:
    H, U, P = shape
    w = coded_weights(seed, H, U, P)
    x, c, k = rows_of(w, past + new, B, seed)
    made = filled(w, c, k, [past, past + new] if past else [new])
    (rows, _), at = (lambda r: (r, r))(made_rows(made, new)), torch.arange(past + new)[None]
    expected_rows = rounded(w, c, k)
    for restored, expected in zip(rows.tensors(), expected_rows, strict=True):
        assert relative_error(restored, expected) < 1e-4
    q_nope, q_rope = queries(x[:, past:], w, at[:, past:])
    allowed = torch.ones(new, past + new, dtype=torch.bool).tril(past)[None, None]
    expected = absorbed_heads(q_nope, q_rope, *expected_rows, allowed, w)
    for form in (heads, decode, prefill):
        assert relative_error(form(q_nope, q_rope, rows, up(w), None), expected) < 2e-3, form.__name__


def made_rows(made: LatentLayer, new: int):

    return Rows(made, torch.float32, new)


def test_what_waits_is_not_rounded_yet() -> None:
    w = coded_weights(0, 4, 2, 2)
    _, c, k = rows_of(w, 20, 1, 0)
    made = filled(w, c, k, list(range(1, 21)), residual=4)
    expected, restored = rounded(w, c, k), made_rows(made, 1).tensors()
    waiting = made.recent.length
    assert 4 <= waiting <= 8
    assert relative_error(restored[0][:, :, :-waiting], expected[0][:, :, :-waiting]) < 1e-4
    assert relative_error(restored[0][:, :, -waiting:], c[:, :, -waiting:]) < FP32
    assert relative_error(restored[1][:, :, -waiting:], k[:, :, -waiting:]) < 1e-4


def test_exact_rows_go_where_their_sequence_goes() -> None:
    w = coded_weights(1, 4, 2, 2)
    _, c, k = rows_of(w, 9, 3, 1)
    made = filled(w, c, k, [9])
    expected = rounded(w, c, k)[0]
    made.reorder_cache(torch.tensor([2, 0, 0]))
    assert relative_error(made.keys, expected[[2, 0, 0]]) < FP32
    made.batch_select_indices(torch.tensor([1]))
    assert relative_error(made.keys, expected[[0]]) < FP32
    made.batch_repeat_interleave(2)
    assert relative_error(made.keys, expected[[0, 0]]) < FP32


@pytest.mark.parametrize("kept", [7, 2])
def test_cropped_and_filled_again(kept: int) -> None:
    w = coded_weights(2, 4, 2, 2)
    _, c, k = rows_of(w, 9, 1, 2)
    made = filled(w, c, k, [9])
    made.crop(9 - kept)
    assert relative_error(made.keys, rounded(w, c, k)[0][:, :, :kept]) < FP32
    for token in range(kept, 9):
        assert w.code is not None
        made.codes(w.code, w.code.exact(torch.tensor([[token]]), token))
        made.update(c[:, :, token : token + 1], k[:, :, token : token + 1])
    assert relative_error(made.keys, rounded(w, c, k)[0]) < FP32


def test_bytes_are_those_of_the_code() -> None:
    w = coded_weights(3, 4, 2, 2)
    _, c, k = rows_of(w, 2048, 1, 3)
    made = filled(w, c, k, [2048])
    assert w.code is not None
    exact = w.code.sinks * (RANK + w.code.rope_values) * 4
    assert made.nbytes == pytest.approx(2048 * w.code.row_bytes + exact, rel=0.05), "and a little room to grow"


def test_auto_is_what_the_checkpoint_says() -> None:
    assert cache_formats("auto") == cache_formats(None) == {}


def test_formats_that_are_asked_for_win() -> None:
    w = coded_weights(4, 4, 2, 2)
    _, c, k = rows_of(w, 9, 1, 4)
    made = layer("fp32", "fp32")
    assert w.code is not None
    assert made.codes(w.code, w.code.exact(torch.arange(9)[None], 0)), "rows come as they are"
    made.update(c, k)
    assert torch.equal(made.keys, c)


def test_sinks_of_a_window_seem_nearer_among_codes_too() -> None:
    w = coded_weights(5, 4, 2, 2)
    x, c, k = rows_of(w, 40, 1, 5)
    assert w.code is not None
    made = layer(window=8, sinks=3)
    made.frequencies_F = w.frequencies_PF
    for token in range(40):
        made.codes(w.code, w.code.exact(torch.tensor([[token]]), token))
        rows, _ = made.update(c[:, :, token : token + 1], k[:, :, token : token + 1])
    q_nope, q_rope = queries(x[:, -1:], w, torch.tensor([[39]]))
    # Sinks stand where the window begins.
    at = torch.cat([torch.arange(29, 32), torch.arange(32, 40)])
    near_c, near_k = cache_rows(x[:, [0, 1, 2, *range(32, 40)]], w, at[None])
    c_hat, k_hat = w.code.rounded(near_c, near_k, (torch.arange(11) < 3)[None], at[None])
    allowed = torch.ones(1, 1, 1, 11, dtype=torch.bool)
    expected = absorbed_heads(q_nope, q_rope, c_hat, k_hat, allowed, w)
    assert relative_error(decode(q_nope, q_rope, rows, up(w), None), expected) < 2e-3


def test_padded_texts_begin_where_they_begin() -> None:
    w = coded_weights(6, 4, 2, 2)
    x, _, _ = rows_of(w, 12, 1, 6)
    assert w.code is not None
    padding = torch.randn(1, 3, D)
    both = torch.cat([torch.cat([x, padding], dim=1), torch.cat([padding, x], dim=1)])
    at = torch.tensor([[*range(15)], [0, 0, 0, *range(12)]])
    c, k = cache_rows(both, w, at)
    made, start = layer(), 0
    for stop in (9, 10, 15):
        made.codes(w.code, w.code.exact(at[:, start:stop], start))
        rows, _ = made.update(c[:, :, start:stop], k[:, :, start:stop])
        start = stop
    for first, second in (
        (made.keys[:1, :, :12], made.keys[1:, :, 3:]),
        (made.values[:1, :, :12], made.values[1:, :, 3:]),
    ):
        assert relative_error(second, first) < 1e-4
    q_nope, q_rope = queries(both[1:, -1:], w, at[1:, -1:])
    q = (q_nope.expand(2, -1, -1, -1), q_rope.expand(2, -1, -1, -1))
    mask = torch.ones(2, 1, 1, 15, dtype=torch.bool)
    mask[0, ..., 12:], mask[1, ..., :3] = False, False
    first, second = decode(*q, rows, up(w), mask)
    assert relative_error(second, first) < 1e-4


def test_a_static_cache_of_codes() -> None:
    w = coded_weights(7, 4, 2, 2)
    x, c, k = rows_of(w, 20, 2, 7)
    assert w.code is not None
    made, start = StaticLatentLayer(None, None, 32), 0
    made.attends_rows = True
    for stop in (2, 11, 12, 19, 20):
        made.codes(w.code, w.code.exact(torch.arange(start, stop)[None].expand(2, -1), start))
        rows, _ = made.update(c[:, :, start:stop], k[:, :, start:stop])
        start = stop
    expected = rounded(w, c, k)
    for restored, each in zip(rows.tensors(), expected, strict=True):
        assert relative_error(restored, each) < 1e-4
    q_nope, q_rope = queries(x[:, -1:], w, torch.tensor([[19]]))
    seen = absorbed_heads(q_nope, q_rope, *expected, torch.ones(1, 1, 1, 20, dtype=torch.bool), w)
    assert relative_error(decode(q_nope, q_rope, rows, up(w), None), seen) < 1e-4
    made.rewind(0)
    made.codes(w.code, w.code.exact(torch.arange(20)[None].expand(2, -1), 0))
    made.update(c.flip(0), k.flip(0))
    assert relative_error(made.keys, expected[0].flip(0)) < 1e-4
