"""From ``config.json`` to the shape of a model that has latent attention as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentize.attention.spec import LatentSpec, RopeSpec
from latentize.errors import ConfigError, UnsupportedModelError
from latentize.families.latent import DeltaLayers, Indexer, LatentExperts, LatentModel
from latentize.families.latent_types import ALIASES, LATENT_TYPES

__all__ = ["is_latent", "latent_model"]

# Far above any model.
_LARGEST_HEAD = 1 << 16
_INDEXED = ("deepseek_v32", "glm_moe_dsa")


def is_latent(config: Any) -> bool:
    """Whether a ``config.json`` is that of a model with latent attention that is known here."""
    return isinstance(config, Mapping) and str(config.get("model_type")) in LATENT_TYPES


def latent_model(config: Mapping[str, Any]) -> LatentModel:
    """The shape of a model with latent attention.

    Raises:
        ConfigError: sizes that are missing or make no sense.
        UnsupportedModelError: no layer has latent attention.
    """
    model_type = str(config["model_type"])
    config = _completed(model_type, config)
    attention, layers = _attention(config), _size(config, "num_hidden_layers")
    return LatentModel(
        model_type=model_type,
        config=config,
        layers=layers,
        attention=attention,
        q_lora_rank=None if config.get("q_lora_rank") is None else _size(config, "q_lora_rank"),
        rope=_rope(config, attention.qk_rope_head_dim),
        intermediate_size=_size(config, "intermediate_size"),
        experts=_experts(config, layers),
        vocab_size=_size(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_size(config, "max_position_embeddings"),
        attention_bias=bool(config.get("attention_bias", False)),
        indexer=_indexer(config, layers) if model_type in _INDEXED else None,
        delta=_delta(config, layers) if model_type == "kimi_linear" else None,
    )


def _completed(model_type: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """With what transformers assumes, under the names that it has."""
    given = {key: value for key, value in stated.items() if value is not None or key == "q_lora_rank"}
    config = {**LATENT_TYPES[model_type], **given}
    for name, others in ALIASES.get(model_type, {}).items():
        known = next((config[other] for other in others if other in config), None)
        config |= {} if known is None else {name: known}
    # MiniCPM3's values are as large as a head of the hidden state.
    return {"v_head_dim": _size(config, "hidden_size") // _size(config, "num_attention_heads"), **config}


def _attention(config: Mapping[str, Any]) -> LatentSpec:
    heads, rope = _size(config, "num_attention_heads"), _size(config, "qk_rope_head_dim")
    if rope % 2:
        raise ConfigError(
            f"a roped key of {rope} cannot be rotated: RoPE needs pairs",
            code="LZ121",
            where="config.json, qk_rope_head_dim",
        )
    nope, value = _size(config, "qk_nope_head_dim"), _size(config, "v_head_dim")
    for name, size in (("qk_rope_head_dim", rope), ("qk_nope_head_dim", nope), ("v_head_dim", value)):
        if size > _LARGEST_HEAD:
            raise ConfigError(f"heads of {size} make no sense", code="LZ121", where=f"config.json, {name}")
    return LatentSpec(
        hidden_size=_size(config, "hidden_size"),
        num_heads=heads,
        kv_lora_rank=_size(config, "kv_lora_rank"),
        qk_rope_head_dim=rope,
        qk_nope_head_dim=nope,
        v_head_dim=value,
        rope_heads=1,
        up_heads=heads,
        softmax_scale=(nope + rope) ** -0.5,
    )


def _indexer(config: Mapping[str, Any], layers: int) -> Indexer:
    """In GLM-5 some layers take what the last one with an index chose."""
    types, freq = config.get("indexer_types"), config.get("index_topk_freq") or 1
    offset = config.get("index_skip_topk_offset", 2)
    if isinstance(types, list):
        having = types[:layers].count("full")
    elif isinstance(freq, int) and freq > 1 and isinstance(offset, int):
        having = sum(max(layer - offset + 1, 0) % freq == 0 for layer in range(layers))
    else:
        having = layers
    sizes = (_size(config, name) for name in ("index_n_heads", "index_head_dim", "index_topk"))
    return Indexer(having, *sizes)


def _delta(config: Mapping[str, Any], layers: int) -> DeltaLayers:
    """As files say it, counted from one, or as transformers does."""
    own, types = config.get("linear_attn_config"), config.get("layer_types")
    own = own if isinstance(own, Mapping) else {}
    if isinstance(types, list):
        found = [layer for layer, kind in enumerate(types[:layers]) if kind == "linear_attention"]
    elif isinstance(own.get("kda_layers"), list):
        found = [layer - 1 for layer in own["kda_layers"] if isinstance(layer, int)]
    else:
        found = [layer for layer in range(layers) if layer == 0 or layer % 4 > 0]
    names = {"linear_num_heads": "num_heads", "linear_head_dim": "head_dim"}
    names["linear_conv_kernel_dim"] = "short_conv_kernel_size"
    sizes = {name: own.get(short, config[name]) for name, short in names.items()}
    if len(found) >= layers:
        raise UnsupportedModelError(
            "no layer has latent attention", code="LZ205", where="config.json, layer_types or linear_attn_config"
        )
    return DeltaLayers(frozenset(found), *(_size(sizes, name) for name in names))


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"'{key}' should be a positive whole number, is {value!r}", where="config.json")
    return value


def _experts(config: Mapping[str, Any], layers: int) -> LatentExperts | None:
    if "n_routed_experts" not in config:
        return None
    types = config.get("mlp_layer_types")
    if isinstance(types, list):
        sparse = types[:layers].count("sparse")
    else:
        dense = config.get("first_k_dense_replace", 1)
        if not isinstance(dense, int) or dense < 0:
            raise ConfigError(f"'first_k_dense_replace' should be a whole number, is {dense!r}", where="config.json")
        sparse = max(0, layers - dense)
    if sparse == 0:
        return None
    shared = config.get("n_shared_experts", 0)
    return LatentExperts(
        layers=sparse,
        routed=_size(config, "n_routed_experts"),
        per_token=_size(config, "num_experts_per_tok"),
        shared=shared if isinstance(shared, int) else 0,
        intermediate_size=_size(config, "moe_intermediate_size"),
    )


def _rope(config: Mapping[str, Any], rope: int) -> RopeSpec:
    """Any scaling is told, not computed with: the roped key is never touched."""
    try:
        entries = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        if "type" in entries:
            entries.setdefault("rope_type", entries.pop("type"))
        theta = float(entries.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"the entries of RoPE make no sense: {error}", where="config.json, rope_scaling or rope_parameters"
        ) from error
    return RopeSpec(
        theta=theta, rotary_dim=rope, scaling={} if entries.get("rope_type", "default") == "default" else entries
    )
