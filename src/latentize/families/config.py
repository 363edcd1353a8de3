"""From ``config.json`` to the shape of a model, or to the reason why it cannot be converted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentize.attention.spec import AttentionSpec, RopeSpec
from latentize.errors import ConfigError, UnsupportedModelError
from latentize.families.entries import as_read, as_stated
from latentize.families.kinds import layer_kinds, unrotated_layers
from latentize.families.model import CHUNKED, FULL, SLIDING, ModelSpec
from latentize.families.table import Table, families
from latentize.families.values import positive_number, value_of, whole_number

__all__ = ["NEEDS_TRUST", "model_spec", "require_supported", "rope_spec"]

# Far above any model; beyond it, a table of frequencies would not fit into memory.
_LARGEST_HEAD = 1 << 16
# The same for a list with an entry for each layer.
_MOST_LAYERS = 1 << 16
NEEDS_TRUST = "read that code; if it may be run here, convert with --trust-remote-code"
# Config entries whose mere presence with a true value changes what attention computes, unless the table reads them.
_UNSUPPORTED = {
    "attn_logit_softcapping": ("attention logits are soft-capped", "LZ206"),
    "final_logit_softcapping": ("output logits are soft-capped", "LZ206"),
    "kv_lora_rank": ("the model has latent attention already", "LZ203"),
    "quantization_config": ("the weights are quantised", "LZ204"),
    "is_encoder_decoder": ("it is an encoder-decoder", "LZ211"),
    "vision_config": ("it is multimodal", "LZ211"),
    "clip_qkv": ("queries, keys and values are clipped", "LZ212"),
    "qk_layernorm": ("queries and keys go through a LayerNorm", "LZ212"),
    "use_qk_norm": ("queries and keys go through a LayerNorm", "LZ212"),
    "use_bidirectional_attention": ("attention looks ahead", "LZ212"),
    "per_layer_config": ("layers differ from each other in size", "LZ205"),
    "auto_map": ("it needs code from the checkpoint to run", "LZ207"),
}


def _multiplier(table: Table, name: str, config: Mapping[str, Any]) -> float:
    key = table.multipliers.get(name)
    if isinstance(key, str) and key.startswith("sqrt("):
        return math.sqrt(whole_number(config, key[5:-1]))
    value = 1.0 if key is None or config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"'{key}' should be a positive number, is {value!r}", where="config.json")
    return float(value)


def rope_spec(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """RoPE from ``rope_parameters`` as :func:`latentize.families.entries.as_read` gives them.

    Args:
        config: With ``rope_parameters``, or without for the default.
        head_dim: Size of a head.

    Raises:
        ConfigError: an entry that RoPE cannot be computed from.
        UnsupportedModelError: a scaling that cannot be converted.
    """
    entries = dict(config.get("rope_parameters") or {})
    theta, partial = entries.pop("rope_theta", 10_000.0), entries.pop("partial_rotary_factor", 1.0)
    # The model's own, said again.
    entries.pop("max_position_embeddings", None)
    if entries.get("rope_type", "default") == "default":
        entries = {}
    try:
        proportional = entries.get("rope_type") == "proportional"
        rotated = 2 * int(head_dim * partial // 2) if proportional else int(head_dim * partial)
        if not 0 < rotated <= head_dim:
            raise UnsupportedModelError(
                f"RoPE on {rotated} of {head_dim} dimensions of a head cannot be converted",
                code="LZ209",
                where="config.json, partial_rotary_factor",
            )
        # Of an odd number the last pair is whole, at the frequencies of the odd number.
        rotary = rotated + rotated % 2
        ladder_dim = head_dim if proportional else max(1, rotated)
        if proportional:
            entries.setdefault("factor", 1.0)
        spec = RopeSpec(theta=float(theta ** (rotary / ladder_dim)), rotary_dim=rotary, scaling=entries)
        turning = (spec.theta, *spec.frequencies, *(() if spec.stretch else spec.beyond), spec.attention_factor)
        if spec.length < 0 or not all(0 < w < math.inf for w in turning):
            reason = "its frequencies should be positive numbers"
        elif spec.length and len(set(spec.frequencies)) < len(spec.frequencies):
            reason = "two pairs turn alike in short texts, which cannot tell them apart in long ones"
        else:
            return spec
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__} {error}"
    raise ConfigError(
        f"the entries of RoPE make no sense: {reason}", where="config.json, rope_scaling or rope_parameters"
    )


def require_supported(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> Table:
    """The table of a config's family.

    Args:
        config: ``config.json``.
        trust_remote_code: Whether code of the checkpoint may be run.

    Raises:
        ConfigError: it is no config.
        UnsupportedModelError: unknown family, or a feature that conversion cannot keep.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("the file should hold one JSON object", where="config.json")
    model_type = config.get("model_type")
    table = families().get(str(model_type))
    read = set() if table is None else _read_by(table)
    for key, (meaning, code) in _UNSUPPORTED.items():
        if config.get(key) and key not in read and not (key == "auto_map" and trust_remote_code):
            raise UnsupportedModelError(
                f"'{model_type}' cannot be converted: {meaning}",
                code=code,
                where=f"config.json, {key}",
                fix=NEEDS_TRUST if code == "LZ207" else "",
            )
    if model_type == "latentize":
        raise UnsupportedModelError(
            "the model was converted already",
            code="LZ203",
            where="config.json, model_type",
            fix="convert its source again, or heal it",
        )
    if table is None:
        raise UnsupportedModelError(
            f"no table for the architecture '{model_type}'",
            where="config.json, model_type",
            fix=f"known are: {', '.join(families())}",
        )
    for key in table.attention.get("another_with", ()):
        if key in config:
            raise UnsupportedModelError(
                f"'{table.model_type}' with '{key}' is another architecture to transformers",
                code="LZ205",
                where=f"config.json, {key}",
                fix="leave it out, if all layers are alike",
            )
    for key, only in table.only_with.items():
        allowed = only if isinstance(only, list) else [only]
        value = config.get(key, table.fields[key][1] if key in table.fields else allowed[0])
        if value not in allowed:
            raise UnsupportedModelError(
                f"'{table.model_type}' with {key} = {value!r} cannot be converted",
                code="LZ212",
                where=f"config.json, {key}",
            )
    return table


def _read_by(table: Table) -> set[str]:
    """Entries that a table has a meaning for."""
    whole = {"per_layer_config"} if "global_sizes" in table.attention else set()
    return {*map(str, table.attention.values()), *table.without_effect, *table.only_with, table.logit_softcap, *whole}


def model_spec(
    config: Mapping[str, Any], *, stated: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> ModelSpec:
    """Apply the table of the config's family.

    Args:
        config: ``config.json``, or all entries of transformers' config.
        stated: ``config.json``, where ``config`` is not.
        trust_remote_code: Whether code of the checkpoint may be run.

    Raises:
        UnsupportedModelError: unknown family, or a feature that conversion cannot keep.
        ConfigError: sizes that are missing or contradict each other.
    """
    table = require_supported(config if stated is None else stated, trust_remote_code=trust_remote_code)
    if table.experts is not None and table.experts.when and not (stated or config).get(table.experts.when):
        table = replace(table, experts=None)
    stated, config = as_stated(table, config if stated is None else stated), as_read(table, config)
    layers = _layers(config)
    if layers > _MOST_LAYERS:
        raise ConfigError(f"{layers} layers make no sense", code="LZ121", where="config.json, num_hidden_layers")
    feature = {name: value_of(key, config) for name, key in table.attention.items()}
    window = feature.get("sliding_window") if feature.get("sliding_window_switch", True) else None
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ConfigError(
            f"a sliding window of {window!r} makes no sense", where=f"config.json, {table.attention['sliding_window']}"
        )
    unrotated = unrotated_layers(table, config, layers)
    kinds = layer_kinds(table, config, stated, layers, window, unrotated)
    eps = _epsilon(config, table.norm_eps)
    attention = _attention(table, config, feature, eps)
    if table.attention.get("unrotated") == "all":
        attention = replace(attention, rotates=False)
    softcap = config.get(table.logit_softcap) if table.logit_softcap else None
    return ModelSpec(
        table=table,
        config=config,
        stated=stated,
        layers=layers,
        attention=attention,
        intermediate_size=_intermediate(table, config),
        vocab_size=whole_number(config, "vocab_size"),
        norm_eps=eps,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=whole_number(config, "max_position_embeddings", 2048),
        kinds=kinds if set(kinds) != {FULL} else (),
        unrotated=unrotated,
        window=window if {SLIDING, CHUNKED} & set(kinds) else None,
        embedding_scale=_multiplier(table, "embedding", config),
        residual_scale=_multiplier(table, "residual", config),
        logit_scale=_multiplier(table, "logits_times", config) / _multiplier(table, "logits", config),
        logit_softcap=float(softcap or 0.0),
    )


def _epsilon(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key, 1e-6)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"'{key}' should be a number, is {value!r}", where=f"config.json, {key}")
    if value < 0:
        raise UnsupportedModelError(f"norms with an epsilon of {value}", code="LZ212", where=f"config.json, {key}")
    return float(value)


def _layers(config: Mapping[str, Any]) -> int:
    if config.get("num_hidden_layers") == 0:
        raise UnsupportedModelError(
            "a model without layers has nothing to convert", code="LZ205", where="config.json, num_hidden_layers"
        )
    return whole_number(config, "num_hidden_layers")


def _intermediate(table: Table, config: Mapping[str, Any]) -> int:
    """Width of the MLP.

    LFM2 states that of an MLP without gate, and what to make of it. Where there are experts alone it is that of all
    that a token goes through.
    """
    if table.experts is not None and "intermediate_size" not in table.fields and table.fields:
        return whole_number(config, table.experts.intermediate) * whole_number(config, table.experts.chosen)
    if table.intermediate_times and config.get(table.intermediate) is None:
        return table.intermediate_times * whole_number(config, "hidden_size")
    size = whole_number(config, table.intermediate)
    if not config.get("block_auto_adjust_ff_dim"):
        return size
    multiple, factor = whole_number(config, "block_multiple_of", 1), config.get("block_ffn_dim_multiplier")
    narrowed = int(2 * size / 3)
    return narrowed if factor is None else multiple * -(-int(factor * narrowed) // multiple)


def _growth(rule: Any, config: Mapping[str, Any]) -> tuple[float, float, int]:
    """How queries grow along a text: factor, length, and what the first position counts as."""
    if not rule or (isinstance(rule, Mapping) and not config.get(rule["when"])):
        return 0.0, 1.0, 0
    if isinstance(rule, Mapping):
        factor, length = (positive_number(config, rule[name], 0.0) for name in ("factor", "length"))
        return factor, length, 1
    entries, names = config["rope_parameters"], ("llama_4_scaling_beta", "original_max_position_embeddings")
    if missing := [name for name in names if name not in entries]:
        raise ConfigError(f"'{missing[0]}' is missing, by which queries grow", where="config.json, rope_parameters")
    factor, length = (positive_number(entries, name, 0.0) for name in names)
    return factor, length, 0


def _require_whole(table: Table, rope: RopeSpec, head_dim: int, *, scaled_norms: bool) -> None:
    """That RoPE is on whole heads, or on a part of them in the way that the family does it."""
    # What is proportional has as many cosines as others have, and families that rotate a part of a head fewer.
    splits = bool(table.attention.get("partial")) != (rope.rope_type == "proportional")
    if scaled_norms or (rope.rotary_dim != head_dim and not splits):
        scaled = ", a factor on it, and norms" if rope.attention_factor != 1 else ""
        raise UnsupportedModelError(
            f"'{table.model_type}' with RoPE on a part of each head{scaled} cannot be converted",
            code="LZ209",
            where="config.json, partial_rotary_factor",
        )


def _attention(table: Table, config: Mapping[str, Any], feature: Mapping[str, Any], eps: float) -> AttentionSpec:
    heads = whole_number(config, "num_attention_heads")
    kv_heads = whole_number(config, "num_key_value_heads", heads)
    hidden = whole_number(config, "hidden_size")
    if heads % kv_heads:
        raise ConfigError(
            f"{heads} query heads are not a multiple of {kv_heads} kv heads", code="LZ121", where="config.json"
        )
    head_dim = whole_number(config, "head_dim", hidden // heads)
    if head_dim > _LARGEST_HEAD:
        raise ConfigError(f"heads of {head_dim} make no sense", code="LZ121", where="config.json, head_dim")
    if head_dim % 2:
        # Where RoPE is on a part of each head, transformers runs it.
        kind = UnsupportedModelError if table.attention.get("partial") else ConfigError
        raise kind(
            f"heads of {head_dim} cannot be rotated: RoPE needs pairs", code="LZ121", where="config.json, head_dim"
        )
    rope = rope_spec(config, head_dim)
    scaled_part = rope.rotary_dim != head_dim and rope.attention_factor != 1
    _require_whole(table, rope, head_dim, scaled_norms=scaled_part and bool(feature.get("qk_norm")))
    if feature.get("gated") and feature.get("qkv_bias"):
        raise UnsupportedModelError(
            "what gated heads read of biased values is no constant", code="LZ212", where="config.json, attention_bias"
        )
    growth, length, first = _growth(table.attention.get("growth"), config)
    scalar = feature.get("softmax_scalar")
    from_scalar = positive_number({"": scalar}, "", 1.0) ** -0.5 if scalar else 0.0
    scale = float(feature.get("softmax_scale") or 0.0) or from_scalar
    return AttentionSpec(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        qkv_bias=bool(feature.get("qkv_bias")),
        o_bias=bool(feature.get("o_bias")),
        qk_norm=bool(feature.get("qk_norm")),
        qk_norm_across=bool(feature.get("qk_norm_across")),
        norm_after_rope=bool(feature.get("norm_after_rope")),
        v_norm=bool(feature.get("v_norm")),
        norm_eps=eps,
        # A factor on rotated queries and keys is one on their products; of a part of them it is in the weights.
        softmax_scale=(scale or head_dim**-0.5) * (1.0 if scaled_part else rope.attention_factor**2),
        softcap=float(feature.get("softcap") or 0.0),
        gated=bool(feature.get("gated")),
        sinks=bool(feature.get("sinks")),
        growth=growth,
        growth_length=length,
        growth_first=first,
    )
