"""A checkpoint's shape: its family's table applied to its ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentize.attention.spec import AttentionSpec, LongTable
from latentize.families.table import Table
from latentize.families.values import value_of, whole_number

__all__ = ["FULL", "ModelSpec"]

# The kind of layer that is converted.
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


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
        window: Tokens that a sliding layer sees, or that a chunk has, where there are such layers.
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

    @property
    def kept_values(self) -> int:
        """Cached values per token of a layer with a sliding window, whose heads may be of other sizes."""
        if "kept_head_dim" not in self.config:
            return self.cache_values
        return 2 * self.config["kept_num_key_value_heads"] * self.config["kept_head_dim"]

    def kind(self, layer: int) -> str:
        return self.kinds[layer] if self.kinds else FULL

    @property
    def converted(self) -> list[int]:
        """Numbers of the layers that are converted."""
        return [layer for layer in range(self.layers) if self.kind(layer) == FULL]

    @property
    def sliding(self) -> int:
        """Layers with a sliding window, or in chunks; they stay, and cache no more than that."""
        return sum(self.kind(layer) in (SLIDING, CHUNKED) for layer in range(self.layers))

    def layer_attention(self, layer: int) -> AttentionSpec | None:
        """The attention of a layer; ``None`` where it stays as it is."""
        if self.kind(layer) != FULL:
            return None
        if layer not in self.unrotated:
            return self.attention
        # A factor on what is rotated is on nothing there.
        scale = self.attention.softmax_scale / self.attention.logit_factor
        return replace(self.attention, rotates=False, softmax_scale=scale)

    @property
    def additive_masks(self) -> bool:
        """Whether attention is written out in transformers, as no fused form bends logits or has sinks; its masks are
        added."""
        return "softcap" in self.table.attention or "sinks" in self.table.attention

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Radians per position of everything that is converted, fastest first, each once."""
        turning, still = self.attention.frequencies, (0.0,) if self.unrotated else ()
        return tuple(dict.fromkeys((*turning, *still)))

    @property
    def beyond(self) -> LongTable | None:
        """What a long text does to :attr:`frequencies`; ``None`` where it does nothing."""
        if (long := self.attention.beyond) is None:
            return None
        by = dict(zip(self.attention.frequencies, long.by, strict=True))
        return long._replace(by=tuple(by.get(frequency, 0.0) for frequency in self.frequencies))

    @property
    def usual_positions(self) -> int:
        """Positions at which frequencies are :attr:`frequencies`, of those that the model was trained for, and queries
        have not grown where transformers counts tokens for it, not positions."""
        a, longest = self.attention, self.max_positions
        grows = int(a.growth_length) - a.growth_first if a.growth and a.growth_first else longest
        return max(1, min(longest, a.rope.length or longest, grows))

    def tensor_shapes(self, *, stacked: bool = False) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must have, with its shape.

        Args:
            stacked: Whether it holds the experts of a layer in one tensor, as transformers' module does.
        """
        a, experts = self.attention, self.table.experts
        size = {
            "hidden": a.hidden_size,
            "q": a.num_heads * a.head_dim,
            "kv": a.num_kv_heads * a.head_dim,
            "head": a.head_dim,
            "intermediate": self.intermediate_size,
            "vocab": self.vocab_size,
            "one": 1,
        }
        for name, keys in self.table.sizes.items():
            size[name] = math.prod(whole_number(self.config, key) for key in keys.split("*"))
        if experts is not None:
            size |= {"experts": self.experts, "moe": whole_number(self.config, experts.intermediate)}
            if experts.shared:
                size["shared"] = size["moe"] * whole_number(self.config, experts.shared)
        symbolic = dict(self.table.top_tensors)
        if not self.tied:
            symbolic[self.table.module("head") + ".weight"] = ("vocab", "hidden")
        for layer in range(self.layers):
            prefix = self.layer_prefix(layer)
            symbolic |= {prefix + name: shape for name, shape in self._layer_tensors(layer, stacked)}
        # Fused projections are as wide as their parts together: "q+kv+kv".
        return {
            n: tuple(sum(_size(size, part) for part in s.split("+")) for s in shape) for n, shape in symbolic.items()
        }

    def _layer_tensors(self, layer: int, stacked: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
        table, kept = self.table, self.table.kept_tensors.get(self.kind(layer))
        found = dict(table.layer_tensors)
        for name, entry in table.optional_layer_tensors.items():
            if value_of(entry["when"], self.config):
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
        if stacked:
            yield from table.experts.in_one().items()
            return
        for expert in range(self.experts):
            yield from ((name.format(expert=expert), shape) for name, shape in table.experts.tensors.items())

    @property
    def experts(self) -> int:
        """Experts of a layer that has some."""
        if self.table.experts is None:
            return 0
        keys = self.table.experts.count
        return whole_number(self.config, next((key for key in keys if self.config.get(key) is not None), keys[0]))

    @property
    def active_experts(self) -> float:
        """Share of the experts that a token goes through."""
        experts = self.table.experts
        return 1.0 if experts is None else whole_number(self.config, experts.chosen) / self.experts

    def module(self, role: str) -> str:
        """What plays a role is called, see ``MODULES``."""
        return self.table.module(role)

    def layer_prefix(self, layer: int) -> str:
        return self.table.layer_prefix.format(layer=layer)


def _size(size: Mapping[str, int], part: str) -> int:
    """A size by name, or a multiple of one: ``3*hidden``."""
    times, _, name = part.rpartition("*")
    return int(times or 1) * size[name]
