"""Experts that are chosen by softmax, in DeepSeek-V2's layout: vLLM and llama.cpp read how they are weighted.

That both then say what is expected here is tested with the engines (tests/engine/test_families.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.common import FP32, SMALL, STOCK, logits, random_tokens, relative_error
from tests.integration.test_heal import QUICK

import latentize
from latentize.conversion.latent import format_of
from latentize.errors import FormatError
from latentize.families import families, model_spec
from latentize.formats.gguf import expert_keys
from latentize.methods.registry import settings
from latentize.modeling.load import load_model
from latentize.recipe import Recipe
from latentize.runtime.cache import LatentCache

# One kv head is one roped key and a latent of one value head: nothing is lost but what the latent's norm bends.
EXACT: dict[str, Any] = {"method": "transmla", "kv_lora_rank": 16, "qk_rope_head_dim": 16, **SMALL}
SIZES: dict[str, Any] = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, **SMALL}
FAMILIES: dict[str, dict[str, Any]] = {
    "granitemoe": {},
    "mixtral": {},
    "olmoe": {},
    "qwen3_moe": {"mlp_only_layers": [0]},
}


def test_only_families_that_are_tested_are_taken_for_softmax_chosen() -> None:
    """A table that extends another one has its experts, too, but not how they are chosen: MiniMax-M2's by sigmoid."""
    said = {name for name, table in families().items() if table.experts and table.experts.normalised is not None}
    assert said == set(FAMILIES)


@pytest.mark.parametrize("family", ["granitemoe", "mixtral"])
def test_in_deepseeks_layout_it_is_the_source(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str
) -> None:
    model, out = source(family, 1), tmp_path / "out"
    report = latentize.convert(model, out, format="deepseek_v2", data=(text,), **EXACT)
    assert report["format"] == "deepseek_v2"
    tokens = random_tokens()
    assert relative_error(logits(out, tokens), logits(model, tokens)) <= STOCK
    assert latentize.verify(out)["ok"]


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_healed_decoded(source: Callable[..., Path], text: str, tmp_path: Path, family: str) -> None:
    """What was written is what was measured, by every tool that reads it."""
    model, out = source(family, 2, **FAMILIES[family]), tmp_path / "out"
    report = latentize.convert(model, out, format="deepseek_v2", data=(text,), **SIZES)
    assert latentize.verify(out)["ok"]
    measure: dict[str, Any] = {"tokens": 1024, "sequence_length": 64, "data": (text,), "split": "heldout"}
    assert latentize.evaluate(out, model, **measure)["kl"] == pytest.approx(report["kl"], rel=2e-2)
    made, tokens = load_model(out), random_tokens()[:1, :8]
    greedy: dict[str, Any] = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    expected = made.generate(tokens, **greedy)
    faster = latentize.accelerate(made)
    assert torch.equal(faster.generate(tokens, **greedy, past_key_values=LatentCache(made.config)), expected)
    latentize.heal(out, tmp_path / "healed", model, data=(text,), **QUICK)
    assert latentize.verify(tmp_path / "healed")["ok"]
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "healed" / "model.safetensors")
    assert all(torch.equal(t, after[name]) for name, t in before.items() if ".mlp." in name)
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["model_type"] == "deepseek_v2"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_computes_it_or_stops(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str
) -> None:
    """It weighs chosen experts by their share of all: OLMoE's are weighted so."""
    from transformers import AutoModelForCausalLM

    model, out = source(family, 2, **FAMILIES[family]), tmp_path / "out"
    latentize.convert(model, out, format="deepseek_v2", data=(text,), **SIZES)
    stock, tokens = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), random_tokens()
    if family != "olmoe":
        with pytest.raises(UnboundLocalError, match="topk_weights"):
            stock(input_ids=tokens)
        return
    assert relative_error(stock(input_ids=tokens).logits, logits(out, tokens)) <= FP32


def test_weights_of_chosen_experts_may_share_among_each_other_or_among_all(
    source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """And either is what a file for llama.cpp says."""
    said = {}
    for normalised in (True, False):
        model = source("qwen3_moe", 2, mlp_only_layers=[0], norm_topk_prob=normalised)
        out = tmp_path / str(normalised)
        latentize.convert(model, out, format="deepseek_v2", data=(text,), **SIZES)
        said[normalised] = expert_keys(json.loads((out / "config.json").read_text()))
        assert latentize.verify(out)["ok"]
    assert said[True] == {**said[False], "expert_weights_norm": True}
    assert said[True]["expert_gating_func"] == 1 and said[True]["leading_dense_block_count"] == 1


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"keep": "50%"}, "native"),
        ({"keep": "50%", "serve_on": "vllm@h100"}, "deepseek_v2"),
        ({"keep": "50%", "serve_on": "llama.cpp"}, "deepseek_v2"),
        ({"keep": "50%", "cache_for": "q8_0"}, "deepseek_v2"),
    ],
    ids=["nothing said", "vLLM", "llama.cpp", "its cache"],
)
def test_who_gets_it(source: Callable[..., Path], options: dict[str, Any], written: str) -> None:
    spec = model_spec(json.loads((source("mixtral", 4, head_dim=32) / "config.json").read_text()))
    recipe = Recipe.build(**options)
    kind, _, _ = format_of(recipe, spec, settings(recipe, spec.attention))
    assert kind.name == written


@pytest.mark.parametrize(
    ("family", "config", "options", "said"),
    [
        ("mixtral", {}, {"format": "deepseek_v3"}, "--format deepseek_v2"),
        ("llama", {}, {"format": "deepseek_v2"}, "--format deepseek_v3"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, {"format": "deepseek_v2"}, "not the first ones"),
        ("mixtral", {}, {"serve_on": "sglang@h100"}, "DeepSeek-V3's are"),
        ("gpt_oss", {}, {"format": "deepseek_v2"}, "chosen by softmax"),
    ],
    ids=["V3", "no experts", "a last layer without", "an engine that was not read", "others"],
)
def test_refused(
    source: Callable[..., Path],
    text: str,
    tmp_path: Path,
    family: str,
    config: dict[str, Any],
    options: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(FormatError) as caught:
        latentize.convert(source(family, 2, **config), tmp_path / "out", keep="50%", data=(text,), **options, **SMALL)
    assert said in str(caught.value)
    assert not list(tmp_path.glob("out*"))
