"""A checkpoint's shape: its family's table applied to its ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentize.attention.spec import AttentionSpec, RopeSpec
from latentize.errors import ConfigError, UnsupportedModelError
from latentize.families.entries import as_read, as_stated
from latentize.families.table import Table, families

__all__ = ["FULL", "NEEDS_TRUST", "ModelSpec", "model_spec", "require_supported", "rope_spec"]

# The kind of layer that is converted.
FULL = "full_attention"
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


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint's shape.

    Attributes:
        table: The family.
        config: ``config.json`` as transformers reads it, see :func:`latentize.families.entries.as_read`.
        stated: ``config.json`` as it was written, defaults filled in.
        layers: Decoder layers ``L``.
        attention: Of the layers that are converted; whether one rotates is said by :meth:`layer_attention`.
        vocab_size: Rows of the embedding.
        norm_eps: Epsilon of the norms of the residual stream.
        tied: Whether the output head is the embedding.
        max_positions: Context length that the model was trained for.
        kinds: What each layer is; all but those of :data:`FULL` stay as they are.
        unrotated: Layers without RoPE.
        window: Tokens that a sliding layer sees, where there are such.
        embedding_scale: Factor on what enters the first layer.
        residual_scale: Factor on what attention and MLP add to the residual stream.
        logit_scale: Factor on the output logits.
        logit_softcap: What output logits are bent below; 0 is not at all.
    """

    table: Table
    config: Mapping[str, Any]
    stated: Mapping[str, Any]
    layers: int
    attention: AttentionSpec
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    tied: bool
    max_positions: int
    kinds: tuple[str, ...] = ()
    unrotated: frozenset[int] = frozenset()
    window: int | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    @property
    def cache_values(self) -> int:
        """Cached values per token of a layer that is converted."""
        return self.attention.cache_values

    def kind(self, layer: int) -> str:
        return self.kinds[layer] if self.kinds else FULL

    @property
    def converted(self) -> list[int]:
        """Numbers of the layers that are converted."""
        return [layer for layer in range(self.layers) if self.kind(layer) == FULL]

    @property
    def sliding(self) -> int:
        """Layers with a sliding window; they stay, and cache no more than that."""
        return sum(self.kind(layer) == "sliding_attention" for layer in range(self.layers))

    def layer_attention(self, layer: int) -> AttentionSpec | None:
        """The attention of a layer; ``None`` where it stays as it is."""
        if self.kind(layer) != FULL:
            return None
        return replace(self.attention, rotates=False) if layer in self.unrotated else self.attention

    @property
    def additive_masks(self) -> bool:
        """Whether attention is written out in transformers, as no fused form bends logits; its masks are added."""
        return "softcap" in self.table.attention

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Radians per position of everything that is converted, fastest first, each once."""
        turning, still = self.attention.frequencies, (0.0,) if self.unrotated else ()
        return tuple(dict.fromkeys((*turning, *still)))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must have, with its shape."""
        a, experts = self.attention, self.table.experts
        size = {
            "hidden": a.hidden_size,
            "q": a.num_heads * a.head_dim,
            "kv": a.num_kv_heads * a.head_dim,
            "head": a.head_dim,
            "intermediate": self.intermediate_size,
            "vocab": self.vocab_size,
            "one": 1,
            "kernel": int(self.config.get("conv_L_cache") or 0),
        }
        if experts is not None:
            size |= {"experts": self.experts, "moe": _int(self.config, experts.intermediate)}
        symbolic = dict(self.table.top_tensors)
        if not self.tied:
            symbolic[self.table.module("head") + ".weight"] = ("vocab", "hidden")
        for layer in range(self.layers):
            prefix = self.layer_prefix(layer)
            symbolic |= {prefix + name: shape for name, shape in self._layer_tensors(layer)}
        # Fused projections are as wide as their parts together: "q+kv+kv".
        return {
            n: tuple(sum(_size(size, part) for part in s.split("+")) for s in shape) for n, shape in symbolic.items()
        }

    def _layer_tensors(self, layer: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        table, kept = self.table, self.table.kept_tensors.get(self.kind(layer))
        found = dict(table.layer_tensors)
        for name, entry in table.optional_layer_tensors.items():
            if _feature(entry["when"], self.config):
                found[name] = entry["shape"]
        if kept is not None:
            attention = table.module("attention") + "."
            found = {name: shape for name, shape in found.items() if not name.startswith(attention)} | dict(kept)
        yield from found.items()
        if table.experts is None:
            return
        if not table.experts.in_layer(layer, self.config):
            yield from table.experts.dense_tensors.items()
            return
        yield from table.experts.other_tensors.items()
        for expert in range(self.experts):
            yield from ((name.format(expert=expert), shape) for name, shape in table.experts.tensors.items())

    @property
    def experts(self) -> int:
        """Experts of a layer that has some."""
        if self.table.experts is None:
            return 0
        keys = self.table.experts.count
        return _int(self.config, next((key for key in keys if self.config.get(key) is not None), keys[0]))

    @property
    def active_experts(self) -> float:
        """Share of the experts that a token goes through."""
        experts = self.table.experts
        return 1.0 if experts is None else _int(self.config, experts.chosen) / self.experts

    def module(self, role: str) -> str:
        """What plays a role is called, see ``MODULES``."""
        return self.table.module(role)

    def layer_prefix(self, layer: int) -> str:
        return self.table.layer_prefix.format(layer=layer)


def _size(size: Mapping[str, int], part: str) -> int:
    """A size by name, or a multiple of one: ``3*hidden``."""
    times, _, name = part.rpartition("*")
    return int(times or 1) * size[name]


def _feature(key: Any, config: Mapping[str, Any]) -> Any:
    return config.get(key) if isinstance(key, str) else key


def _multiplier(table: Table, name: str, config: Mapping[str, Any]) -> float:
    key = table.multipliers.get(name)
    if isinstance(key, str) and key.startswith("sqrt("):
        return math.sqrt(_int(config, key[5:-1]))
    value = 1.0 if key is None or config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"'{key}' should be a positive number, is {value!r}", where="config.json")
    return float(value)


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"'{key}' should be a positive whole number, is {value!r}", where="config.json")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"'{key}' should be a positive number, is {value!r}", where=f"config.json, {key}")
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
    if entries.get("rope_type", "default") == "default":
        entries = {}
    try:
        rotated = int(head_dim * partial)
        if not 0 < rotated <= head_dim:
            raise UnsupportedModelError(
                f"RoPE on {rotated} of {head_dim} dimensions of a head cannot be converted",
                code="LZ209",
                where="config.json, partial_rotary_factor",
            )
        # Of an odd number the last pair is whole, at the frequencies of the odd number.
        rotary = rotated + rotated % 2
        spec = RopeSpec(theta=float(theta ** (rotary / max(1, rotated))), rotary_dim=rotary, scaling=entries)
        if all(0 < w < math.inf for w in (spec.theta, *spec.frequencies)):
            return spec
        reason = "its frequencies should be positive numbers"
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
    read = set() if table is None else {*map(str, table.attention.values()), table.logit_softcap}
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
    return table


def _unrotated(table: Table, config: Mapping[str, Any], layers: int) -> frozenset[int]:
    rule = table.attention.get("unrotated")
    if rule is None:
        return frozenset()
    listed, interval = config.get(rule["list"]), config.get(rule["every"])
    if listed is None:
        listed = [(layer + 1) % interval if interval else 1 for layer in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers:
        raise ConfigError(f"'{rule['list']}' should say 1 or 0 for each of {layers} layers", where="config.json")
    return frozenset(layer for layer, rotated in enumerate(listed) if not rotated)


def _kinds(
    table: Table,
    config: Mapping[str, Any],
    stated: Mapping[str, Any],
    layers: int,
    window: int | None,
    unrotated: frozenset[int],
) -> tuple[str, ...]:
    """What each layer is, as the config says, or as transformers assumes where it does not.

    Raises:
        ConfigError: the list has not an entry for each layer.
        UnsupportedModelError: a kind that is not known to stay right untouched, or none that could be converted.
    """
    if "layer_types" in stated and "layer_types" not in config and stated["layer_types"] is not None:
        config = {**config, "layer_types": stated["layer_types"]}
    listed = config.get("layer_types")
    if listed is not None and (not isinstance(listed, list) or len(listed) != layers):
        raise ConfigError(f"'layer_types' should have one entry for each of {layers} layers", where="config.json")
    kinds = [str(kind) for kind in listed] if listed else [FULL] * layers
    key = table.attention.get("sliding_window")
    for layer in range(layers if not listed and window is not None else 0):
        if _slides(table.layer_kinds.get("sliding_attention", "all"), config, layer, unrotated):
            kinds[layer] = "sliding_attention"
    for kind in kinds:
        sliding = kind == "sliding_attention" and window is not None
        if kind != FULL and not sliding and kind not in table.kept_tensors:
            raise UnsupportedModelError(
                f"'{table.model_type}' with layers of '{kind}' cannot be converted",
                code="LZ205",
                where="config.json, layer_types",
            )
    if FULL not in kinds:
        seen = f"an active sliding window of {window} tokens in every layer" if window else "no layer of full attention"
        raise UnsupportedModelError(
            f"'{table.model_type}' with {seen} cannot be converted",
            code="LZ205",
            where=f"config.json, {key or 'layer_types'}",
            fix="if the window was never meant to be active, set it to null",
        )
    return tuple(kinds)


def _slides(rule: Any, config: Mapping[str, Any], layer: int, unrotated: frozenset[int]) -> bool:
    if rule == "unrotated":
        return layer in unrotated
    if rule == "all":
        return True
    if "from" in rule:
        return layer >= _int(config, rule["from"])
    every = rule["except_every"]
    return (layer + 1) % (_int(config, every) if isinstance(every, str) else every) != 0


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
    stated, config = as_stated(table, config if stated is None else stated), as_read(table, config)
    layers = _layers(config)
    if layers > _MOST_LAYERS:
        raise ConfigError(f"{layers} layers make no sense", code="LZ121", where="config.json, num_hidden_layers")
    feature = {name: _feature(key, config) for name, key in table.attention.items()}
    window = feature.get("sliding_window") if feature.get("sliding_window_switch", True) else None
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ConfigError(
            f"a sliding window of {window!r} makes no sense", where=f"config.json, {table.attention['sliding_window']}"
        )
    unrotated = _unrotated(table, config, layers)
    kinds = _kinds(table, config, stated, layers, window, unrotated)
    eps = _epsilon(config, table.norm_eps)
    softcap = config.get(table.logit_softcap) if table.logit_softcap else None
    return ModelSpec(
        table=table,
        config=config,
        stated=stated,
        layers=layers,
        attention=_attention(table, config, feature, eps),
        intermediate_size=_intermediate(config),
        vocab_size=_int(config, "vocab_size"),
        norm_eps=eps,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_int(config, "max_position_embeddings", 2048),
        kinds=kinds if set(kinds) != {FULL} else (),
        unrotated=unrotated,
        window=window if "sliding_attention" in kinds else None,
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
    return _int(config, "num_hidden_layers")


def _intermediate(config: Mapping[str, Any]) -> int:
    """Width of the MLP. LFM2 states that of an MLP without gate, and what to make of it."""
    size = _int(config, "intermediate_size")
    if not config.get("block_auto_adjust_ff_dim"):
        return size
    multiple, factor = _int(config, "block_multiple_of", 1), config.get("block_ffn_dim_multiplier")
    narrowed = int(2 * size / 3)
    return narrowed if factor is None else multiple * -(-int(factor * narrowed) // multiple)


def _attention(table: Table, config: Mapping[str, Any], feature: Mapping[str, Any], eps: float) -> AttentionSpec:
    heads = _int(config, "num_attention_heads")
    kv_heads = _int(config, "num_key_value_heads", heads)
    hidden = _int(config, "hidden_size")
    if heads % kv_heads:
        raise ConfigError(
            f"{heads} query heads are not a multiple of {kv_heads} kv heads", code="LZ121", where="config.json"
        )
    head_dim = _int(config, "head_dim", hidden // heads)
    if head_dim > _LARGEST_HEAD:
        raise ConfigError(f"heads of {head_dim} make no sense", code="LZ121", where="config.json, head_dim")
    if head_dim % 2:
        # Where RoPE is on a part of each head, transformers runs it.
        kind = UnsupportedModelError if table.attention.get("partial") else ConfigError
        raise kind(
            f"heads of {head_dim} cannot be rotated: RoPE needs pairs", code="LZ121", where="config.json, head_dim"
        )
    rope = rope_spec(config, head_dim)
    if rope.rotary_dim != head_dim and not table.attention.get("partial"):
        raise UnsupportedModelError(
            f"'{table.model_type}' with RoPE on a part of each head cannot be converted",
            code="LZ209",
            where="config.json, partial_rotary_factor",
        )
    scalar = feature.get("softmax_scalar")
    scale = float(feature.get("softmax_scale") or 0.0) or (_positive({"": scalar}, "", 1.0) ** -0.5 if scalar else 0.0)
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
        norm_eps=eps,
        softmax_scale=scale,
        softcap=float(feature.get("softcap") or 0.0),
    )
