"""From the weights of a grouped-attention layer to those of a latent one.

A method is a way to split the keys (:mod:`rope_split`) and a way to compress what lost its rotation
(:mod:`low_rank`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.latent import LatentWeights
from latentize.attention.rope import Beyond, table_places
from latentize.attention.spec import AttentionSpec
from latentize.methods.norms import linear_heads, with_norms
from latentize.methods.position import linearised
from latentize.methods.registry import method_of
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats

__all__ = [
    "Conversion",
    "conversion",
    "convert_layer",
    "linear_fit",
]

# Points of a spectrum that a report shows.
_SHOWN = 64


@dataclass(frozen=True)
class Conversion:
    """A layer in closed form.

    Attributes:
        weights: float64. With nothing dropped and nothing compressed they compute what the source does.
        kept_pairs: Frequencies of the source that keep rotating, by number, fastest first; one entry a roped pair.
        rope_cost_F: Mean squared error of a head's logits if all components of a frequency lost their rotation;
            where distances were measured.
        energy_o: Of every direction that the latent could have, the kept ones first.
    """

    weights: LatentWeights
    kept_pairs: tuple[int, ...]
    rope_cost_F: Tensor | None
    energy_o: Tensor

    def describe(self) -> dict[str, Any]:
        """What a report shows of it, as plain values.

        ``spectrum`` is ``[number, share of all energy]`` of some directions, ``latent_energy`` the share kept.
        """
        share_o = self.energy_o / self.energy_o.sum().clamp_min(1e-300)
        rank = len(self.weights.kv_a_rD)
        some = range(0, len(share_o), -(-len(share_o) // _SHOWN))
        entries: dict[str, Any] = {
            "rope_kept": list(self.kept_pairs),
            "latent_energy": _rounded(float(share_o[:rank].sum())),
            "spectrum": [[i + 1, _rounded(float(share_o[i]))] for i in some],
        }
        if self.rope_cost_F is not None:
            entries["rope_cost"] = [_rounded(cost) for cost in self.rope_cost_F.tolist()]
        return entries


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def convert_layer(w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting) -> LatentWeights:
    """The weights of :func:`conversion`."""
    return conversion(w, spec, stats, setting).weights


def conversion(w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting) -> Conversion:
    """Convert one layer.

    Args:
        w: Its weights; factorised in float64 whatever they come in.
        spec: Its description.
        stats: Statistics of its inputs.
        setting: What to do.
    """
    source = w.to(torch.float64)
    w = linear_heads(source, stats, setting)
    method = method_of(setting)
    split = method.split(w, spec, stats, setting)
    factors = method.compress(split.k_nope_CD, w.v_GdD.flatten(0, 1), stats, setting)
    o_bias, v_bias = w.o_bias_D, w.v_bias_Gd if spec.sinks else None
    if w.v_bias_Gd is not None and not spec.sinks:
        # Probabilities sum to one: a constant on the values is a constant on the output.
        v_bias_Hd = w.v_bias_Gd.repeat_interleave(spec.group_size, dim=0)
        constant = torch.einsum("DHd,Hd->D", w.o_DHd, v_bias_Hd)
        o_bias = constant if o_bias is None else o_bias + constant
    weights = LatentWeights(
        q_nope_HND=split.q_nope_HND,
        q_rope_HRD=split.q_rope_HRD,
        kv_a_rD=factors.down_rD,
        k_rope_PRD=split.k_rope_PRD,
        k_up_UNr=split.read_UNC @ factors.k_up_Cr,
        v_up_UVr=factors.v_up_Er.unflatten(0, (spec.num_kv_heads, spec.head_dim)),
        o_DHV=w.o_DHd,
        frequencies_PF=split.frequencies_PF,
        softmax_scale=spec.softmax_scale,
        beyond=_beyond(spec, split.frequencies_PF),
        q_nope_bias_HN=split.q_nope_bias_HN,
        q_rope_bias_HR=split.q_rope_bias_HR,
        k_rope_bias_PR=split.k_rope_bias_PR,
        o_bias_D=o_bias,
        q_norm_R=w.q_norm_d,
        k_norm_R=w.k_norm_d,
        norm_eps=spec.norm_eps,
        softcap=spec.softcap,
        growth=spec.growth,
        growth_length=spec.growth_length,
        growth_first=spec.growth_first,
        gate_HVD=w.gate_HdD,
        v_up_bias_UV=v_bias,
        sink_H=w.sink_H,
    )
    if setting.key_scales:
        weights = with_norms(weights, source, w, spec)
    return Conversion(weights, split.kept_pairs, split.rope_cost_F, factors.energy_o)


def _beyond(spec: AttentionSpec, frequencies_PF: Tensor) -> Beyond | None:
    """What a long text does to frequencies that are some of the source's."""
    if (long := spec.beyond) is None:
        return None
    by_f = torch.tensor(long.by, dtype=torch.float64, device=frequencies_PF.device)
    return Beyond(long.length, by_f[table_places(frequencies_PF, spec.frequencies)], long.stretch)


def linear_fit(w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats) -> LatentWeights:
    """The layer without biases and per-head norms, and otherwise as it was: every key roped, no value compressed."""
    values = spec.num_kv_heads * spec.head_dim
    whole = Setting("mha2mla", min(values, spec.hidden_size), spec.head_dim, spec.num_kv_heads, selection="high")
    return convert_layer(linearised(w.to(torch.float64), stats), spec, stats, whole)
