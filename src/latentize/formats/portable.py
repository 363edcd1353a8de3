"""What DeepSeek's layout has no place for."""

from __future__ import annotations

from latentize.families import ModelSpec
from latentize.families.model import FULL
from latentize.methods.setting import Setting

__all__ = ["PORTABLE", "expert_reasons", "model_reasons", "portable_reasons"]

# ``model_type`` of what latentize writes in DeepSeek's layout.
PORTABLE = ("deepseek_v2", "deepseek_v3")


def expert_reasons(model: ModelSpec, layout: str = "deepseek_v3") -> list[str]:
    """Why a layout of DeepSeek's has no place for a model's experts; empty if it has."""
    experts = model.table.experts
    if layout == "deepseek_v3":
        other = experts is not None and not experts.deepseek
        return ["experts that are not chosen, or not made, as DeepSeek-V3's are"] if other else []
    if experts is None or experts.normalised is None:
        return ["no experts that are chosen by softmax, or others beside them"]
    has = [experts.in_layer(layer, model.config) for layer in range(model.layers)]
    return [] if has == sorted(has) and has[-1] else ["layers without experts that are not the first ones"]


def model_reasons(model: ModelSpec, layout: str = "deepseek_v3") -> list[str]:
    """Why a portable format cannot hold a model however it is converted, but for its attention; empty if it can."""
    reasons = [*model.table.native_only, *expert_reasons(model, layout)]
    if model.kinds:
        kept = next(kind for kind in model.kinds if kind != FULL)
        reasons.append(f"layers of '{kept}' stay as they are, in DeepSeek's layout all are latent")
    if model.attention.softcap or model.logit_softcap:
        reasons.append("logits are soft-capped, DeepSeek's are not")
    if model.config.get("mlp_bias"):
        reasons.append("the MLP has biases, DeepSeek's has none")
    return reasons


def portable_reasons(model: ModelSpec, setting: Setting, layout: str = "deepseek_v3") -> list[str]:
    """Why a portable format cannot hold a model converted in this way; empty if it can."""
    a, reasons = model.attention, model_reasons(model, layout)
    if not (a.rotates_whole and not model.unrotated) and setting.stride is None:
        reasons.append("RoPE does not cover all of the keys, DeepSeek's ladder would")
    if setting.rope_heads > 1:
        reasons.append(f"the method keeps {setting.rope_heads} roped keys (one a kv head), DeepSeek's layout has one")
    elif setting.selection is not None and setting.qk_rope_head_dim == a.head_dim:
        reasons.append("the method leaves no un-roped part, DeepSeek's layout needs one")
    elif setting.selection not in (None, "uniform"):
        reasons.append(f"'{setting.selection}' selection leaves frequencies that are not one ladder")
    if setting.frequencies_by_layer:
        reasons.append("each layer keeps frequencies of its own, DeepSeek's layout has one ladder for all")
    if (a.qkv_bias or a.o_bias) and not setting.linear:
        reasons.append("the attention has biases, DeepSeek's layout has none")
    if a.qk_norm and not setting.linear:
        reasons.append("queries and keys are normalised per head, which is not linear")
    if a.growth:
        reasons.append("queries grow along a text, DeepSeek's do not")
    if a.sinks:
        reasons.append("learnt sinks take a share of attention, DeepSeek's has none")
    if a.gated:
        reasons.append("what heads read is gated, DeepSeek's is not")
    if a.rope.length:
        reasons.append(f"RoPE changes in texts of more than {a.rope.length:,} tokens, DeepSeek's does not")
    if not a.rope.is_plain and setting.stride is None:
        reasons.append(f"RoPE is scaled ('{a.rope.rope_type}'), which engines read in different ways")
    return reasons
