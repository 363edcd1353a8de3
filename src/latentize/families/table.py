"""A family is a table: which tensors it has, of which shapes, and what its attention does.

Tables are JSON files in ``tables/``. Unknown keys are refused, so that a typo cannot pass as a default.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from latentize.errors import ConfigError, UnsupportedModelError
from latentize.spec import AttentionSpec, RopeSpec

__all__ = ["PLUGINS", "ModelSpec", "Table", "families", "model_spec", "register_family"]

_ATTENTION_KEYS = {"qkv_bias", "o_bias", "qk_norm", "sliding_window", "sliding_window_switch", "softmax_scale"}
# Far above any model; beyond it, a table of frequencies would not fit into memory.
_LARGEST_HEAD = 1 << 16
_MULTIPLIERS = {"embedding", "residual", "logits"}
# Config entries whose mere presence with a true value changes what attention computes.
_UNSUPPORTED = {
    "attn_logit_softcapping": ("attention logits are soft-capped", "LZ206"),
    "final_logit_softcapping": ("output logits are soft-capped", "LZ206"),
    "kv_lora_rank": ("the model has latent attention already", "LZ203"),
    "quantization_config": ("the weights are quantised", "LZ204"),
    "is_encoder_decoder": ("it is an encoder-decoder", "LZ211"),
    "vision_config": ("it is multimodal", "LZ211"),
    "auto_map": ("it needs code from the checkpoint to run", "LZ207"),
}


@dataclass(frozen=True)
class Table:
    """The declarative description of one architecture.

    Attributes:
        model_type: As in ``config.json``.
        architectures: Class names of ``config.json`` that are meant.
        about: One line for users.
        config_defaults: What transformers assumes for entries that ``config.json`` leaves out.
        attention: Feature → config key that switches it, or a constant.
        top_tensors: Tensor → symbolic shape, outside the layers.
        layer_prefix: With ``{layer}``.
        layer_tensors: Tensor of a layer, without prefix → symbolic shape.
        optional_layer_tensors: The same with ``{"shape": …, "when": config key}``.
        multipliers: Config keys of factors: ``embedding`` on what enters the first layer, ``residual`` on what each
            block adds, ``logits`` that logits are divided by.
    """

    model_type: str
    architectures: tuple[str, ...]
    about: str
    config_defaults: Mapping[str, Any]
    attention: Mapping[str, Any]
    top_tensors: Mapping[str, tuple[str, ...]]
    layer_prefix: str
    layer_tensors: Mapping[str, tuple[str, ...]]
    optional_layer_tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    multipliers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Table:
        """Build a table, refusing keys that no field or feature is called by."""
        where = f"table '{entries.get('model_type')}'"
        if missing := sorted({f.name for f in fields(cls) if f.default_factory is MISSING} - set(entries)):
            raise ConfigError(f"a family table lacks {', '.join(missing)}", where=where)
        unknown = set(entries) - {f.name for f in fields(cls)}
        unknown |= {f"attention.{k}" for k in set(entries.get("attention", {})) - _ATTENTION_KEYS}
        unknown |= {f"multipliers.{k}" for k in set(entries.get("multipliers", {})) - _MULTIPLIERS}
        if unknown:
            raise ConfigError(
                f"unknown key in a family table: {', '.join(sorted(unknown))}",
                where=where,
            )
        return cls(**{**entries, "architectures": tuple(entries["architectures"])})


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint's shape: its table applied to its ``config.json``.

    Attributes:
        table: The family.
        config: ``config.json`` as it was read.
        layers: Decoder layers ``L``.
        attention: The attention of every layer.
        vocab_size: Rows of the embedding.
        norm_eps: Epsilon of the RMSNorms of the residual stream.
        tied: Whether the output head is the embedding.
        max_positions: Context length that the model was trained for.
        embedding_scale: Factor on what enters the first layer.
        residual_scale: Factor on what attention and MLP add to the residual stream.
        logit_scale: Factor on the output logits.
    """

    table: Table
    config: Mapping[str, Any]
    layers: int
    attention: AttentionSpec
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    tied: bool
    max_positions: int
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def cache_values(self) -> int:
        return self.attention.cache_values

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must have, with its shape."""
        a = self.attention
        size = {
            "hidden": a.hidden_size,
            "q": a.num_heads * a.head_dim,
            "kv": a.num_kv_heads * a.head_dim,
            "head": a.head_dim,
            "intermediate": self.intermediate_size,
            "vocab": self.vocab_size,
        }
        symbolic = dict(self.table.top_tensors)
        if not self.tied:
            symbolic["lm_head.weight"] = ("vocab", "hidden")
        for layer in range(self.layers):
            prefix = self.layer_prefix(layer)
            for name, shape in self.table.layer_tensors.items():
                symbolic[prefix + name] = shape
            for name, entry in self.table.optional_layer_tensors.items():
                if _feature(entry["when"], self.config):
                    symbolic[prefix + name] = entry["shape"]
        # Fused projections are as wide as their parts together: "q+kv+kv".
        return {n: tuple(sum(size[part] for part in s.split("+")) for s in shape) for n, shape in symbolic.items()}

    def layer_prefix(self, layer: int) -> str:
        return self.table.layer_prefix.format(layer=layer)


_REGISTERED: dict[str, Table] = {}
# Entry points of installed packages; each is, or returns, a table's entries or the path of its file.
PLUGINS = "latentize.families"


def register_family(table: Mapping[str, Any] | Path) -> Table:
    """Make a family known to this process; it may replace one of the same name.

    Args:
        table: The entries of a table, or a JSON file with them.

    Raises:
        ConfigError: a key that no field is called by, or a file that is not JSON.
    """
    if isinstance(table, Path):
        try:
            table = json.loads(table.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"not a family table: {error}", where=str(table)) from error
    made = Table.from_dict(table)  # type: ignore[arg-type]
    _REGISTERED[made.model_type] = made
    return made


@lru_cache
def _installed() -> dict[str, Table]:
    folder = resources.files("latentize.families") / "tables"
    tables = [Table.from_dict(json.loads(f.read_text())) for f in folder.iterdir() if f.name.endswith(".json")]
    for plugin in metadata.entry_points(group=PLUGINS):
        found = plugin.load()
        found = found() if callable(found) else found
        tables.append(Table.from_dict(json.loads(found.read_text()) if isinstance(found, Path) else found))
    return {t.model_type: t for t in tables}


def families() -> dict[str, Table]:
    """All known tables by ``model_type``, in alphabetical order."""
    return dict(sorted({**_installed(), **_REGISTERED}.items()))


def _feature(key: Any, config: Mapping[str, Any]) -> Any:
    return config.get(key) if isinstance(key, str) else key


def _multiplier(table: Table, name: str, config: Mapping[str, Any]) -> float:
    key = table.multipliers.get(name)
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
    """RoPE from either generation of config: ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``.

    Raises:
        ConfigError: an entry that RoPE cannot be computed from.
        UnsupportedModelError: a scaling that cannot be converted.
    """
    try:
        spec = _rope_spec(config, head_dim)
        if all(0 < w < math.inf for w in (spec.theta, *spec.frequencies)):
            return spec
        reason = "its frequencies should be positive numbers"
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__} {error}"
    raise ConfigError(f"the entries of RoPE make no sense: {reason}", where="config.json, rope_parameters")


def _rope_spec(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    entries = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in entries:
        entries.setdefault("rope_type", entries.pop("type"))
    theta = entries.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    partial = entries.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if not 0 < partial <= 1:
        raise ValueError(f"partial_rotary_factor is {partial}")
    if entries.get("rope_type") == "llama3":
        entries.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if entries.get("rope_type", "default") == "default":
        entries = {}
    return RopeSpec(theta=float(theta), rotary_dim=int(head_dim * partial), scaling=entries)


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Apply the table of the config's family.

    Raises:
        UnsupportedModelError: unknown family, or a feature that conversion cannot keep.
        ConfigError: sizes that are missing or contradict each other.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("the file should hold one JSON object", where="config.json")
    model_type = config.get("model_type")
    table = families().get(str(model_type))
    for key, (meaning, code) in _UNSUPPORTED.items():
        if config.get(key):
            raise UnsupportedModelError(
                f"'{model_type}' cannot be converted: {meaning}", code=code, where=f"config.json, {key}"
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
    config = {**table.config_defaults, **config}
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
        raise ConfigError(
            f"heads of {head_dim} cannot be rotated: RoPE needs pairs", code="LZ121", where="config.json, head_dim"
        )
    feature = {name: _feature(key, config) for name, key in table.attention.items()}
    window = feature.get("sliding_window") if feature.get("sliding_window_switch", True) else None
    if window is not None:
        raise UnsupportedModelError(
            f"'{model_type}' with an active sliding window of {window} tokens cannot be converted",
            code="LZ205",
            where=f"config.json, {table.attention['sliding_window']}",
            fix="if the window was never meant to be active, set it to null",
        )
    types = config.get("layer_types") or []
    if others := sorted({str(t) for t in types} - {"full_attention"}) if isinstance(types, list) else [str(types)]:
        raise UnsupportedModelError(
            f"'{model_type}' with layers of '{others[0]}' cannot be converted",
            code="LZ205",
            where="config.json, layer_types",
        )
    eps = _positive(config, "rms_norm_eps", 1e-6)
    rope = rope_spec(config, head_dim)
    if rope.rotary_dim != head_dim:
        raise UnsupportedModelError(
            f"'{model_type}' with RoPE on a part of each head cannot be converted",
            code="LZ209",
            where="config.json, partial_rotary_factor",
        )
    attention = AttentionSpec(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        qkv_bias=bool(feature.get("qkv_bias")),
        o_bias=bool(feature.get("o_bias")),
        qk_norm=bool(feature.get("qk_norm")),
        norm_eps=eps,
        softmax_scale=float(feature.get("softmax_scale") or 0.0),
    )
    return ModelSpec(
        table=table,
        config=config,
        layers=_int(config, "num_hidden_layers"),
        attention=attention,
        intermediate_size=_int(config, "intermediate_size"),
        vocab_size=_int(config, "vocab_size"),
        norm_eps=eps,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_int(config, "max_position_embeddings", 2048),
        embedding_scale=_multiplier(table, "embedding", config),
        residual_scale=_multiplier(table, "residual", config),
        logit_scale=1 / _multiplier(table, "logits", config),
    )
