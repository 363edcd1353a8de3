"""Tables say what transformers says, and refuse what conversion cannot keep."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
from tests.common import FAMILIES, pico_config, pico_model
from transformers import AutoConfig

from latentize.errors import ConfigError, UnsupportedModelError
from latentize.families import Table, families, model_spec

# What a config.json always states; everything else may be left out.
STATED = ("model_type", "intermediate_size", "vocab_size", "num_hidden_layers")


def entries(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """``config.json`` of a picomodel."""
    return {**json.loads(pico_config(family).to_json_string(use_diff=False)), **changes}


def test_all_tables_are_read() -> None:
    assert set(families()) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_config_class(family: str) -> None:
    """What ``config.json`` leaves out, transformers fills in; so must the table."""
    theirs = {name: f.default for name, f in type(pico_config(family)).__dataclass_fields__.items()}
    for key, value in families()[family].config_defaults.items():
        assert theirs[key] == value, key
        assert type(theirs[key]) is type(value), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_config_means_what_transformers_takes_it_for(family: str) -> None:
    """No default that matters is missing from the table."""
    bare: dict[str, Any] = {
        "model_type": family,
        "intermediate_size": 96,
        "vocab_size": 257,
        "num_hidden_layers": 2,
    }
    if family == "mistral":
        bare["sliding_window"] = None
    full = AutoConfig.for_model(**bare)
    ours, theirs = model_spec(bare), model_spec(json.loads(full.to_json_string(use_diff=False)))
    assert ours.attention == theirs.attention
    assert (ours.norm_eps, ours.tied, ours.max_positions) == (theirs.norm_eps, theirs.tied, theirs.max_positions)
    assert ours.tensor_shapes() == theirs.tensor_shapes()


@pytest.mark.parametrize("key", STATED[1:])
def test_sizes_that_must_be_stated(key: str) -> None:
    config = entries()
    del config[key]
    with pytest.raises(ConfigError, match=key):
        model_spec(config)


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
]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("family", "switch"), SWITCHES, ids=[f"{f}-{'-'.join(s) or 'plain'}" for f, s in SWITCHES])
def test_tensor_shapes_are_the_models_own(family: str, switch: dict[str, Any], kv_heads: int) -> None:
    """Exactly the names and shapes of transformers' state_dict, for each position of each switch."""
    model = pico_model(family, kv_heads, **switch)
    spec = model_spec(json.loads(model.config.to_json_string(use_diff=False)))
    theirs = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if spec.tied:
        theirs.pop("lm_head.weight", None)
    assert spec.tensor_shapes() == theirs
    assert spec.tied == bool(switch.get("tie_word_embeddings"))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_each_family(family: str) -> None:
    attention = model_spec(entries(family, rms_norm_eps=1e-5)).attention
    assert attention.qkv_bias == (family == "qwen2")
    assert attention.qk_norm == (family == "qwen3")
    assert not attention.o_bias
    assert attention.sliding_window is None
    assert attention.norm_eps == 1e-5
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, 2, 16)


def raw_table() -> dict[str, Any]:
    return json.loads((resources.files("latentize.families") / "tables" / "llama.json").read_text())


def test_a_table_is_its_file() -> None:
    assert Table.from_dict(raw_table()) == families()["llama"]


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
    with pytest.raises(UnsupportedModelError, match="gpt_neox") as caught:
        model_spec(entries(model_type="gpt_neox"))
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


ACTIVE = [("mistral", {"sliding_window": 128}), ("qwen2", {"sliding_window": 128, "use_sliding_window": True})]
ACTIVE += [("qwen3", ACTIVE[1][1])]
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
    assert model_spec(entries(family, **change)).attention.sliding_window is None


def test_a_llama_that_rotates_a_part_of_each_head_is_not_taken_for_one_that_rotates_all() -> None:
    """transformers' Llama ignores the entry under one rope type and heeds it under another."""
    with pytest.raises(UnsupportedModelError, match="part"):
        model_spec(entries(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}))


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
