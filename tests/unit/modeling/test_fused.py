"""Models with latents predict by PyTorch's fused attention on a CPU, and what they did without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.common import FP32, random_tokens, relative_error
from tests.latent_models import MIXTURES, mixture
from tests.models import pico_model
from torch import Tensor
from torch.profiler import profile

from latentize.evaluation.predict import predictor
from latentize.modeling.fused import fuse
from latentize.runtime.generate import latent_layers

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@torch.no_grad()
def fused_calls(model: Any, tokens: Tensor) -> int:
    with profile() as seen:
        model(input_ids=tokens, use_cache=False)
    return sum(event.count for event in seen.key_averages() if event.key == FUSED)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_the_same_logits(name: str) -> None:
    model, tokens = mixture(name), random_tokens(2, 40)
    stock = copy.deepcopy(model)
    expected = stock(input_ids=tokens, use_cache=False).logits
    assert fused_calls(model, tokens) == 0
    assert relative_error(predictor(model)(tokens, 0), expected) < FP32
    assert fused_calls(model, tokens) == len(latent_layers(model.config))

    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    padded = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    found, expected = (m(**padded).logits for m in (model, stock))
    assert relative_error(found[1], expected[1]) < FP32
    assert relative_error(found[0, 7:], expected[0, 7:]) < FP32


def test_what_gains_nothing_is_left_as_it_is() -> None:
    other = pico_model()
    assert fuse(other) is other
    assert other.config._attn_implementation == "sdpa"
    eager = mixture("deepseek_v3")
    eager.set_attn_implementation("eager")
    assert fuse(eager).config._attn_implementation == "eager"
