"""The shape of models that have latent attention as they come.

There are no keys and values to convert; but what their cache weighs is arithmetic, and their rank can be lowered.

D hidden, H heads, r kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentize.attention.spec import LatentSpec, RopeSpec, kv_cache_bytes
from latentize.families.model import FULL
from latentize.families.table import MODULES

__all__ = ["DeltaLayers", "Indexer", "LatentExperts", "LatentModel"]


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
class Indexer:
    """What chooses the tokens that are attended to (DeepSeek-V3.2, arXiv 2512.02556).

    Attributes:
        layers: Layers that have one; others take what the last one chose.
        heads: Of its queries.
        head_dim: Of its queries and of its key, which is cached beside the latent.
        chosen: Tokens that are attended to at most.
    """

    layers: int
    heads: int
    head_dim: int
    chosen: int

    def parameters(self, hidden_size: int, q_lora_rank: int) -> int:
        """Of all layers: queries, the key and its norm, and a weight for each head."""
        key = (hidden_size + 2) * self.head_dim
        return self.layers * (q_lora_rank * self.heads * self.head_dim + key + hidden_size * self.heads)


@dataclass(frozen=True)
class DeltaLayers:
    """Layers of Kimi delta attention, which keep a state instead of a cache (Kimi Linear, arXiv 2510.26692).

    Attributes:
        numbers: Which.
        heads, head_dim: Of queries, keys and values.
        kernel: Tokens that the short convolution sees.
    """

    numbers: frozenset[int]
    heads: int
    head_dim: int
    kernel: int

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.numbers)

    def parameters(self, hidden_size: int) -> int:
        """Of all layers: projections, convolutions, gates, and the norm of what is read."""
        inner = self.heads * self.head_dim
        projections, convolutions = 4 * hidden_size * inner, 3 * inner * self.kernel
        gates = 2 * (hidden_size + inner) * self.head_dim + inner + self.heads + hidden_size * self.heads
        return self.layers * (projections + convolutions + gates + self.head_dim)


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
        indexer: What chooses tokens, or ``None``.
        delta: Layers without latent attention, or ``None``.
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
    indexer: Indexer | None = None
    delta: DeltaLayers | None = None

    kind = "MLA"
    # As in ModelSpec, for whatever runs layers.
    embedding_scale = residual_scale = logit_scale = 1.0
    logit_softcap, additive_masks = 0.0, False

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def kind_of(self, layer: int) -> str:
        """What a layer is, as transformers calls it."""
        return "linear_attention" if self.delta is not None and layer in self.delta.numbers else FULL

    def module(self, role: str) -> str:
        """As of :class:`latentize.families.ModelSpec`."""
        return MODULES[role]

    @property
    def attending(self) -> int:
        """Layers that have latent attention."""
        return self.layers - (0 if self.delta is None else self.delta.layers)

    @property
    def cache_values(self) -> int:
        """Cached values per token and layer with latent attention: the latent once, and the roped key."""
        return self.attention.cache_values

    @property
    def index_values(self) -> int:
        """Cached values per token beside them: keys of the index in all layers that have one."""
        return 0 if self.indexer is None else self.indexer.layers * self.indexer.head_dim

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
        """Of all layers, and of what takes the place of latent attention in some."""
        total = 0
        for shape in self.attention_shapes().values():
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
        total *= self.attending
        if self.indexer is not None:
            total += self.indexer.parameters(self.attention.hidden_size, self.q_lora_rank or 0)
        return total + (0 if self.delta is None else self.delta.parameters(self.attention.hidden_size))

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
        bytes_of_token = kv_cache_bytes(self.cache_values, layers=self.attending, tokens=1)
        others: dict[str, Any] = {}
        if self.delta is not None:
            others |= {"converted_layers": self.attending, "kept_layers": {"linear_attention": self.delta.layers}}
        if self.indexer is not None:
            others |= {"index_head_dim": self.indexer.head_dim, "index_layers": self.indexer.layers}
            others |= {"index_topk": self.indexer.chosen}
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
            "cache_bytes_per_token": bytes_of_token + kv_cache_bytes(self.index_values, layers=1, tokens=1),
            "parameters": self.parameters,
            **others,
        }
