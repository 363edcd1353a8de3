"""Fused attention for heads whose keys and values differ in size, as those of latent attention do.

PyTorch's fused operator on a CPU wants equal sizes, and leaves others to plain products over all scores.
Values that are filled up with zeros, and cut again, are the same attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["fuse"]

_NAME = "latentize_padded"


def _padded(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function."""
    size = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - size))
    heads_BTHd, weights = sdpa_attention_forward(module, query, key, padded, attention_mask, **more)
    return heads_BTHd[..., :size], weights


AttentionInterface.register(_NAME, _padded)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def fuse(model: Any) -> Any:
    """Let a loaded model with latents predict by fused attention on a CPU; its logits change by rounding only.

    Args:
        model: Any; left as it is where nothing is gained, or where it does not use PyTorch's attention.

    Returns:
        The same model.
    """
    config = model.config.get_text_config(decoder=True)
    key, value = (getattr(config, name, None) for name in ("qk_head_dim", "v_head_dim"))
    unequal = key is not None and value is not None and key > value
    if unequal and model.device.type == "cpu" and config._attn_implementation == "sdpa":
        for module in model.modules():
            if getattr(module, "config", None) is not None:
                module.config._attn_implementation = _NAME
    return model
