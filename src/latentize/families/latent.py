"""Models that have latent attention as they come: their shape, out of ``config.json``.

There are no keys and values to convert; but what their cache weighs is arithmetic, and their rank can be lowered.

D hidden, H heads, r kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentize.attention.spec import LatentSpec, RopeSpec, kv_cache_bytes
from latentize.errors import ConfigError
from latentize.families.table import MODULES

__all__ = ["LATENT_TYPES", "LatentExperts", "LatentModel", "is_latent", "latent_model"]

# Far above any model.
_LARGEST_HEAD = 1 << 16
# What transformers assumes for entries that config.json leaves out; held against its classes by a test.
LATENT_TYPES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **{"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 102_400, "max_position_embeddings": 2048, "tie_word_embeddings": False},
        **{"first_k_dense_replace": 0, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407},
    },
    "deepseek_v3": {
        **{"num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18_432, "num_attention_heads": 128},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 129_280, "max_position_embeddings": 4096, "tie_word_embeddings": False},
        **{"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048},
        **{"num_experts_per_tok": 8},
    },
    "glm4_moe_lite": {
        **{"num_hidden_layers": 47, "hidden_size": 2048, "intermediate_size": 10_240, "num_attention_heads": 20},
        **{"kv_lora_rank": 512, "q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64},
        **{"v_head_dim": 256, "vocab_size": 154_880, "max_position_embeddings": 202_752, "tie_word_embeddings": False},
        **{"n_routed_experts": 64, "n_shared_experts": 1, "moe_intermediate_size": 1536, "num_experts_per_tok": 4},
    },
    "youtu": {
        **{"num_hidden_layers": 32, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 128_256, "max_position_embeddings": 131_072, "tie_word_embeddings": True},
    },
    "minicpm3": {
        **{"num_hidden_layers": 62, "hidden_size": 2560, "intermediate_size": 6400, "num_attention_heads": 40},
        **{"kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
        **{"vocab_size": 73_448, "max_position_embeddings": 32_768, "tie_word_embeddings": True},
    },
}


@dataclass(frozen=True)
class LatentExperts:
    """The mixtures of experts of a model.

    Attributes:
        layers: Layers that have one; the others have a dense MLP.
        routed: Experts to choose from.
        per_token: That a token is sent to.
        shared: That every token goes through.
        intermediate_size: Of each.
    """

    layers: int
    routed: int
    per_token: int
    shared: int
    intermediate_size: int


@dataclass(frozen=True)
class LatentModel:
    """The shape of a model with latent attention.

    Attributes:
        model_type: As in ``config.json``.
        config: ``config.json``, defaults filled in.
        layers: Decoder layers.
        attention: Of every layer. Its softmax scale is that without YaRN's factor.
        q_lora_rank: Size of compressed queries, or ``None``.
        rope: How the shared key is rotated.
        intermediate_size: Of dense MLPs.
        experts: Mixtures of experts, or ``None``.
        vocab_size: Rows of the embedding.
        tied: Whether the output head is the embedding.
        max_positions: Context length that the model was made for.
        attention_bias: Whether the down-projections and the output projection have a bias.
    """

    model_type: str
    config: Mapping[str, Any]
    layers: int
    attention: LatentSpec
    q_lora_rank: int | None
    rope: RopeSpec
    intermediate_size: int
    experts: LatentExperts | None
    vocab_size: int
    tied: bool
    max_positions: int
    attention_bias: bool = False

    kind = "MLA"
    # As in ModelSpec, for whatever runs layers.
    embedding_scale = residual_scale = logit_scale = 1.0
    logit_softcap, additive_masks = 0.0, False

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def module(self, role: str) -> str:
        """As of :class:`latentize.families.ModelSpec`."""
        return MODULES[role]

    @property
    def cache_values(self) -> int:
        """Cached values per token and layer: the latent once, and the roped key."""
        return self.attention.cache_values

    @property
    def expanded_values(self) -> int:
        """The same where keys and values of every head are cached, as engines without latent attention do."""
        return self.attention.num_heads * (self.attention.qk_head_dim + self.attention.v_head_dim)

    def with_rank(self, rank: int) -> LatentModel:
        """The model with another ``kv_lora_rank``."""
        config = {**self.config, "kv_lora_rank": rank}
        return replace(self, config=config, attention=replace(self.attention, kv_lora_rank=rank))

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of a layer's attention, by name within it."""
        a, bias = self.attention, self.attention_bias
        q, rank = a.num_heads * a.qk_head_dim, a.kv_lora_rank
        shapes: dict[str, tuple[int, ...]] = {
            "kv_a_proj_with_mqa.weight": (rank + a.qk_rope_head_dim, a.hidden_size),
            "kv_a_layernorm.weight": (rank,),
            "kv_b_proj.weight": (a.num_heads * (a.qk_nope_head_dim + a.v_head_dim), rank),
            "o_proj.weight": (a.hidden_size, a.num_heads * a.v_head_dim),
        }
        if bias:
            shapes |= {"kv_a_proj_with_mqa.bias": (rank + a.qk_rope_head_dim,), "o_proj.bias": (a.hidden_size,)}
        if self.q_lora_rank is None:
            return {**shapes, "q_proj.weight": (q, a.hidden_size)}
        shapes |= {"q_a_proj.bias": (self.q_lora_rank,)} if bias else {}
        return {
            **shapes,
            "q_a_proj.weight": (self.q_lora_rank, a.hidden_size),
            "q_a_layernorm.weight": (self.q_lora_rank,),
            "q_b_proj.weight": (q, self.q_lora_rank),
        }

    @property
    def attention_parameters(self) -> int:
        """Of all layers."""
        total = 0
        for shape in self.attention_shapes().values():
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
        return self.layers * total

    @property
    def routed_parameters(self) -> int:
        """Of the experts that are chosen from, all layers."""
        e = self.experts
        return 0 if e is None else e.layers * e.routed * 3 * e.intermediate_size * self.attention.hidden_size

    @property
    def other_parameters(self) -> int:
        """Of everything but attention and routed experts; a tied embedding counts once."""
        e, hidden = self.experts, self.attention.hidden_size
        sparse = 0 if e is None else e.layers
        mlp = (self.layers - sparse) * 3 * self.intermediate_size * hidden
        if e is not None:
            mlp += sparse * (3 * e.shared * e.intermediate_size + e.routed) * hidden
        norms = (2 * self.layers + 1) * hidden
        return mlp + norms + self.vocab_size * hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.attention_parameters + self.routed_parameters + self.other_parameters

    def rank_within(self, keep: float) -> int:
        """The rank that keeps a share of the cached values; below one where the roped key alone has more."""
        return int(keep * self.cache_values + 1e-9) - self.attention.qk_rope_head_dim

    def describe(self) -> dict[str, Any]:
        """What the model is, for ``latentize inspect``."""
        a, e = self.attention, self.experts
        return {
            "model_type": self.model_type,
            "attention": self.kind,
            "layers": self.layers,
            "hidden_size": a.hidden_size,
            "num_attention_heads": a.num_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": a.kv_lora_rank,
            "qk_rope_head_dim": a.qk_rope_head_dim,
            "qk_nope_head_dim": a.qk_nope_head_dim,
            "v_head_dim": a.v_head_dim,
            "rope": self.rope.parameters(),
            "n_routed_experts": None if e is None else e.routed,
            "num_experts_per_tok": None if e is None else e.per_token,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_positions,
            "cache_values_per_token_layer": self.cache_values,
            "cache_bytes_per_token": kv_cache_bytes(self.cache_values, layers=self.layers, tokens=1),
            "parameters": self.parameters,
        }


def is_latent(config: Any) -> bool:
    """Whether a ``config.json`` is that of a model with latent attention that is known here."""
    return isinstance(config, Mapping) and str(config.get("model_type")) in LATENT_TYPES


def latent_model(config: Mapping[str, Any]) -> LatentModel:
    """The shape of a model with latent attention.

    Raises:
        ConfigError: sizes that are missing or make no sense.
    """
    model_type = str(config["model_type"])
    given = {key: value for key, value in config.items() if value is not None or key == "q_lora_rank"}
    config = {**LATENT_TYPES[model_type], **given}
    heads, rope = _size(config, "num_attention_heads"), _size(config, "qk_rope_head_dim")
    config.setdefault("v_head_dim", _size(config, "hidden_size") // heads)
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
    layers = _size(config, "num_hidden_layers")
    attention = LatentSpec(
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
    return LatentModel(
        model_type=model_type,
        config=config,
        layers=layers,
        attention=attention,
        q_lora_rank=None if config.get("q_lora_rank") is None else _size(config, "q_lora_rank"),
        rope=_rope(config, rope),
        intermediate_size=_size(config, "intermediate_size"),
        experts=_experts(config, layers),
        vocab_size=_size(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_size(config, "max_position_embeddings"),
        attention_bias=bool(config.get("attention_bias", False)),
    )


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
