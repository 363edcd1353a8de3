"""``config.json`` is read as transformers reads it: the same configs are accepted, with the same meaning."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from tests.common import FP32, mutants
from tests.models import FAMILIES, LLAMA3_SCALING, WITHOUT_ROPE, pico_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from latentize.errors import ConfigError, LatentizeError
from latentize.families import ModelSpec, families, model_spec
from latentize.families.entries import ACTIVATIONS
from latentize.families.model import FULL
from latentize.modeling.body import body_of

# An entry that is taken away.
GONE = object()
LLAMA3 = {k: v for k, v in LLAMA3_SCALING.items() if k != "rope_theta"}
SHORT_LLAMA3 = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
LONG = {"short_factor": [1 + 0.1 * f for f in range(8)], "long_factor": [2.0 + f for f in range(8)]}
SCALINGS: dict[str, Any] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic without factor": {"rope_type": "dynamic"},
    "longrope": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 32, "factor": 4.0},
    "longrope, no factor": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 32},
    "longrope alone": {"rope_type": "longrope", **LONG},
    "llama3": LLAMA3,
    "llama3, short": SHORT_LLAMA3,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "linear, old": {"type": "linear", "factor": 2.0},
    "linear with theta": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "linear without factor": {"rope_type": "linear"},
    "default": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "unknown": {"rope_type": "nope"},
    "of no type": {"type": None, "factor": 2.0},
    "empty": {},
    "null": None,
    "text": "linear",
}
OLD: dict[str, Any] = {"rope_parameters": GONE}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    **{f"scaling {name}": {"rope_scaling": s} for name, s in SCALINGS.items()},
    **{f"old scaling {name}": {**OLD, "rope_theta": 5000.0, "rope_scaling": s} for name, s in SCALINGS.items()},
    "llama3, original beside": {"rope_scaling": SHORT_LLAMA3, "original_max_position_embeddings": 32},
    "llama3, original in both": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "original beside, no scaling": {"original_max_position_embeddings": 32},
    "old theta": {**OLD, "rope_theta": 7000.0},
    "theta beside parameters": {"rope_theta": 7000.0},
    "theta beside empty parameters": {"rope_theta": 7000.0, "rope_parameters": {}},
    "theta beside null": {"rope_theta": 7000.0, "rope_parameters": None},
    "theta beside a type": {"rope_theta": 7000.0, "rope_parameters": {"rope_type": "default"}},
    "theta whole": {**OLD, "rope_theta": 20000},
    "theta null": {**OLD, "rope_theta": None},
    "theta text": {**OLD, "rope_theta": "10000"},
    "parameters of theta only": {"rope_parameters": {"rope_theta": 3000.0}},
    "parameters of a list": {"rope_parameters": []},
    "rotary_emb_base": {"rotary_emb_base": 3000},
    "old rotary_emb_base": {**OLD, "rotary_emb_base": 3000},
    "rotary_pct": {"rotary_pct": 0.5},
    "old rotary_pct": {**OLD, "rotary_pct": 0.5},
    "rotary_dim": {"rotary_dim": 8},
    "old rotary_dim": {**OLD, "rotary_dim": 8},
    "rotary_dim beside a share": {**OLD, "rotary_dim": 8, "partial_rotary_factor": 0.25},
    "partial": {"partial_rotary_factor": 0.5},
    "old partial": {**OLD, "partial_rotary_factor": 0.5},
    "partial odd": {**OLD, "partial_rotary_factor": 0.7},
    "partial tiny": {**OLD, "partial_rotary_factor": 0.01},
    "partial none": {**OLD, "partial_rotary_factor": 0},
    "partial null": {"partial_rotary_factor": None},
    **{
        f"{key} {name}": {key: value}
        for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "layer_norm_eps", "tie_word_embeddings")
        for name, value in (("null", None), ("missing", GONE), ("text", "1"))
    },
    **{
        f"{key} {name}": {key: value}
        for key in ("max_position_embeddings", "attention_bias", "layer_types", "hidden_act")
        for name, value in (("null", None), ("missing", GONE), ("whole", 1))
    },
    **{f"intermediate size {n}": {"intermediate_size": n} for n in (None, GONE, 48, 48.0)},
    **{f"head_dim {n}": {"head_dim": n} for n in (8, 32, 0, 15, -16, 16.0)},
    **{f"kv heads {n}": {"num_key_value_heads": n} for n in (4, 1, 3, 0, True, 2.0, 8)},
    "epsilons": {"rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "norm_eps": 1e-5, "norm_epsilon": 1e-5},
    "epsilon whole": {"rms_norm_eps": 1},
    "epsilon none": {"rms_norm_eps": 0.0},
    "one layer": {"num_hidden_layers": 1},
    "layers 2.0": {"num_hidden_layers": 2.0},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "tied 1": {"tie_word_embeddings": 1},
    "window": {"sliding_window": 8},
    "window in use": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "layer types full": {"layer_types": ["full_attention"] * 2},
    "layer types short": {"layer_types": ["full_attention"]},
    "layer types unknown": {"layer_types": ["nope", "full_attention"]},
    "layers of their own": {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
    "no RoPE anywhere": {"no_rope_layers": [0, 0]},
    "activation unknown": {"hidden_act": "nope"},
    "other names": {"n_head": 8, "n_embd": 128, "num_heads": 2},
    "logits": {"logits_scaling": 2.0},
    "more heads than the hidden size": {"num_attention_heads": 65, "num_key_value_heads": 65},
    "more heads than the hidden size, a share of each": {
        **OLD,
        "num_attention_heads": 65,
        "partial_rotary_factor": 0.5,
    },
    **{f"{n} heads": {"num_attention_heads": n, "num_key_value_heads": n} for n in (3, 5)},
    "old scaling false": {"rope_scaling": False},
    "old scaling of a list": {"rope_scaling": []},
    "old partial infinite": {**OLD, "partial_rotary_factor": math.inf},
    "head_dim infinite": {"head_dim": math.inf},
    "head_dim an object": {"head_dim": {"rope_type": None}},
    "hidden size of 400 digits": {"hidden_size": 10**400},
    "epsilons of 400 digits": {"rms_norm_eps": 10**400, "layer_norm_eps": 10**400, "norm_eps": 10**400},
}


def config_of(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    entries = json.loads(pico_config(family).to_json_string(use_diff=False))
    entries |= copy.deepcopy({k: v for k, v in changes.items() if v is not GONE})
    return {k: v for k, v in entries.items() if changes.get(k) is not GONE}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def theirs(tmp_path: Path, entries: dict[str, Any]) -> Any:
    """transformers' model of a config, once it has predicted something; ``None`` where it does not."""
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with silent():
        try:
            config = AutoConfig.from_pretrained(tmp_path)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                # Positions that are learnt end.
                tokens = min(12, config.max_position_embeddings) if config.model_type in WITHOUT_ROPE else 12
                logits = model(torch.arange(1, 1 + tokens)[None]).logits
        except Exception:
            return None
    return model if bool(logits.isfinite().all()) else None


def read(entries: dict[str, Any]) -> ModelSpec | LatentizeError:
    try:
        return model_spec(entries)
    except LatentizeError as error:
        return error


def differences(spec: ModelSpec, model: Any) -> list[str]:
    found, body = [], body_of(model)
    rotary = getattr(body, "rotary_emb", None)
    if rotary is not None:
        buffers = dict(rotary.named_buffers())
        turning = buffers.get(f"{FULL}_inv_freq", buffers.get("inv_freq"))
        ours = torch.tensor(spec.attention.rope.frequencies)
        if spec.attention.rope.rope_type == "proportional" and not turning[len(ours) :].any():
            # What does not turn is in the module's table.
            turning = turning[: len(ours)]
        if turning.shape != ours.shape or not torch.allclose(ours, turning, rtol=FP32, atol=0):
            found.append("frequencies")
    elif len(spec.unrotated) < spec.layers:
        found.append("RoPE")
    factor = getattr(rotary, f"{FULL}_attention_scaling", getattr(rotary, "attention_scaling", 1.0))
    for layer in spec.converted:
        theirs = getattr(body, spec.module("layers"))[layer]
        attention, own = getattr(theirs, spec.module("attention")), spec.layer_attention(layer)
        assert own is not None
        # What is rotated is multiplied, queries and keys alike; of a part of each head weights are.
        scaling = attention.scaling * (factor**2 if own.rotates_whole else 1)
        if not math.isclose(scaling, own.softmax_scale, rel_tol=FP32):
            found.append("factor on logits")
        output = getattr(attention, spec.module("o_proj")).weight
        if output.shape != (spec.attention.hidden_size, spec.attention.num_heads * spec.attention.head_dim):
            found.append("heads")
    # Experts are stacked in the model, and stand one by one in files.
    if spec.table.experts is None:
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        head = spec.module("head") + ".weight"
        shapes[head] = shapes.pop("lm_head.weight")
        if spec.tied:
            del shapes[head]
        if shapes != spec.tensor_shapes():
            found.append("tensors")
    if spec.tied != model.config.tie_word_embeddings:
        found.append("tied")
    return found


def test_there_are_enough_variants() -> None:
    assert len(VARIANTS) >= 100


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_means_what_transformers_takes_it_for(tmp_path: Path, family: str) -> None:
    """Refused where transformers cannot run it; where it can, of the same shapes, or refused as not supported."""
    wrong = {}
    for name, changes in VARIANTS.items():
        entries = config_of(family, changes)
        model, ours = theirs(tmp_path, entries), read(entries)
        if model is None:
            if isinstance(ours, ModelSpec):
                wrong[name] = "accepted, transformers cannot run it"
        elif isinstance(ours, ConfigError):
            wrong[name] = f"refused: {ours}"
        elif isinstance(ours, ModelSpec) and (found := differences(ours, model)):
            wrong[name] = ", ".join(found)
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_all_entries_of_transformers_mean_the_same_as_the_file(tmp_path: Path, family: str) -> None:
    """A conversion reads what transformers makes of the file; a plan, the file."""
    for changes in VARIANTS.values():
        entries = config_of(family, changes)
        (tmp_path / "config.json").write_text(json.dumps(entries))
        ours = read(entries)
        if not isinstance(ours, ModelSpec):
            continue
        with silent():
            asked = model_spec(AutoConfig.from_pretrained(tmp_path).to_dict(), stated=entries)
        assert asked.attention == ours.attention
        assert asked.tensor_shapes() == ours.tensor_shapes()
        assert (asked.kinds, asked.unrotated, asked.window) == (ours.kinds, ours.unrotated, ours.window)
        assert (asked.stated, asked.norm_eps, asked.tied) == (ours.stated, ours.norm_eps, ours.tied)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_are_those_of_the_config_class(family: str) -> None:
    theirs = type(pico_config(family)).__dataclass_fields__
    for name, (types, default) in families()[family].fields.items():
        assert str(theirs[name].type).replace("<class '", "").replace("'>", "").replace(" ", "") == types
        assert theirs[name].default == default, name


def test_activations_are_known() -> None:
    assert set(ACT2FN) >= {name for name in ACTIVATIONS if name not in ("hardswish", "sqrtsoftplus")}
    assert set(ACT2FN) <= ACTIVATIONS


# Whatever any family has a field for; the sizes of attention more often.
KEYS = [
    *sorted({key for changes in VARIANTS.values() for key in changes} | {"hidden_size", "num_attention_heads"}),
    *sorted({name for family in FAMILIES for name in families()[family].fields}),
]
NUMBERS = st.integers(-3, 300) | st.floats() | st.sampled_from([0.5, 1e-6, 1e4, 1 << 40, 10**400])
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
ROPE = st.dictionaries(
    st.sampled_from([*LLAMA3, "rope_theta", "type", "partial_rotary_factor", "full_attention"]),
    PLAIN | st.sampled_from(["linear", "llama3", "default", "yarn", "longrope"]),
    max_size=5,
)
VALUES = PLAIN | ROPE | st.lists(PLAIN, max_size=3)


@mutants(suppress_health_check=[HealthCheck.too_slow])
@given(family=st.sampled_from(FAMILIES), changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_config_is_read_or_refused(family: str, changes: dict[str, Any]) -> None:
    """Never a traceback, and what is read, transformers reads alike if it does."""
    entries = config_of(family, changes)
    ours = read(entries)
    if not isinstance(ours, ModelSpec) or max(ours.attention.hidden_size, ours.layers, ours.vocab_size) > 4096:
        return
    with silent():
        try:
            theirs = AutoConfig.for_model(**json.loads(json.dumps(entries)))
        except Exception:
            return
        asked = model_spec(theirs.to_dict(), stated=entries)
    assert asked.attention == ours.attention
    assert asked.tensor_shapes() == ours.tensor_shapes()
