"""The source's own format with fewer kv heads."""

from __future__ import annotations

from typing import Any

import torch

from latentize.attention.latent import LatentWeights
from latentize.convert.pipeline import LayerResult
from latentize.formats.base import FormatWriter

__all__ = ["PooledWriter"]


class PooledWriter(FormatWriter):
    """Writes what the source is, with pooled keys and values."""

    kv_heads = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.table.model_type

    def saved(self, result: LayerResult) -> LatentWeights:
        raise TypeError("pooled heads are not latent")

    def layer(self, result: LayerResult) -> None:
        w = result.grouped
        assert w is not None
        self.kv_heads = w.k_GdD.shape[0]
        k, v = w.k_GdD.flatten(0, 1), w.v_GdD.flatten(0, 1)
        changed = {"self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v}
        if "self_attn.qkv_proj.weight" in result.source.tensors:
            changed = {"self_attn.qkv_proj.weight": torch.cat([w.q_HdD.flatten(0, 1), k, v])}
        if w.k_bias_Gd is not None and w.v_bias_Gd is not None:
            changed |= {"self_attn.k_proj.bias": w.k_bias_Gd.flatten(), "self_attn.v_proj.bias": w.v_bias_Gd.flatten()}
        for name, tensor in (result.source.tensors | changed).items():
            self._add(self.spec.layer_prefix(result.index) + name, tensor)

    def top(self) -> None:
        names = list(self.spec.table.top_tensors) + ([] if self.spec.tied else ["lm_head.weight"])
        for name in names:
            self._add(name, self.checkpoint.load(name))

    def config(self) -> dict[str, Any]:
        return {**self.spec.stated, "num_key_value_heads": self.kv_heads, "dtype": self._dtype_name()}
