"""One class for MHA, GQA and MQA, equal to the attention of every family."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.common import FP32, random_tokens, relative_error
from tests.models import FAMILIES, LLAMA3_SCALING, ONLY_MHA, decoder_layers, pico_model
from torch import Tensor, nn

from latentize.attention.cache import GrowingCache
from latentize.attention.grouped import AttentionWeights, grouped_attention, rms_norm
from latentize.attention.spec import AttentionSpec
from latentize.families import ModelSpec, model_spec
from latentize.modeling.canonical import attention_weights


def layer(family: str, kv_heads: int, **changes: Any) -> tuple[Any, AttentionWeights, ModelSpec]:
    """The model, and its second attention in our terms."""
    model = pico_model(family, kv_heads, **changes)
    spec = model_spec(json.loads(model.config.to_json_string(use_diff=False)))
    decoder = decoder_layers(model)[1]
    tensors = {name: t.detach() for name, t in decoder.state_dict().items()}
    return model, attention_weights(tensors, spec), spec


def attention_of(spec: ModelSpec) -> AttentionSpec:
    found = spec.layer_attention(1)
    assert found is not None
    return found


@torch.no_grad()
def theirs(model: Any, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What enters and what leaves the second attention when transformers runs the model on random tokens."""
    second = decoder_layers(model)[1]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any], result: tuple[Tensor, Any]) -> None:
        seen.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], result[0]))

    names = [name for name, _ in second.named_children() if name in ("self_attn", "attention", "attn")]
    attention = getattr(second, names[0])
    hook = attention.register_forward_hook(keep, with_kwargs=True)
    model(input_ids=random_tokens(*positions_BT.shape), position_ids=positions_BT, use_cache=False)
    hook.remove()
    return seen[0]


CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True}),
    ("llama", {"rope_parameters": LLAMA3_SCALING}),
    ("qwen3", {"attention_bias": True, "head_dim": 24, "rms_norm_eps": 1e-2}),
]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("family", "changes"), CASES, ids=[f"{f}-{'-'.join(c) or 'plain'}" for f, c in CASES])
def test_equals_transformers(family: str, changes: dict[str, Any], kv_heads: int) -> None:
    model, weights, spec = layer(family, 4 if family in ONLY_MHA else kv_heads, **changes)
    # Llama 4 counts tokens, wherever they are.
    first = 0 if spec.attention.growth_first else 30
    positions = torch.stack([torch.arange(20), torch.arange(first, first + 20)])
    x, expected = theirs(model, positions)
    ours = grouped_attention(x, weights, attention_of(spec), positions_BT=positions)
    assert relative_error(ours, expected) <= FP32


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_sliding_window_equals_transformers(kv_heads: int) -> None:
    """A window counts the query itself."""
    _, weights, spec = layer("mistral", kv_heads)
    x, expected = theirs(pico_model("mistral", kv_heads, sliding_window=5), torch.arange(20)[None])
    windowed = grouped_attention(x, weights, spec.attention, window=5)
    assert relative_error(windowed, expected) <= FP32
    assert relative_error(grouped_attention(x, weights, spec.attention), expected) > 0.01


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_equals_prefill(family: str, window: int | None) -> None:
    _, weights, spec = layer(family, 4 if family in ONLY_MHA else 2)
    attention = attention_of(spec)
    x = torch.randn(2, 11, 64)
    at_once = grouped_attention(x, weights, attention, window=window)
    cache = GrowingCache()
    kept: dict[str, Any] = {"cache": cache, "layer_idx": 3, "window": window}
    steps = [grouped_attention(x[:, :5], weights, attention, **kept)]
    steps += [grouped_attention(x[:, t : t + 1], weights, attention, **kept) for t in range(5, 11)]
    assert relative_error(torch.cat(steps, dim=1), at_once) <= FP32
    assert cache.values_per_token(3) == attention.cache_values
    assert cache.get_seq_length(3) == 11


def test_repeated_kv_heads_make_mha_of_gqa() -> None:
    _, weights, spec = layer("qwen2", 2)
    names = ("k_GdD", "v_GdD", "k_bias_Gd", "v_bias_Gd")
    repeated = replace(weights, **{n: getattr(weights, n).repeat_interleave(2, dim=0) for n in names})
    as_mha = replace(spec.attention, num_kv_heads=4)
    x = torch.randn(1, 9, 64)
    assert relative_error(grouped_attention(x, repeated, as_mha), grouped_attention(x, weights, spec.attention)) <= FP32


def test_rms_norm_is_written_out() -> None:
    x, weight = torch.randn(3, 5, 8), torch.rand(8)
    by_hand = x / (x.square().sum(-1, keepdim=True) / 8 + 0.1).sqrt() * weight
    assert relative_error(rms_norm(x, weight, 0.1), by_hand) <= FP32


def test_weights_change_precision_together() -> None:
    _, weights, _ = layer("qwen2", 2)
    wide = weights.to(torch.float64)
    assert {t.dtype for t in vars(wide).values() if isinstance(t, torch.Tensor)} == {torch.float64}
    assert wide.o_bias_D is None
    assert torch.equal(wide.k_bias_Gd.float(), weights.k_bias_Gd)
