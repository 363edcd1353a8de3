"""What an attention layer is, what it becomes, and how many bytes either keeps per token.

Plain frozen values; no torch. Every size that appears elsewhere is derived here, once.

    MHA   G = H    every query head has its own key and value head
    GQA   1 < G < H
    MQA   G = 1
    MLA   one latent of ``kv_lora_rank`` values and ``rope_heads`` roped keys of ``qk_rope_head_dim``
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from latentize.errors import OptionError, UnsupportedModelError

__all__ = ["AttentionSpec", "LatentSpec", "LongTable", "RopeSpec", "kv_cache_bytes", "mean_over_layers"]


# Of a ramp whose ends are one pair.
_STEEP = 0.001
# RoPE whose frequencies are others in a long text.
_BY_LENGTH = ("longrope", "dynamic")


class LongTable(NamedTuple):
    """What a text that is longer than a table of frequencies is for does to each of them.

    Attributes:
        length: As :attr:`RopeSpec.length`.
        by: As :attr:`RopeSpec.beyond`, an entry of the table each.
        stretch: As :attr:`RopeSpec.stretch`.
    """

    length: int
    by: tuple[float, ...]
    stretch: float = 0.0


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of a layer (Su et al., arXiv 2104.09864).

    Pair ``f`` of a head turns by ``frequencies[f]`` radians per position.

    Attributes:
        theta: Base of the ladder ``theta ** (-2 f / rotary_dim)``.
        rotary_dim: Dimensions of a head that rotate, an even number. They are its first, or where the type is
            ``proportional`` (Gemma 4) the first of each of its halves.
        scaling: The remaining ``rope_parameters`` of transformers (``rope_type``, ``factor``, …).
    """

    theta: float
    rotary_dim: int
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rope_type(self) -> str:
        return str(self.scaling.get("rope_type", "default"))

    @property
    def is_plain(self) -> bool:
        """Whether ``theta`` alone describes the frequencies."""
        return self.rope_type == "default"

    @property
    def _ladder(self) -> list[float]:
        return [self.theta ** (-2 * f / self.rotary_dim) for f in range(self.rotary_dim // 2)]

    @property
    def length(self) -> int:
        """Tokens of the longest text that :attr:`frequencies` are for; 0 where they are for any."""
        return int(self.scaling["original_max_position_embeddings"]) if self.rope_type in _BY_LENGTH else 0

    @property
    def stretch(self) -> float:
        """The factor of dynamic NTK's scaling; 0 without it."""
        return float(self.scaling["factor"]) if self.rope_type == "dynamic" else 0.0

    @property
    def beyond(self) -> tuple[float, ...]:
        """What longer texts do to the frequencies, pair by pair; empty where they do nothing.

        LongRoPE (Ding et al., arXiv 2402.13753) has other frequencies for them, these. Dynamic NTK's scaling turns its
        base up with the text: a frequency is multiplied by ``s ** beyond``, ``s = stretch · tokens / length - stretch +
        1``. Either goes by the longest text of a batch, as transformers has it.
        """
        if self.rope_type == "longrope":
            return tuple(w / by for w, by in zip(self._ladder, self.scaling["long_factor"], strict=True))
        if self.rope_type == "dynamic":
            return tuple(-2 * f / (self.rotary_dim - 2) for f in range(self.rotary_dim // 2))
        return ()

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Radians per position, fastest first, ``rotary_dim / 2`` of them; see :attr:`length`.

        Raises:
            UnsupportedModelError: an unknown scaling.
        """
        ladder = self._ladder
        if self.rope_type in ("default", "dynamic"):
            return tuple(ladder)
        if self.rope_type == "longrope":
            return tuple(w / by for w, by in zip(ladder, self.scaling["short_factor"], strict=True))
        if self.rope_type in ("linear", "proportional"):
            return tuple(w / self.scaling["factor"] for w in ladder)
        if self.rope_type == "llama3":
            return tuple(self._llama3(w) for w in ladder)
        if self.rope_type == "yarn":
            return tuple(self._yarn(f, w) for f, w in enumerate(ladder))
        raise UnsupportedModelError(
            f"RoPE scaling of type '{self.rope_type}' is not supported",
            code="LZ208",
            where="config.json, rope_scaling or rope_parameters",
            fix="supported are default, linear, proportional, llama3, yarn, longrope and dynamic",
        )

    def at_length(self, tokens: int) -> tuple[float, ...]:
        """:attr:`frequencies` in a text of so many tokens."""
        if not self.length or tokens <= self.length:
            return self.frequencies
        if not self.stretch:
            return self.beyond
        s = self.stretch * tokens / self.length - self.stretch + 1
        return tuple(w * s**power for w, power in zip(self.frequencies, self.beyond, strict=True))

    def require_one_table(self) -> None:
        """That rows may be coded.

        Raises:
            OptionError: frequencies depend on the length of a text.
        """
        if self.length:
            raise OptionError(
                f"'{self.rope_type}' RoPE changes in texts of over {self.length:,} tokens, and so do means of keys, "
                f"which rows in codes leave out",
                where="--bytes", fix="use --keep, and a cache in int4",
            )  # fmt: skip

    def _llama3(self, w: float) -> float:
        """Llama 3.1's interpolation: slow frequencies are divided, fast ones kept, a ramp between."""
        s = self.scaling
        turns = s["original_max_position_embeddings"] * w / (2 * math.pi)
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        kept = min(1.0, max(0.0, ramp))
        return w * (kept + (1 - kept) / s["factor"])

    def _yarn(self, f: int, w: float) -> float:
        """YaRN's interpolation (Peng et al., arXiv 2309.00071, section 3.2): as Llama 3.1's, with a ramp over pairs."""
        s = self.scaling

        def pair_that_turns(often: float) -> float:
            """The pair, as a real number, that turns so often in the original context."""
            turns = s["original_max_position_embeddings"] / (2 * math.pi * often)
            return self.rotary_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = pair_that_turns(s.get("beta_fast") or 32), pair_that_turns(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        ramp = (f - low) / (high - low if high != low else _STEEP)
        kept = 1 - min(1.0, max(0.0, ramp))
        return w * (kept + (1 - kept) / s["factor"])

    @property
    def attention_factor(self) -> float:
        """Factor on what is rotated, queries and keys alike: YaRN's (equation 15 there) or LongRoPE's, 1 without."""
        s = self.scaling
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if s.get("attention_factor") is not None:
            return float(s["attention_factor"])
        if self.rope_type == "longrope":
            longer = max(1.0, float(s["factor"]))
            return math.sqrt(1 + math.log(longer) / math.log(s["original_max_position_embeddings"]))

        def scale(m: float) -> float:
            return 0.1 * m * math.log(s["factor"]) + 1 if s["factor"] > 1 else 1.0

        m, m_all = s.get("mscale"), s.get("mscale_all_dim")
        return scale(m) / scale(m_all) if m and m_all else scale(1.0)

    def parameters(self) -> dict[str, Any]:
        """The ``rope_parameters`` entry of a transformers config."""
        return {"rope_type": "default", **self.scaling, "rope_theta": self.theta}


@dataclass(frozen=True)
class AttentionSpec:
    """One layer of grouped-query attention; MHA and MQA are its extremes (Ainslie et al., arXiv 2305.13245).

    Attributes:
        hidden_size: Width ``D`` of the residual stream.
        num_heads: Query heads ``H``.
        num_kv_heads: Key/value heads ``G``, a divisor of ``H``.
        head_dim: Size ``d`` of a query, key or value head.
        rope: How queries and keys are rotated.
        qkv_bias: Whether the query, key and value projections have a bias.
        o_bias: Whether the output projection has one.
        qk_norm: Whether each query and key head is RMS-normalised before RoPE (Qwen3).
        qk_norm_across: Whether that is one norm over all heads together (OLMo 2).
        norm_after_rope: Whether it is after RoPE (Hunyuan): its weights differ within a pair.
        v_norm: Whether values are keys before RoPE, normalised without a weight (Gemma 4): one projection makes both.
        norm_eps: Epsilon of that norm.
        softmax_scale: Factor on the logits, ``d ** -0.5`` unless the family says otherwise.
        softcap: Logits are ``softcap · tanh(logits / softcap)`` (Gemma 2); 0 is not at all.
        rotates: Whether queries and keys are rotated at all; in SmolLM3 every fourth layer does without (NoPE).
        gated: Whether what a head reads is multiplied by the sigmoid of a projection of the input (Qwen3-Next).
        growth: Factor ``β`` by which queries grow along a text (Llama 4, Ministral 3); 0 is not at all.
        growth_length: Positions ``L`` after which they grow for the first time.
        growth_first: What the first position counts as: 1 in Llama 4.
        sinks: Whether each head has a learnt logit that takes a share of its attention, and gives nothing (gpt-oss).
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    qk_norm_across: bool = False
    norm_after_rope: bool = False
    v_norm: bool = False
    norm_eps: float = 1e-6
    softmax_scale: float = 0.0
    softcap: float = 0.0
    rotates: bool = True
    gated: bool = False
    sinks: bool = False
    growth: float = 0.0
    growth_length: float = 1.0
    growth_first: int = 0

    def __post_init__(self) -> None:
        if self.softmax_scale == 0.0:
            object.__setattr__(self, "softmax_scale", self.head_dim**-0.5)

    def require_codes(self) -> None:
        """That rows may be coded.

        Raises:
            OptionError: keys or values are not what rows in codes can hold.
        """
        self.rope.require_one_table()
        if self.norm_after_rope:
            raise OptionError(
                "norms of queries and keys are after RoPE, which rows in codes have no place for",
                where="--bytes", fix="use --keep, and a cache in int4",
            )  # fmt: skip
        if self.v_norm:
            raise OptionError(
                "values are normalised by a factor that differs from token to token, which rows in codes have none of",
                where="--bytes", fix="use --keep, and a cache in int4",
            )  # fmt: skip

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Radians per position of the ``d / 2`` pairs of a head; a pair that does not rotate turns by nothing."""
        return self._of_a_head(self.rope.frequencies)

    def at_length(self, tokens: int) -> tuple[float, ...]:
        """:attr:`frequencies` in a text of so many tokens."""
        return self._of_a_head(self.rope.at_length(tokens))

    @property
    def beyond(self) -> LongTable | None:
        """What a long text does to the frequencies of a head's pairs; ``None`` where it does nothing."""
        if not self.rotates or not self.rope.length:
            return None
        return LongTable(self.rope.length, self._of_a_head(self.rope.beyond), self.rope.stretch)

    def _of_a_head(self, by_pair: tuple[float, ...]) -> tuple[float, ...]:
        turning = by_pair if self.rotates else ()
        return turning + (0.0,) * (self.head_dim // 2 - len(turning))

    @property
    def rotates_whole(self) -> bool:
        """Whether every pair of a head rotates."""
        return self.rotates and self.rope.rotary_dim == self.head_dim

    @property
    def logit_factor(self) -> float:
        """What RoPE's factor on queries and keys is in ``softmax_scale``; 1 where it is on a part of them."""
        return self.rope.attention_factor**2 if self.rotates_whole else 1.0

    @property
    def group_size(self) -> int:
        """Query heads ``s`` that share a kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def key_norms(self) -> int:
        """Norms of a token's keys: one a kv head, or one over all of them."""
        return (1 if self.qk_norm_across else self.num_kv_heads) * self.qk_norm

    @property
    def kind(self) -> str:
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    @property
    def cache_values(self) -> int:
        """Cached values per token: a key and a value for each kv head."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentSpec:
    """One layer of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        hidden_size: Width ``D`` of the residual stream.
        num_heads: Query heads ``H``.
        kv_lora_rank: Size ``r`` of the latent, from which un-roped keys and all values are made.
        qk_rope_head_dim: Size ``d_R`` of a roped key.
        qk_nope_head_dim: Size ``d_N`` of the un-roped part of a head.
        v_head_dim: Size of a value head.
        rope_heads: Roped keys ``P``: DeepSeek shares one; MHA2MLA keeps one per kv head.
        up_heads: Distinct up-projections ``U`` (``H``, or ``G`` where heads of a group share them).
        softmax_scale: Factor on the logits.
        softcap: As in :class:`AttentionSpec`.
        key_scales: Norms of keys ``K`` that are kept beside a compressed key: one a kv head, or one for all. A factor
            of each is cached.
        scales_values: Whether values are multiplied by those factors, too.
    """

    hidden_size: int
    num_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope_heads: int
    up_heads: int
    softmax_scale: float
    softcap: float = 0.0
    key_scales: int = 0
    scales_values: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_values(self) -> int:
        """Cached values per token: the latent, once for keys and values together, the roped keys, and factors."""
        return self.kv_lora_rank + self.rope_heads * self.qk_rope_head_dim + self.key_scales


def kv_cache_bytes(cache_values: float, *, layers: int, tokens: int, batch: int = 1, bits: float = 16) -> int:
    """Bytes of a KV cache: ``cache_values`` per token and layer, keys and values counted in it once."""
    return round(cache_values * layers * tokens * batch * bits / 8)


def mean_over_layers(sizes: Sequence[int]) -> int | float:
    """The mean of what each layer has; a whole number where it is one, as it is where layers are alike."""
    total, layers = sum(sizes), len(sizes)
    return total / layers if total % layers else total // layers
