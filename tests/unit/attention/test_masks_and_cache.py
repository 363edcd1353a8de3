"""Who sees whom, and what is kept."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from latentize.attention.cache import GrowingCache
from latentize.attention.masks import causal_mask


@given(queries=st.integers(1, 7), past=st.integers(0, 7), window=st.none() | st.integers(1, 9))
def test_mask_against_a_loop(queries: int, past: int, window: int | None) -> None:
    mask = causal_mask(queries, past + queries, window=window)
    assert mask.shape == (queries, past + queries)
    for row in range(queries):
        for key in range(past + queries):
            distance = past + row - key
            expected = distance >= 0 and (window is None or distance < window)
            assert bool(mask[row, key]) == expected


def test_a_window_of_one_sees_itself() -> None:
    assert torch.equal(causal_mask(4, 4, window=1), torch.eye(4, dtype=torch.bool))


def test_cache_grows_along_tokens_and_keeps_layers_apart() -> None:
    cache = GrowingCache()
    assert cache.get_seq_length(0) == 0
    pieces = [(torch.randn(2, 1, t, 6), torch.randn(2, 3, t, 4)) for t in (5, 1, 2)]
    for first, second in pieces:
        got = cache.update(first, second, layer_idx=1)
    assert torch.equal(got[0], torch.cat([p[0] for p in pieces], dim=2))
    assert torch.equal(got[1], torch.cat([p[1] for p in pieces], dim=2))
    assert cache.get_seq_length(1) == 8
    assert cache.get_seq_length(0) == 0
    assert cache.values_per_token(1) == 6 + 3 * 4
