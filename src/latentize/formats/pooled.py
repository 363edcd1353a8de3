"""The source's own format with fewer kv heads."""

from __future__ import annotations

from typing import Any

import torch

from latentize.formats.base import FormatWriter
from latentize.formats.layer import ConvertedLayer

__all__ = ["PooledWriter"]


class PooledWriter(FormatWriter):
    """Writes what the source is, with pooled keys and values."""

    kv_heads = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.table.model_type

    def layer(self, made: ConvertedLayer) -> None:
        w = made.grouped
        assert w is not None
        self.kv_heads = w.k_GdD.shape[0]
        weights = {"q_proj": w.q_HdD.flatten(0, 1), "k_proj": w.k_GdD.flatten(0, 1), "v_proj": w.v_GdD.flatten(0, 1)}
        if "self_attn.qkv_proj.weight" in made.stored:
            weights = {"qkv_proj": torch.cat(list(weights.values()))}
        # What reads a head that is zero is zero, too: heads that are pooled with it are not.
        weights["o_proj"] = w.o_DHd.flatten(1)
        changed = {f"self_attn.{name}.weight": weight for name, weight in weights.items()}
        biases = {"q_proj": w.q_bias_Hd, "k_proj": w.k_bias_Gd, "v_proj": w.v_bias_Gd}
        changed |= {f"self_attn.{name}.bias": bias.flatten() for name, bias in biases.items() if bias is not None}
        for name, tensor in (made.stored | changed).items():
            self._add(self.spec.layer_prefix(made.index) + name, tensor)

    def top(self) -> None:
        names = list(self.spec.table.top_tensors) + ([] if self.spec.tied else ["lm_head.weight"])
        for name in names:
            self._add(name, self.checkpoint.load(name))

    def config(self) -> dict[str, Any]:
        return {**self.spec.stated, "num_key_value_heads": self.kv_heads, "dtype": self._dtype_name()}
