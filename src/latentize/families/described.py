"""What a model is, in plain values."""

from __future__ import annotations

from typing import Any

from latentize.attention.spec import kv_cache_bytes
from latentize.families.latent import LatentModel
from latentize.families.model import FULL, ModelSpec

__all__ = ["described"]


def described(model: ModelSpec | LatentModel) -> dict[str, Any]:
    """What a model is, for ``latentize inspect``."""
    if isinstance(model, LatentModel):
        return model.describe()
    a = model.attention
    return {
        "model_type": model.table.model_type,
        "attention": a.kind,
        "layers": model.layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        # Nothing of what is converted may rotate.
        "rope": a.rope.parameters() if a.rotates else None,
        "qkv_bias": a.qkv_bias,
        "qk_norm": a.qk_norm,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": model.max_positions,
        "cache_values_per_token_layer": a.cache_values,
        "cache_bytes_per_token": kv_cache_bytes(a.cache_values, layers=len(model.converted), tokens=1),
        **_mixed(model),
    }


def _mixed(model: ModelSpec) -> dict[str, Any]:
    """Which layers stay as they are, where some do."""
    if not model.kinds:
        return {}
    kinds = [model.kind(layer) for layer in range(model.layers)]
    others = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds) if kind != FULL}
    return {"converted_layers": len(model.converted), "kept_layers": others, "sliding_window": model.window}
