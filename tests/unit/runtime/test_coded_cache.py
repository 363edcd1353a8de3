"""A cache that stores a model's own codes gives back what the model was made with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.common import FP32, relative_error
from tests.unit.attention.test_coding import row_code
from tests.unit.runtime.test_latent_cache import layer, up, weights
from torch import Tensor
from transformers import LlamaConfig

from latentize.attention import codebooks, quantizer
from latentize.attention.coding import RowCode
from latentize.attention.latent import LatentWeights, absorbed_heads, cache_rows, queries
from latentize.runtime import coded as coded_rows
from latentize.runtime import heads as runtime_heads
from latentize.runtime import means
from latentize.runtime.cache import LatentCache, LatentLayer, cache_formats
from latentize.runtime.codecs import encode_together
from latentize.runtime.heads import decode, heads, prefill
from latentize.runtime.static import StaticLatentLayer
from latentize.runtime.stored_rows import StoredRows

D, R, RANK = 12, 8, 16


def coded_weights(seed: int, H: int, U: int, P: int, newest: int = 0) -> LatentWeights:
    w = weights(seed, H=H, U=U, P=P, r=RANK, R=R)
    # Keys of all heads turn alike.
    w = replace(w, frequencies_PF=w.frequencies_PF[:1].expand(P, -1))
    code = replace(row_code(P, R // 2, RANK, seed=seed, sinks=3, newest=newest), frequencies_F=w.frequencies_PF[0])
    return replace(w, code=code, kv_a_rD=3 * w.kv_a_rD)


def rows_of(w: LatentWeights, tokens: int, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, latents and roped keys."""
    x = torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))
    return x, *cache_rows(x, w, torch.arange(tokens)[None])


def filled(w: LatentWeights, c: Tensor, k: Tensor, stops: list[int], residual: int = 0) -> Any:
    """A layer, and in ``last`` the rows that the last tokens see."""
    made, start = layer(residual=residual), 0
    for stop in stops:
        at = torch.arange(start, stop)[None].expand(len(c), -1)
        assert w.code is not None
        assert made.codes(w.code, w.code.exact(at, start))
        made.last, _ = made.update(c[:, :, start:stop], k[:, :, start:stop])
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
    newest=st.sampled_from([0, 1, 3, 40]),
    at_once=st.sampled_from([1, 6, 128]),
)
def test_heads_over_codes_against_the_reference(
    seed: int, B: int, past: int, new: int, shape: tuple, newest: int, at_once: int
) -> None:
    H, U, P = shape
    w = coded_weights(seed, H, U, P, newest)
    x, c, k = rows_of(w, past + new, B, seed)
    made = filled(w, c, k, [past, past + new] if past else [new])
    rows, at = made.last, torch.arange(past + new)[None].expand(B, -1)
    assert w.code is not None
    expected_rows = w.code.as_cached(c, k, at[:, past:])[:2]
    for restored, expected in zip(rows.tensors(), expected_rows, strict=True):
        assert relative_error(restored, expected) < 1e-4
    q_nope, q_rope = queries(x[:, past:], w, at[:, past:])
    allowed, _ = w.code.who_sees(new, past + new, x.device)
    expected = absorbed_heads(q_nope, q_rope, *expected_rows, allowed[None, None], w)
    with patch.object(runtime_heads, "_QUERIES", at_once):
        for form in (heads, decode, prefill):
            assert relative_error(form(q_nope, q_rope, rows, up(w), None), expected) < 2e-3, form.__name__


@pytest.mark.parametrize("at_once", [2, 128])
def test_many_new_tokens_under_a_mask_and_after_a_crop(at_once: int) -> None:
    """Where rows that were exact are stored by now, these are seen; a mask hides either version."""
    w = coded_weights(10, 4, 2, 2, newest=4)
    x, c, k = rows_of(w, 26, 2, 10)
    made, at = filled(w, c[:, :, :14], k[:, :, :14], [14]), torch.arange(26)[None].expand(2, -1)
    made.crop(3)
    assert w.code is not None
    made.codes(w.code, w.code.exact(at[:, 11:], 11))
    rows, _ = made.update(c[:, :, 11:], k[:, :, 11:])
    q = queries(x[:, 11:], w, at[:, 11:])
    causal_TS = torch.arange(26) <= torch.arange(11, 26)[:, None]
    hidden = torch.rand(2, 1, 15, 26, generator=torch.Generator().manual_seed(10)) < 0.3
    hidden[..., 0] = False
    allowed = causal_TS & ~hidden
    added = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    with patch.object(runtime_heads, "_QUERIES", at_once):
        for mask in (None, allowed, added):
            expected = decode(*q, rows, up(w), mask)
            assert relative_error(prefill(*q, rows, up(w), mask), expected) < 1e-4


@pytest.mark.parametrize("new", [1, 5])
def test_each_token_sees_its_newest_rows_as_they_are(new: int) -> None:
    """Against the definition: query by query, row by row."""
    w = coded_weights(9, 4, 2, 2, newest=3)
    x, c, k = rows_of(w, 12, 1, 9)
    made, (c_hat, k_hat) = filled(w, c, k, [12 - new, 12]), rounded(w, c, k)
    made_heads = decode(*queries(x[:, -new:], w, torch.arange(12 - new, 12)[None]), made.last, up(w), None)
    for number, at in enumerate(range(12 - new, 12)):
        near = torch.arange(12) > at - 3
        c_at, k_at = c.where(near[None, None, :, None], c_hat), k.where(near[None, None, :, None], k_hat)
        q = queries(x[:, at : at + 1], w, torch.tensor([[at]]))
        allowed = (torch.arange(12) <= at)[None, None, None]
        expected = absorbed_heads(*q, c_at, k_at, allowed, w)[:, :, 0]
        assert relative_error(made_heads[:, :, number], expected) < 2e-3


def made_rows(made: LatentLayer, new: int):

    return StoredRows(made, torch.float32, new)


def test_what_waits_is_not_rounded_yet() -> None:
    w = coded_weights(0, 4, 2, 2)
    _, c, k = rows_of(w, 20, 1, 0)
    made = filled(w, c, k, list(range(1, 21)), residual=4)
    expected, restored = rounded(w, c, k), made_rows(made, 1).tensors()
    waiting = made.recent.length
    assert waiting == 4
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


@pytest.mark.parametrize("newest", [0, 4])
def test_bytes_are_those_of_the_code(newest: int) -> None:
    w = coded_weights(3, 4, 2, 2, newest)
    _, c, k = rows_of(w, 2048, 1, 3)
    made = filled(w, c, k, [2048])
    assert w.code is not None
    exact = (w.code.sinks + newest) * (RANK + w.code.rope_values) * 4
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


@pytest.mark.parametrize("newest", [0, 3])
def test_sinks_of_a_window_seem_nearer_among_codes_too(newest: int) -> None:
    w = coded_weights(5, 4, 2, 2, newest)
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
    exact = (torch.arange(11) < 3) | (torch.arange(11) >= 11 - newest)
    c_hat, k_hat = w.code.rounded(near_c, near_k, exact[None], at[None])
    allowed = torch.ones(1, 1, 1, 11, dtype=torch.bool)
    expected = absorbed_heads(q_nope, q_rope, c_hat, k_hat, allowed, w)
    assert relative_error(decode(q_nope, q_rope, rows, up(w), None), expected) < 2e-3


@pytest.mark.parametrize("newest", [0, 3])
def test_padded_texts_begin_where_they_begin(newest: int) -> None:
    w = coded_weights(6, 4, 2, 2, newest)
    x, _, _ = rows_of(w, 12, 1, 6)
    assert w.code is not None
    padding = torch.randn(1, 3, D)
    both = torch.cat([torch.cat([x, padding], dim=1), torch.cat([padding, x], dim=1)])
    at = torch.tensor([[*range(15)], [0, 0, 0, *range(12)]])
    c, k = cache_rows(both, w, at)
    made, start = layer(), 0
    for stop in (9, 10, 14, 15):
        made.codes(w.code, w.code.exact(at[:, start:stop], start))
        rows, _ = made.update(c[:, :, start:stop], k[:, :, start:stop])
        start = stop
    # The same text alone, and its last token.
    alone = filled(w, c[:1, :, :12], k[:1, :, :12], [11, 12])
    for padded, plain in ((made.keys, alone.keys), (made.values, alone.values)):
        assert relative_error(padded[1:, :, 3:], plain) < 1e-4
        assert relative_error(padded[:1, :, : 12 - newest], plain[:, :, : 12 - newest]) < 1e-4
    q_nope, q_rope = queries(both[1:, -1:], w, at[1:, -1:])
    q = (q_nope.expand(2, -1, -1, -1), q_rope.expand(2, -1, -1, -1))
    mask = torch.ones(2, 1, 1, 15, dtype=torch.bool)
    mask[0, ..., 12:], mask[1, ..., :3] = False, False
    first, second = decode(*q, rows, up(w), mask)
    expected = decode(q_nope, q_rope, alone.last, up(w), None)[0]
    assert relative_error(second, expected) < 1e-4
    assert newest or relative_error(first, expected) < 1e-4, "its newest rows are padding"


@pytest.mark.parametrize("newest", [0, 3])
def test_a_static_cache_of_codes(newest: int) -> None:
    w = coded_weights(7, 4, 2, 2, newest)
    x, c, k = rows_of(w, 20, 2, 7)
    assert w.code is not None
    made, start = StaticLatentLayer(None, None, 32), 0
    made.attends_rows = True
    for stop in (2, 11, 12, 19, 20):
        at = torch.arange(start, stop)[None].expand(2, -1)
        made.codes(w.code, w.code.exact(at, start))
        rows, _ = made.update(c[:, :, start:stop], k[:, :, start:stop])
        expected = w.code.as_cached(c[:, :, :stop], k[:, :, :stop], at)[:2]
        allowed, _ = w.code.who_sees(stop - start, stop, x.device)
        q = queries(x[:, start:stop], w, at)
        seen = absorbed_heads(*q, *expected, allowed[None, None], w)
        for form in (decode, heads, prefill):
            assert relative_error(form(*q, rows, up(w), None), seen) < 1e-4
        mask = torch.ones(2, 1, stop - start, 32, dtype=torch.bool).tril(start)
        assert relative_error(decode(*q, rows, up(w), mask), seen) < 1e-4
        start = stop
    for restored, each in zip(rows.tensors(), expected, strict=True):
        assert relative_error(restored, each) < 1e-4
    made.rewind(0)
    made.codes(w.code, w.code.exact(torch.arange(20)[None].expand(2, -1), 0))
    made.update(c.flip(0), k.flip(0))
    assert relative_error(made.keys, expected[0].flip(0)) < 1e-4


def test_a_rewound_static_cache_has_codes_where_exact_rows_were() -> None:
    w = coded_weights(8, 4, 2, 2, newest=3)
    x, c, k = rows_of(w, 20, 1, 8)
    assert w.code is not None
    made, at = StaticLatentLayer(None, None, 32), torch.arange(20)[None]
    made.attends_rows = True
    made.codes(w.code, w.code.exact(at, 0))
    made.update(c, k)
    made.rewind(18)
    made.codes(w.code, w.code.exact(at[:, 18:19], 18))
    rows, _ = made.update(c[:, :, 18:19], k[:, :, 18:19])
    (c_hat, k_hat), near = rounded(w, c, k), (torch.arange(20) >= 17)[None, None, :, None]
    c_at, k_at = c.where(near, c_hat), k.where(near, k_hat)
    q = queries(x[:, 18:19], w, at[:, 18:19])
    expected = absorbed_heads(*q, c_at, k_at, (torch.arange(20) <= 18)[None, None, None], w)
    assert relative_error(decode(*q, rows, up(w), None), expected) < 1e-4


@pytest.mark.parametrize(("stops", "why"), [([19, 20], None), ([15, 20], "several new tokens")])
def test_kernels_read_codes_for_one_new_token(stops: list[int], why: str | None) -> None:
    w = coded_weights(4, 4, 2, 2, newest=3)
    _, c, k = rows_of(w, 20, 1, 4)
    rows = filled(w, c, k, stops).last
    assert rows.coded and (rows.unread is None if why is None else why in rows.unread)
    rows.layer.window = 12
    assert "window" in rows.unread


def test_layers_that_are_coded_together_are_coded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of different plans and newest rows, one of which has none, after prompts, single tokens and a crop."""
    own = [coded_weights(seed, 4, 2, 2, newest) for seed, newest in ((1, 3), (2, 3), (3, 2), (4, 0))]
    rows, together = [rows_of(w, 30, 2, seed) for seed, w in enumerate(own)], 0
    cache = LatentCache(LlamaConfig(num_hidden_layers=len(own)))
    apart = [layer() for _ in own]

    def watched(codecs: Any, found: Tensor) -> tuple[Tensor, ...]:
        nonlocal together
        together += len(codecs) == 6
        return encode_together(codecs, found)

    monkeypatch.setattr(coded_rows, "encode_together", watched)
    start = 0
    for stop in (1, 2, 9, *range(10, 20), -4, 17, 22, 23):
        if stop < 0:
            cache.crop(stop)
            for alone in apart:
                alone.crop(stop)
            start += stop
            continue
        for number, (w, (_, c, k), alone) in enumerate(zip(own, rows, apart, strict=True)):
            assert w.code is not None
            new, exact = slice(start, stop), w.code.exact(torch.arange(start, stop)[None].expand(2, -1), start)
            for made in (cache.layers[number], alone):
                made.attends_rows = True
                made.codes(w.code, exact)
            cache.update(c[:, :, new], k[:, :, new], number)
            alone.update(c[:, :, new], k[:, :, new])
        start = stop
    assert together > 8
    for made, alone in zip(cache.layers, apart, strict=True):
        assert made.stored.length == alone.stored.length
        for one, other in zip(made.stored.view(0, made.stored.length), alone.stored.view(0, 99), strict=True):
            assert torch.equal(one, other[:, : made.stored.length])


def test_tables_do_not_follow_the_default_precision() -> None:
    """A program may have set it before the first row is coded."""
    for made in (codebooks.codebook, codebooks.finder, quantizer.quantizer, means._of_block):
        made.cache_clear()
    w = coded_weights(5, 4, 2, 2, newest=2)
    x, c, k = rows_of(w, 12, 1, 5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        first = filled(w, c, k, [11, 12])
        made = decode(*queries(x[:, -1:], w, torch.tensor([[11]])), first.last, up(w), None)
    finally:
        torch.set_default_dtype(torch.float32)
    for cached in (codebooks.codebook, codebooks.finder, quantizer.quantizer, means._of_block):
        cached.cache_clear()
    second = filled(w, c, k, [11, 12])
    expected = decode(*queries(x[:, -1:], w, torch.tensor([[11]])), second.last, up(w), None)
    for one, other in zip(first.stored.view(0, 10), second.stored.view(0, 10), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(made, expected)
