"""Tables say what transformers says, and refuse what conversion cannot keep."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tests.models import FAMILIES, ONLY_MHA, pico, pico_config
from transformers import AutoConfig

from latentize.checkpoint import open_checkpoint
from latentize.errors import ConfigError, UnsupportedModelError
from latentize.families import Table, families, model_spec


def entries(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """``config.json`` of a picomodel."""
    return {**json.loads(pico_config(family).to_json_string(use_diff=False)), **changes}


def test_all_tables_are_read() -> None:
    assert set(families()) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_config_means_what_transformers_takes_it_for(family: str) -> None:
    """No default that matters is missing from the table."""
    bare: dict[str, Any] = {
        "model_type": family,
        "intermediate_size": 96,
        "vocab_size": 257,
        "num_hidden_layers": 6,
    }
    if family == "mistral":
        bare["sliding_window"] = None
    if family == "gemma4_text":
        # What the family's small models have by default cannot be converted.
        bare |= {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
    if family == "hunyuan_v1_dense":
        # Transformers cannot run it without.
        bare["head_dim"] = 16
    full = AutoConfig.for_model(**bare)
    ours, theirs = model_spec(bare), model_spec(json.loads(full.to_json_string(use_diff=False)))
    assert ours.attention == theirs.attention
    assert (ours.norm_eps, ours.tied, ours.max_positions) == (theirs.norm_eps, theirs.tied, theirs.max_positions)
    assert ours.tensor_shapes() == theirs.tensor_shapes()


def test_nothing_has_to_be_stated() -> None:
    """All sizes have defaults in transformers."""
    full = AutoConfig.for_model("llama")
    spec = model_spec({"model_type": "llama"})
    assert (spec.layers, spec.vocab_size) == (full.num_hidden_layers, full.vocab_size)
    assert spec.intermediate_size == full.intermediate_size


SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 32}),
    ("mistral", {}),
    ("mistral", {"head_dim": 8}),
    ("mistral", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    *((family, {}) for family in FAMILIES if family not in ("llama", "mistral", "qwen2", "qwen3")),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("gemma2", {"attention_bias": True}),
    ("glm4", {"attention_bias": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("olmo2", {"attention_bias": True}),
    ("starcoder2", {"use_bias": False}),
    ("lfm2", {"block_auto_adjust_ff_dim": False}),
]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("family", "switch"), SWITCHES, ids=[f"{f}-{'-'.join(s) or 'plain'}" for f, s in SWITCHES])
def test_tensor_shapes_are_the_models_own(family: str, switch: dict[str, Any], kv_heads: int, tmp_path: Path) -> None:
    """Exactly the names and shapes that transformers saves, for each position of each switch."""
    if family in ONLY_MHA and kv_heads < 4:
        kv_heads = 4
    stored = open_checkpoint(pico(tmp_path, family, kv_heads, **switch))
    spec = model_spec(stored.config)
    shapes = {name: stored.shape(name) for name in stored.names()}
    for part, own in spec.table.renamed_tensors.items():
        # Granite's experts are called in files as nothing in transformers calls them.
        shapes = {name.replace(part, own): shape for name, shape in shapes.items()}
    assert spec.tensor_shapes() == shapes
    assert spec.tied == AutoConfig.from_pretrained(stored.path).tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_each_family(family: str) -> None:
    table = families()[family]
    attention = model_spec(entries(family, **{table.norm_eps: 1e-4})).attention
    biased = ("glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "qwen2", "seed_oss", "stablelm", "starcoder2")
    assert attention.qkv_bias == (family in biased)
    assert attention.o_bias == (family in ("gpt2", "gpt_neox", "gpt_oss", "seed_oss", "starcoder2"))
    assert attention.sinks == (family == "gpt_oss")
    across = family in ("minimax_m2", "olmo2", "olmo3", "olmoe")
    gated = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
    normed = (
        *("apertus", "exaone4", "gemma3_text", "gemma4_text", "glm4_moe", "hunyuan_v1_dense", "lfm2", "qwen3"),
        *("qwen3_moe", *gated),
    )
    assert attention.gated == (family in gated)
    assert attention.qk_norm == (across or family in normed)
    assert attention.qk_norm_across == across
    assert attention.rotates_whole == (
        family not in ("gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "minimax_m2", "stablelm", *gated)
    )
    assert attention.v_norm == (family == "gemma4_text")
    assert attention.norm_after_rope == (family == "hunyuan_v1_dense")
    assert attention.norm_eps == 1e-4
    sizes = {"gemma4_text": (4, 1, 32)}.get(family, (4, 4 if family in ONLY_MHA else 2, 16))
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == sizes


HYBRID = {
    "exaone4": "sliding_attention",
    "gemma2": "sliding_attention",
    "gemma3_text": "sliding_attention",
    "gemma4_text": "sliding_attention",
    "gpt_oss": "sliding_attention",
    "olmo3": "sliding_attention",
    "lfm2": "conv",
    "llama4_text": "chunked_attention",
    "qwen3_5_moe_text": "linear_attention",
    "qwen3_5_text": "linear_attention",
    "qwen3_next": "linear_attention",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_stay(family: str) -> None:
    spec = model_spec(entries(family))
    if family in HYBRID:
        assert spec.converted == [1]
        assert spec.kind(0) == HYBRID[family]
        assert spec.sliding == (HYBRID[family] in ("sliding_attention", "chunked_attention"))
        assert spec.layer_attention(0) is None
    else:
        assert spec.converted == [0, 1]
    assert [spec.layer_attention(layer).rotates for layer in spec.converted] == (  # type: ignore[union-attr]
        {"smollm3": [True, False], "exaone4": [False], "gpt2": [False, False], "llama4_text": [False]}.get(
            family, [True] * len(spec.converted)
        )
    )


_KINDS = [
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gpt_oss",
    "llama4_text",
    "olmo3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_next",
    "smollm3",
]


@pytest.mark.parametrize("family", _KINDS)
def test_kinds_of_layers_that_a_config_leaves_out(family: str) -> None:
    """As transformers fills them in."""
    active = {"use_sliding_window": True, "max_window_layers": 3} if family in ("qwen2", "qwen3", "smollm3") else {}
    if family == "smollm3":
        del active["max_window_layers"]
    bare = {"model_type": family, "intermediate_size": 96, "vocab_size": 257, "num_hidden_layers": 12}
    if family == "gemma4_text":
        active = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
    bare |= {"sliding_window": 128, **active}
    full = json.loads(AutoConfig.for_model(**bare).to_json_string(use_diff=False))
    assert list(model_spec(bare).kinds) == full["layer_types"]
    assert 0 < len(model_spec(bare).converted) < 12


@pytest.mark.parametrize("types", [["full_attention"], "full_attention", ["full_attention", "mamba"]])
def test_impossible_kinds_of_layers(types: Any) -> None:
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"layer_types|mamba"):
        model_spec(entries("qwen3", layer_types=types))


GEMMA4 = {"model_type": "gemma4_text", "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
# Refused by transformers' own names for what is different about it.
_OTHER_GEMMAS: dict[str, dict[str, Any]] = {
    "hidden_size_per_layer_input": {"hidden_size_per_layer_input": 256},
    "num_kv_shared_layers": {"num_kv_shared_layers": 10},
    "attention_k_eq_v": {"attention_k_eq_v": False},
    "use_bidirectional_attention": {"use_bidirectional_attention": "all"},
    "per_layer_config": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
        "per_layer_config": {"0": {"head_dim": 256}, "2": {"head_dim": 512}},
    },
}


@pytest.mark.parametrize("what", _OTHER_GEMMAS)
def test_gemmas_that_cannot_be_converted(what: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        model_spec({**GEMMA4, **_OTHER_GEMMAS[what]})
    assert what in str(caught.value.where)


def test_sizes_of_full_attention_are_stated_once_or_layer_by_layer() -> None:
    """As a config is published, and as transformers saves it."""
    published = {**GEMMA4, "num_hidden_layers": 12, "global_head_dim": 128, "num_global_key_value_heads": 2}
    saved = json.loads(AutoConfig.for_model(**published).to_json_string())
    assert "global_head_dim" not in saved and set(saved["per_layer_config"]) == {"05", "11"}
    ours = model_spec(published)
    assert (ours.attention.num_kv_heads, ours.attention.head_dim) == (2, 128)
    assert ours.kept_values == 2 * 4 * 256, "of the other layers"
    assert model_spec(saved).attention == ours.attention
    assert model_spec(saved).tensor_shapes() == ours.tensor_shapes()


def raw_table() -> dict[str, Any]:
    return json.loads((resources.files("latentize.families") / "tables" / "llama.json").read_text())


def test_a_table_is_its_file() -> None:
    assert Table.from_dict(raw_table()) == families()["llama"]


def test_a_table_says_what_differs_from_another() -> None:
    """A JSON merge patch: what is null is taken away, what is a mapping is merged, the rest is replaced."""
    patch = {
        "model_type": "slope",
        "extends": "llama",
        "architectures": ["SlopeForCausalLM"],
        "attention": {"qk_norm": True, "heads_divide": None},
        "layer_tensors": {"post_attention_layernorm.weight": None},
    }
    llama, made = families()["llama"], Table.from_dict(patch)
    assert made.about == llama.about and made.architectures == ("SlopeForCausalLM",)
    assert made.attention == {**{k: v for k, v in llama.attention.items() if k != "heads_divide"}, "qk_norm": True}
    assert set(llama.layer_tensors) - set(made.layer_tensors) == {"post_attention_layernorm.weight"}
    assert families()["llama"] == llama


def test_a_table_that_extends_none_that_ships() -> None:
    with pytest.raises(ConfigError, match="extends 'lama'") as raised:
        Table.from_dict({**raw_table(), "extends": "lama"})
    assert "llama" in str(raised.value)


@pytest.mark.parametrize("key", ["layer_tensor", "atention"])
def test_an_unknown_key_in_a_table_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Table.from_dict({**raw_table(), key: {}})


def test_an_unknown_feature_in_a_table_is_refused() -> None:
    table = raw_table()
    table["attention"] = {**table["attention"], "qk_nrom": True}
    with pytest.raises(ConfigError, match=r"attention\.qk_nrom"):
        Table.from_dict(table)


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UnsupportedModelError, match="mamba") as caught:
        model_spec(entries(model_type="mamba"))
    for family in FAMILIES:
        assert family in caught.value.fix
    assert caught.value.code == "LZ201"


def test_a_config_without_a_family_is_refused() -> None:
    config = entries()
    del config["model_type"]
    with pytest.raises(UnsupportedModelError):
        model_spec(config)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"kv_lora_rank": 512}, "kv_lora_rank"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"vision_config": {"depth": 2}}, "vision_config"),
    ({"auto_map": {"AutoModelForCausalLM": "model.Model"}}, "auto_map"),
]


@pytest.mark.parametrize(("change", "key"), REFUSED, ids=[key for _, key in REFUSED])
def test_what_cannot_be_kept_is_refused_by_name(change: dict[str, Any], key: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        model_spec(entries(**change))
    assert key in caught.value.where


@pytest.mark.parametrize("key", [key for change, key in REFUSED if not isinstance(change[key], bool)])
def test_the_value_counts_not_the_field(key: str) -> None:
    assert model_spec(entries(**{key: None})).layers == 2


_EVERYWHERE = {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
ACTIVE = [("mistral", {"sliding_window": 128}), ("qwen2", _EVERYWHERE), ("qwen3", _EVERYWHERE)]
INACTIVE = [("mistral", {"sliding_window": None}), ("qwen2", {"sliding_window": 128, "use_sliding_window": False})]
INACTIVE += [("qwen3", {"sliding_window": 128}), ("qwen2", {"sliding_window": None, "use_sliding_window": True})]


@pytest.mark.parametrize(("family", "change"), ACTIVE)
def test_an_active_sliding_window_is_refused(family: str, change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="128") as caught:
        model_spec(entries(family, **change))
    assert "sliding_window" in caught.value.where


def test_a_mistral_config_that_is_silent_about_its_window_has_one() -> None:
    config = entries("mistral")
    del config["sliding_window"]
    with pytest.raises(UnsupportedModelError, match="4096"):
        model_spec(config)


@pytest.mark.parametrize(("family", "change"), INACTIVE)
def test_an_inactive_sliding_window_is_accepted(family: str, change: dict[str, Any]) -> None:
    spec = model_spec(entries(family, **change))
    assert len(spec.converted) == spec.layers


def test_a_llama_heeds_a_partial_factor_under_a_scaling_only() -> None:
    """transformers' Llama ignores the entry under one rope type and fails under another."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert model_spec(entries(rope_parameters=rope)).attention.rope.rotary_dim == 16
    with pytest.raises(UnsupportedModelError, match="part"):
        model_spec(entries(rope_parameters={**rope, "rope_type": "linear", "factor": 2.0}))


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 3},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "2"},
        {"hidden_size": -64},
        {"vocab_size": True},
        {"head_dim": 15},
    ],
    ids=lambda c: next(iter(c)),
)
def test_impossible_sizes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        model_spec(entries(**change))


def test_llama_4_with_rope_where_all_is_seen() -> None:
    with pytest.raises(UnsupportedModelError, match="RoPE in layers of full attention"):
        model_spec(entries("llama4_text") | {"no_rope_layers": [1, 1], "layer_types": ["full_attention"] * 2})
