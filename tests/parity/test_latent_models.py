"""Models that have latent attention as they come, accelerated or layer by layer, say what the stock model says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, random_tokens, relative_error
from tests.latent_models import MIXTURES, mixture, saved
from tests.models import randomize
from transformers import AutoConfig, AutoModelForImageTextToText

import latentize
from latentize.api import bench
from latentize.checkpoint import open_checkpoint
from latentize.families import latent_model
from latentize.modeling.latent_source import LatentSource, check_latent
from latentize.runtime.cache import LatentCache
from latentize.text.tokens import Passages


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_accelerated_it_says_the_same(name: str) -> None:
    model = mixture(name)
    fast = latentize.accelerate(copy.deepcopy(model))
    ids = random_tokens(2, 21)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    made, expected = fast.generate(ids, **options), model.generate(ids, **options)
    assert torch.equal(made.sequences, expected.sequences)
    assert relative_error(torch.stack(made.logits), torch.stack(expected.logits)) <= FP32
    assert isinstance(made.past_key_values, LatentCache)


@torch.no_grad()
def test_accelerated_inside_a_multimodal_model() -> None:
    """What sees beside a decoder goes on as before, and so does all of it afterwards."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    sees = {"model_type": "pixtral", **sizes, "patch_size": 4, "image_size": 16}
    text = mixture("mistral4").config.to_dict()
    config = AutoConfig.for_model("mistral3", text_config=text, vision_config=sees, image_token_id=5)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomize(model.eval())
    ids, options = 10 + random_tokens(2, 21) % 200, {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected, fast = model.generate(ids, **options), latentize.accelerate(copy.deepcopy(model))
    assert torch.equal(fast.generate(ids, **options), expected)
    assert torch.equal(latentize.decelerate(fast).generate(ids, **options), expected)


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_layer_by_layer_it_computes_what_the_whole_model_does(tmp_path: Path, name: str) -> None:
    """Experts fused here are those that transformers fuses; what leaves the last layer has the model's logits."""
    model = mixture(name)
    folder = saved(model, tmp_path / "source")
    checkpoint = open_checkpoint(folder)
    shape = latent_model(checkpoint.config)
    check_latent(checkpoint, shape)
    if shape.experts is not None and name != "mistral4":
        first = ".experts.3.w1" if name == "kimi_linear" else ".experts.3.gate_proj"
        assert any(first in n for n in checkpoint.names()), "stored one by one"
    source, tokens = LatentSource(checkpoint, shape), random_tokens()
    text = source.embed(Passages.contiguous(tokens))
    for layer in source.layers():
        layer.run(text)
    made = source.head()(text.hidden_NTD)
    assert relative_error(made, model(tokens, use_cache=False).logits) <= FP32


@pytest.mark.parametrize("name", ["deepseek_v2-lite", "deepseek_v3", "glm4_moe_lite"])
def test_bench(tmp_path: Path, name: str) -> None:
    folder = saved(mixture(name), tmp_path / "model", torch.bfloat16)
    result = bench(folder, contexts=(24,), cache="int8", steps=2)
    assert [row["name"] for row in result["rows"]] == ["latentize", "latentize, int8+int8", "transformers"]
    # Latents of 32, roped keys of 8, two layers, two bytes each, and the room that LatentCache keeps.
    assert result["rows"][2]["cache_bytes"] == 24 * (32 + 8) * 2 * 2
