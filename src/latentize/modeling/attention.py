"""Latent attention as a module: parameters under DeepSeek's names, fused prefill, absorbed decode.

It is called like the attention modules of transformers and can stand in their place in any decoder layer. It
imports nothing of transformers; a cache is anything with transformers' ``update(first, second, layer_idx)``.

Shape letters as in :mod:`latentize.attention.latent`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentize.attention.coding import Rounding, RowCode
from latentize.attention.grouped import grown, head_norm
from latentize.attention.latent import (
    LatentWeights,
    absorbed_heads,
    backwards,
    key_factors,
    turned,
)
from latentize.attention.projections import UpProjections, affine, matrix, up_projections
from latentize.attention.rope import Beyond, rope_angles
from latentize.attention.spec import LatentSpec, LongTable
from latentize.modeling.expanded import attend_expanded
from latentize.modeling.refusals import check_cache, no_paging, no_probabilities, unknown_mask
from latentize.modeling.rounded import codes_itself, rounded_heads
from latentize.modeling.tensors import long_table, options, state_dict

__all__ = ["LatentAttention"]


class LatentAttention(nn.Module):
    """One MLA layer.

    Args:
        spec: Its sizes.
        layer_idx: Which layer of the cache is its own.
        q_bias, k_rope_bias, v_bias, o_bias: Which projections have a bias.
        qk_norm: Per-head RMSNorm of queries and keys. Of the roped ones where the whole head is; else ``spec`` has
            ``key_scales``.
        qk_norm_across: Whether that is one norm over all heads.
        head_dim, key_dim: Sizes of what is normalised, queries and keys, where the spec has ``key_scales``.
        mirrored: Whether a part of queries rotates backwards, where the spec has ``key_scales``.
        gated: Whether what heads read is multiplied by the sigmoid of a projection of the input.
        sinks: Whether learnt logits take a share of attention.
        growth, growth_length, growth_first: As of ``AttentionSpec``.
        norm_eps: Epsilon of that norm.
        frequency_table: Radians per position that ``rope_pairs`` chooses from.
        beyond: What a long text does to that table.
        row_code: What :meth:`RowCode.describe` says of how rows are stored, where they are coded.

    Attributes:
        watch: Stands for the module's own code: sees all rows and their positions; for calibration.
        given_angles: Whether the angles of ``frequency_table`` that the decoder hands to every layer count (M-RoPE,
            where a token has three positions); else they are made of ``position_ids``.
    """

    rope_pairs: Tensor
    row_latent_mix: Tensor
    row_mix: Tensor
    row_pairs: Tensor
    row_mean: Tensor
    q_maps: nn.Parameter | None
    q_mirrors: nn.Parameter | None
    key_gain: nn.Parameter | None
    watch: Rounding | None = None
    given_angles = False

    def __init__(
        self,
        spec: LatentSpec,
        layer_idx: int = 0,
        *,
        q_bias: bool = False,
        k_rope_bias: bool = False,
        v_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        qk_norm_across: bool = False,
        head_dim: int = 0,
        key_dim: int = 0,
        mirrored: bool = False,
        gated: bool = False,
        sinks: bool = False,
        growth: float = 0.0,
        growth_length: float = 1.0,
        growth_first: int = 0,
        norm_eps: float = 1e-6,
        frequency_table: tuple[float, ...] = (),
        beyond: LongTable | None = None,
        row_code: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        s = spec
        self.spec, self.layer_idx, self.norm_eps = s, layer_idx, norm_eps
        self.frequency_table, self.beyond = frequency_table, beyond
        self.growth, self.growth_length, self.growth_first = growth, growth_length, growth_first
        self.head_dim = head_dim if s.key_scales else s.qk_head_dim
        self.q_proj = nn.Linear(s.hidden_size, s.num_heads * self.head_dim, bias=q_bias)
        self.kv_a_proj = nn.Linear(s.hidden_size, s.kv_lora_rank, bias=False)
        self.k_rope_proj = nn.Linear(s.hidden_size, s.rope_heads * s.qk_rope_head_dim, bias=k_rope_bias)
        self.kv_b_proj = nn.Linear(s.kv_lora_rank, s.up_heads * (s.qk_nope_head_dim + s.v_head_dim), bias=v_bias)
        self.o_proj = nn.Linear(s.num_heads * s.v_head_dim, s.hidden_size, bias=o_bias)
        self.qk_norm_across = qk_norm_across
        # Vectors, also where there is a row for each head: an optimiser of matrices should not take them for one.
        heads, keys = (s.num_heads, s.rope_heads) if qk_norm_across else (1, 1)
        self._normed = head_dim if s.key_scales else s.qk_rope_head_dim
        self.q_norm = nn.Parameter(torch.ones(heads * self._normed)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(keys * self._normed)) if qk_norm and not s.key_scales else None
        self.k_norm_proj, self.q_maps, self.q_mirrors, self.key_gain = None, None, None, None
        if s.key_scales:
            self.k_norm_proj = nn.Linear(s.hidden_size, s.key_scales * key_dim, bias=False)
            self.q_maps = nn.Parameter(torch.zeros(s.num_heads * s.qk_head_dim, head_dim))
            self.key_gain = nn.Parameter(torch.ones(s.key_scales))
            if mirrored:
                self.q_mirrors = nn.Parameter(torch.zeros(s.num_heads * s.qk_rope_head_dim, head_dim))
        self.head_gate = nn.Linear(s.hidden_size, s.num_heads * s.v_head_dim, bias=False) if gated else None
        self.sinks = nn.Parameter(torch.zeros(s.num_heads)) if sinks else None
        # An integer choice, not floats: loading in bf16 must not round a frequency.
        pairs = torch.zeros(s.rope_heads, s.qk_rope_head_dim // 2, dtype=torch.int32)
        self.register_buffer("rope_pairs", pairs)
        self._frequencies: Tensor | None = None
        self._beyond: Beyond | None = None
        self.row_code = row_code
        if row_code is not None:
            self.register_buffer("row_latent_mix", torch.zeros(s.kv_lora_rank, s.kv_lora_rank))
            self.register_buffer("row_mix", torch.zeros(pairs.numel(), s.rope_heads, 2))
            self.register_buffer("row_mean", torch.zeros(pairs.numel(), 2))
            self.register_buffer("row_pairs", torch.zeros(pairs.numel(), dtype=torch.int32))
        self._code: RowCode | None = None

    @classmethod
    def from_weights(
        cls, w: LatentWeights, layer_idx: int = 0, *, frequency_table: tuple[float, ...] | None = None
    ) -> LatentAttention:
        """A module that holds ``w``.

        Args:
            w: The weights; each frequency is one of ``frequency_table``.
            layer_idx: Which layer of the cache is its own.
            frequency_table: By default the distinct frequencies of ``w``.
        """
        table = frequency_table or tuple(sorted(set(w.frequencies_PF.flatten().tolist()), reverse=True))
        with torch.device("meta"):
            module = cls(w.spec, layer_idx, frequency_table=table, beyond=long_table(w, table), **options(w))
        module.load_state_dict(state_dict(w, table), assign=True)
        return module.requires_grad_(False)

    def frequencies(self, positions_BT: Tensor | None = None) -> Tensor:
        """Radians per position, ``[P, F]`` float32; the usual ones without positions."""
        if self._frequencies is None or self._frequencies.device != self.rope_pairs.device:
            self._frequencies = self._of_pairs(self.frequency_table)
            if (long := self.beyond) is not None:
                self._beyond = Beyond(long.length, self._of_pairs(long.by), long.stretch)
        if self._beyond is None or positions_BT is None:
            return self._frequencies
        return self._beyond.frequencies(self._frequencies, positions_BT)

    def _of_pairs(self, table: tuple[float, ...]) -> Tensor:
        device = self.rope_pairs.device
        return torch.tensor(table, dtype=torch.float32, device=device)[self.rope_pairs.long()]

    def code(self) -> RowCode | None:
        """How rows are stored, where they are coded."""
        if self.row_code is not None and (self._code is None or self._code.pair_J is not self.row_pairs):
            mixes = (self.row_latent_mix.float(), self.row_mix.float())
            tensors = (*mixes, self.row_pairs, self.row_mean.float(), self.frequencies()[0])
            self._code = RowCode.described(self.row_code, *tensors)
        return self._code

    def weights(self) -> LatentWeights:
        """The parameters, as views with named axes; adapters and whatever else wraps a projection count.

        Raises:
            UnsupportedModelError: LZ213, a projection does not say what it multiplies with.
        """
        s, nope = self.spec, self.spec.qk_nope_head_dim
        heads, ropes = (s.num_heads, self.head_dim), (s.rope_heads, s.qk_rope_head_dim)
        q, q_bias = affine(self.q_proj, s.hidden_size)
        k_rope, k_bias = affine(self.k_rope_proj, s.hidden_size)
        o, o_bias = affine(self.o_proj, s.num_heads * s.v_head_dim)
        q_HdD, q_bias_Hd = q.unflatten(0, heads), None if q_bias is None else q_bias.unflatten(0, heads)
        kv_b, kv_b_bias = affine(self.kv_b_proj, s.kv_lora_rank)
        kv_b_Udr = kv_b.unflatten(0, (s.up_heads, nope + s.v_head_dim))
        v_bias = None if kv_b_bias is None else kv_b_bias.unflatten(0, (s.up_heads, nope + s.v_head_dim))[:, nope:]
        own_HdD, k_KeD = None, None
        if self.k_norm_proj is not None and self.q_maps is not None:
            own_HdD, q_HdD = q_HdD, self.q_maps.unflatten(0, (s.num_heads, s.qk_head_dim))
            k_KeD = matrix(self.k_norm_proj, s.hidden_size).unflatten(0, (s.key_scales, -1))
        gate = None if self.head_gate is None else matrix(self.head_gate, s.hidden_size)
        return LatentWeights(
            q_nope_HND=q_HdD[:, :nope],
            q_rope_HRD=q_HdD[:, nope:],
            kv_a_rD=matrix(self.kv_a_proj, s.hidden_size),
            k_rope_PRD=k_rope.unflatten(0, ropes),
            k_up_UNr=kv_b_Udr[:, :nope],
            v_up_UVr=kv_b_Udr[:, nope:],
            o_DHV=o.unflatten(1, (s.num_heads, s.v_head_dim)),
            frequencies_PF=self.frequencies(),
            softmax_scale=s.softmax_scale,
            beyond=self._beyond,
            q_nope_bias_HN=None if q_bias_Hd is None else q_bias_Hd[:, :nope],
            q_rope_bias_HR=None if q_bias_Hd is None else q_bias_Hd[:, nope:],
            k_rope_bias_PR=None if k_bias is None else k_bias.unflatten(0, ropes),
            o_bias_D=o_bias,
            q_norm_R=self._norm(self.q_norm),
            k_norm_R=self._norm(self.k_norm),
            norm_eps=self.norm_eps,
            softcap=s.softcap,
            growth=self.growth,
            growth_length=self.growth_length,
            growth_first=self.growth_first,
            code=self.code(),
            q_HdD=own_HdD,
            q_mirror_HRd=self._mirrors(),
            k_KeD=k_KeD,
            key_gain_K=self.key_gain,
            gate_HVD=None if gate is None else gate.unflatten(0, (s.num_heads, s.v_head_dim)),
            v_up_bias_UV=v_bias,
            sink_H=self.sinks,
            scales_values=s.scales_values,
        )

    def _mirrors(self) -> Tensor | None:
        return None if self.q_mirrors is None else self.q_mirrors.unflatten(0, (self.spec.num_heads, -1))

    def _norm(self, weight: Tensor | None) -> Tensor | None:
        if weight is None or not self.qk_norm_across:
            return weight
        return weight.unflatten(0, (-1, self._normed))

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """Prefill expanded, decode (one new token) absorbed.

        Args:
            hidden_states: ``[B, T, D]``, normalised.
            position_ids: ``[B, T]`` or ``[1, T]``; by default they go on from what is cached.
            attention_mask: ``None`` (causal), boolean, or additive; ``[B, 1, T, S]``.
            past_key_values: transformers' cache, or one like it.
            layer_past: The same, as GPT-NeoX calls it.
            more: Of what transformers hands to every layer, ``output_attentions`` and a paged ``cache`` are refused.

        Returns:
            ``[B, T, D]`` and, in place of attention weights, ``None``.

        Raises:
            OptionError: a mask, a cache or a wish that latent attention has no answer to.
            UnsupportedModelError: LZ213, a projection does not say what it multiplies with.
        """
        if more.get("output_attentions"):
            raise no_probabilities()
        if more.get("cache") is not None:
            raise no_paging()
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4):
            raise unknown_mask(attention_mask)
        # An empty cache may be false.
        cache = layer_past if past_key_values is None else past_key_values
        angles = more.get("position_embeddings") if self.given_angles else None
        return self.o_proj(self.read(hidden_states, position_ids, attention_mask, cache, angles)), None

    def read(
        self,
        hidden_states: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What the output projection gets: ``[B, T, H V]``; arguments as for :meth:`forward`."""
        heads_BHTV = self._read(hidden_states, position_ids, attention_mask, cache, angles)
        read_BTI = heads_BHTV.transpose(1, 2).flatten(2)
        return read_BTI if self.head_gate is None else read_BTI * self.head_gate(hidden_states).sigmoid()

    def _read(
        self,
        hidden_states: Tensor,
        position_ids: Tensor | None,
        mask: Tensor | None,
        cache: Any,
        angles: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """``[B, H, T, V]``. Projections are called: whatever wraps them has its say."""
        s = self.spec
        if position_ids is None:
            first = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
            position_ids = first + torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        angles = self._angles(position_ids, angles)
        q_nope, q_rope = self._queries(hidden_states, position_ids, angles)
        c, k_rope = self._rows(hidden_states, angles)
        sizes = (s.kv_lora_rank, s.qk_nope_head_dim, s.v_head_dim)
        factors = (s.key_scales, self.sinks, s.scales_values)
        up = up_projections(self.kv_b_proj, sizes, s.softmax_scale, s.softcap, c, *factors)
        if cache is not None:
            check_cache(cache, self.layer_idx, c, k_rope)
        rounding, past = self.code() if self.watch is None else self.watch, 0
        coded = rounding is not None and codes_itself(cache, self.layer_idx, rounding, position_ids.expand(len(c), -1))
        if cache is not None:
            past = 0 if rounding is None else int(cache.get_seq_length(self.layer_idx))
            c, k_rope = cache.update(c, k_rope, self.layer_idx)
        if mask is None and hidden_states.shape[1] > 1 and isinstance(c, Tensor) and not coded:
            # A static cache has room beyond what was written.
            written = hidden_states.shape[1] if c.shape[2] == hidden_states.shape[1] else int(position_ids[0, -1]) + 1
            c, k_rope = c[:, :, :written], k_rope[:, :, :written]
        if not isinstance(c, Tensor) or rounding is None:
            return self.heads(q_nope, q_rope, c, k_rope, up, mask)
        if coded and cache is not None:
            mask = cache.layers[self.layer_idx].expanded_mask(mask, hidden_states.shape[1])
            return self.heads(q_nope, q_rope, c, k_rope, up, mask)
        count = past + hidden_states.shape[1]
        rows = (c[:, :, :count], k_rope[:, :, :count])
        mask = None if mask is None else mask[..., :count]
        return rounded_heads((q_nope, q_rope), rows, up, mask, rounding, position_ids, self.heads)

    def _angles(self, positions_BT: Tensor, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ``[B, P, T, F]``, of the layer's pairs; the decoder's are of all, twice side by side."""
        if given is None:
            return rope_angles(self.frequencies(positions_BT), positions_BT)
        pairs_PF, count = self.rope_pairs.long(), given[0].shape[-1] // 2
        # What does not turn comes after them in the table.
        beyond = (0, len(self.frequency_table) - count)
        cos_BTf, sin_BTf = (F.pad(t[..., :count], beyond, value=v) for t, v in zip(given, (1.0, 0.0), strict=True))
        return cos_BTf[..., pairs_PF].transpose(1, 2), sin_BTf[..., pairs_PF].transpose(1, 2)

    def _queries(self, x_BTD: Tensor, positions_BT: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """As :func:`latentize.attention.latent.queries`."""
        s, norm = self.spec, self._norm(self.q_norm)
        q_BHTd = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.q_maps is not None and norm is not None:
            maps_HRd = self.q_maps.unflatten(0, (s.num_heads, s.qk_head_dim))
            normed_BHTd = head_norm(q_BHTd, norm, self.norm_eps)
            q_BHTd, norm = normed_BHTd @ maps_HRd.mT, None
        q_nope, q_rope = q_BHTd.split([s.qk_nope_head_dim, s.qk_rope_head_dim], dim=-1)
        q_rope = turned(q_rope, norm, self.norm_eps, angles)
        if (mirrors_HRd := self._mirrors()) is not None:
            q_rope = q_rope + turned(normed_BHTd @ mirrors_HRd.mT, None, self.norm_eps, backwards(angles))
        growth = (positions_BT, self.growth, self.growth_length, self.growth_first)
        return grown(q_nope, *growth), grown(q_rope, *growth)

    def _rows(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """As :func:`latentize.attention.latent.cache_rows`."""
        s = self.spec
        k_rope = self.k_rope_proj(x_BTD).unflatten(-1, (-1, s.qk_rope_head_dim)).transpose(1, 2)
        k_rope = turned(k_rope, self._norm(self.k_norm), self.norm_eps, angles)
        if self.k_norm_proj is not None and self.key_gain is not None:
            k_BTKe = self.k_norm_proj(x_BTD).unflatten(-1, (s.key_scales, -1))
            k_rope = torch.cat([k_rope, key_factors(k_BTKe, self.key_gain, self.norm_eps).to(k_rope.dtype)], dim=-1)
        return self.kv_a_proj(x_BTD)[:, None], k_rope

    def heads(
        self, q_nope: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, up: UpProjections, mask: Tensor | None
    ) -> Tensor:
        """``[B, H, T, V]``: one token after others is decoded absorbed, everything else is expanded."""
        if q_nope.shape[2] == 1 and c.shape[2] > 1:
            return absorbed_heads(q_nope, q_rope, c, k_rope, _allowed(mask, q_nope), up)
        return attend_expanded(q_nope, q_rope, c, k_rope, up, mask)


def _allowed(mask: Tensor | None, like: Tensor) -> Tensor:
    """A boolean mask of any of transformers' kinds; one query without a mask sees everything."""
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=like.device)
    return mask if mask.dtype == torch.bool else mask == 0
