"""What :class:`~latentize.modeling.attention.LatentAttention` is made with, and holds, of a layer's weights.

Shape letters as in :mod:`latentize.attention.latent`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentize.attention.latent import LatentWeights
from latentize.attention.rope import table_places
from latentize.attention.spec import LongTable

__all__ = ["long_table", "options", "state_dict"]


def options(w: LatentWeights) -> dict[str, Any]:
    """What it is made with, beside the spec and where it stands."""
    return {
        "q_bias": w.q_rope_bias_HR is not None,
        "k_rope_bias": w.k_rope_bias_PR is not None,
        "v_bias": w.v_up_bias_UV is not None,
        "o_bias": w.o_bias_D is not None,
        "qk_norm": w.q_norm_R is not None,
        "qk_norm_across": w.q_norm_R is not None and w.q_norm_R.ndim == 2,
        "head_dim": 0 if w.q_HdD is None else w.q_HdD.shape[1],
        "key_dim": 0 if w.k_KeD is None else w.k_KeD.shape[1],
        "mirrored": w.q_mirror_HRd is not None,
        "gated": w.gate_HVD is not None,
        "sinks": w.sink_H is not None,
        "growth": w.growth,
        "growth_length": w.growth_length,
        "growth_first": w.growth_first,
        "norm_eps": w.norm_eps,
        "row_code": None if w.code is None else w.code.describe(),
    }


def long_table(w: LatentWeights, table: tuple[float, ...]) -> LongTable | None:
    """What a long text does to the entries of a table that the layer's frequencies are of."""
    if w.beyond is None:
        return None
    by_f = torch.zeros(len(table), dtype=torch.float64, device=w.frequencies_PF.device)
    by_f[table_places(w.frequencies_PF, table)] = w.beyond.by_hF.to(by_f)
    return LongTable(w.beyond.length, tuple(by_f.tolist()), w.beyond.stretch)


def state_dict(w: LatentWeights, frequency_table: tuple[float, ...]) -> dict[str, Tensor]:
    """Its tensors by name; the inverse of ``LatentAttention.weights``."""
    tensors: dict[str, Tensor | None] = {
        "q_proj.weight": torch.cat([w.q_nope_HND, w.q_rope_HRD], dim=1).flatten(0, 1),
        "kv_a_proj.weight": w.kv_a_rD,
        "k_rope_proj.weight": w.k_rope_PRD.flatten(0, 1),
        "kv_b_proj.weight": torch.cat([w.k_up_UNr, w.v_up_UVr], dim=1).flatten(0, 1),
        "o_proj.weight": w.o_DHV.flatten(1),
        "k_rope_proj.bias": None if w.k_rope_bias_PR is None else w.k_rope_bias_PR.flatten(),
        "o_proj.bias": w.o_bias_D,
        "sinks": w.sink_H,
        "head_gate.weight": None if w.gate_HVD is None else w.gate_HVD.flatten(0, 1),
        "q_norm": None if w.q_norm_R is None else w.q_norm_R.flatten(),
        "k_norm": None if w.k_norm_R is None else w.k_norm_R.flatten(),
        "rope_pairs": table_places(w.frequencies_PF, frequency_table).to(torch.int32),
    }
    if w.v_up_bias_UV is not None:
        none_UN = w.v_up_bias_UV.new_zeros(w.k_up_UNr.shape[:2])
        tensors["kv_b_proj.bias"] = torch.cat([none_UN, w.v_up_bias_UV], dim=1).flatten()
    if w.q_HdD is not None and w.k_KeD is not None:
        tensors |= {"q_maps": tensors["q_proj.weight"], "q_proj.weight": w.q_HdD.flatten(0, 1)}
        tensors |= {"k_norm_proj.weight": w.k_KeD.flatten(0, 1), "key_gain": w.key_gain_K}
    if w.q_mirror_HRd is not None:
        tensors["q_mirrors"] = w.q_mirror_HRd.flatten(0, 1)
    if w.code is not None:
        tensors |= {"row_latent_mix": w.code.latent_mix_rr, "row_mix": w.code.mix_JP2}
        tensors |= {"row_pairs": w.code.pair_J, "row_mean": w.code.mean_J2}
    if w.q_nope_bias_HN is not None and w.q_rope_bias_HR is not None:
        tensors["q_proj.bias"] = torch.cat([w.q_nope_bias_HN, w.q_rope_bias_HR], dim=1).flatten()
    return {name: t.contiguous() for name, t in tensors.items() if t is not None}
