"""Keys and values in few bits, or few of them: as latents have it, on a model where both can be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.common import FP32, SMALL, random_tokens, relative_error
from transformers import Cache

from latentize.api import convert
from latentize.evaluation.grouped import CodedLayer, grouped_predictor, window_mask
from latentize.evaluation.predict import predictor
from latentize.modeling.load import load_model


def test_the_mask_by_hand() -> None:
    """Eight tokens, a window of two: each sees itself, the one before, and the first four."""
    mask = window_mask(8, 2, torch.float32)
    assert mask.shape == (1, 1, 8, 8)
    for query in range(8):
        seen = {key for key in range(8) if mask[0, 0, query, key] == 0}
        assert seen == {key for key in range(query + 1) if key < 4 or key > query - 2}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_nothing_is_lost_where_nothing_is_dropped(source: Callable[..., Path], family: str) -> None:
    model, tokens = load_model(source(family, 2)), random_tokens(2, 40)
    exact = model(input_ids=tokens, use_cache=False).logits.detach()
    assert relative_error(grouped_predictor(model)(tokens, 0), exact) == 0
    assert relative_error(grouped_predictor(model, window=40)(tokens, 0), exact) < FP32
    assert relative_error(grouped_predictor(model, cache="fp32")(tokens, 0), exact) < FP32
    errors = [
        relative_error(grouped_predictor(model, cache=name)(tokens, 0), exact) for name in ("int8", "fp8", "int4")
    ]
    assert 1e-5 < errors[0] < errors[1] < errors[2] < 1, errors
    assert torch.equal(
        grouped_predictor(model, cache="int8")(tokens, 3), grouped_predictor(model, cache="int8")(tokens, 0)[:, -3:]
    )


def test_a_window_is_that_of_a_latent_cache(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """At full rank the two models are one; so are their windows."""
    model = source("llama", 2)
    convert(model, tmp_path / "full", method="mha2mla", keep="100%", format="native", data=(text,), **SMALL)
    latent, grouped, tokens = load_model(tmp_path / "full"), load_model(model), random_tokens(2, 60)
    exact = grouped_predictor(grouped)(tokens, 0)
    narrow = grouped_predictor(grouped, window=16)(tokens, 0)
    assert relative_error(predictor(latent, window=16)(tokens, 0), narrow) < FP32
    assert relative_error(narrow, exact) > 1e-3, "the window is felt"
    assert relative_error(narrow[:, :16], exact[:, :16]) < FP32, "not before it is full"


def test_decoding_goes_on_from_what_is_coded(source: Callable[..., Path]) -> None:
    """One token at a time, or all at once: every token is coded by itself."""
    model, tokens = load_model(source("llama", 2)), random_tokens(2, 12)
    at_once = grouped_predictor(model, cache="int4")(tokens, 0)
    cache = Cache(layers=[CodedLayer("int4") for _ in range(2)])
    with torch.no_grad():
        steps = [model(input_ids=t, past_key_values=cache, use_cache=True).logits for t in tokens.split(1, dim=1)]
    assert relative_error(torch.cat(steps, dim=1), at_once) < FP32
