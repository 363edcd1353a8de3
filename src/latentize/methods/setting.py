"""Every number that decides a conversion: a method with all that it leaves open."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from latentize.attention.spec import AttentionSpec
from latentize.recipe import Selection

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """Everything that decides a layer's conversion, but its weights.

    Attributes:
        method: ``calibrated``, ``transmla``, ``mha2mla`` or ``care``.
        kv_lora_rank: Size of the latent.
        qk_rope_head_dim: Size of a roped key.
        rope_heads: Roped keys: one, or one a kv head.
        freqfold: ``transmla``, ``care``.
        selection, svd: ``mha2mla``.
        damping: ``care``.
        stride: ``calibrated``: rungs of the ladder lie this many of the source's apart. Without one, each layer keeps
            the frequencies that serve it best, which only the native format holds.
        whole: ``calibrated``: every key keeps its head, its rotation and its norm, and nothing is compressed.
        linear: ``calibrated``: biases and per-head norms are replaced by the nearest linear projections.
        key_scales: ``calibrated``: so many norms of keys are kept beside a compressed key, and a factor of each is
            cached.
    """

    method: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    rope_heads: int = 1
    freqfold: int | None = None
    selection: Selection | None = None
    svd: str | None = None
    damping: float | None = None
    stride: float | None = None
    linear: bool = False
    whole: bool = False
    key_scales: int = 0

    @property
    def cache_values(self) -> int:
        return self.kv_lora_rank + self.rope_heads * self.qk_rope_head_dim + self.key_scales

    @property
    def frequencies_by_layer(self) -> bool:
        """Whether each layer keeps the frequencies that serve it best."""
        return self.stride is None and self.freqfold is None and self.selection is None

    def on_source_frequencies(self, spec: AttentionSpec) -> bool:
        """Whether all that rotates does so as something in the source did, up to biases and norms kept as they are."""
        if self.whole or self.freqfold is not None or self.selection is not None:
            return True
        whole = self.stride is None or (
            spec.rope.is_plain
            and float(self.stride).is_integer()
            and self.stride * self.qk_rope_head_dim <= spec.rope.rotary_dim
        )
        return whole and self.linear == (spec.qk_norm and not self.key_scales)

    def rope_theta(self, spec: AttentionSpec) -> float:
        """Base of the ladder that rotates the shared key, ``θ^(σ R / d)``, where ``d`` of a head rotate."""
        if self.stride is None:
            return spec.rope.theta
        return spec.rope.theta ** (self.stride * self.qk_rope_head_dim / spec.rope.rotary_dim)

    def approximations(self, spec: AttentionSpec) -> list[str]:
        """What of the source was replaced by the nearest that the format holds, before anything was compressed."""
        found = []
        if self.linear and spec.qk_norm:
            # Ladders are what portable formats need; the native one needs no fit where keys have no biases.
            better = "; --format native keeps it" if self.stride is not None and not spec.qkv_bias else ""
            found.append(f"normalisation of queries and keys is replaced by its best linear fit (approximate){better}")
        if self.linear and (spec.qkv_bias or spec.o_bias):
            found.append("biases are replaced by their best linear fit (approximate)")
        if self.stride is not None and not spec.rope.is_plain:
            found.append(f"'{spec.rope.rope_type}' RoPE is replaced by the nearest plain ladder (approximate)")
        return found

    def describe(self) -> dict[str, Any]:
        """The entries that mean something for this method."""
        entries = {k: v for k, v in asdict(self).items() if v is not None and v is not False}
        return {k: v for k, v in entries.items() if v or k != "key_scales"}
