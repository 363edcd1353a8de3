"""The native format: the source's own architecture with its attention replaced.

It holds what the portable format cannot: a roped key for each kv head, biases, per-head norms, any frequencies. What
loads it is :mod:`latentize.modeling.native`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from latentize.attention.coding import RowCode
from latentize.attention.latent import LatentWeights
from latentize.families.model import CHUNKED
from latentize.formats.base import LatentWriter
from latentize.formats.layer import ConvertedLayer
from latentize.modeling.attention import LatentAttention
from latentize.modeling.tensors import options, state_dict

__all__ = ["NativeWriter", "layer_entry"]


# Entries that every layer has; others only where they are not what they are without.
_ALWAYS = ("q_bias", "k_rope_bias", "o_bias", "qk_norm", "qk_norm_across", "norm_eps")


def layer_entry(w: LatentWeights) -> dict[str, Any]:
    """The description of a layer from which an empty one can be built."""
    entries, usual = {**vars(w.spec), **options(w)}, inspect.signature(LatentAttention).parameters
    usual = {"key_scales": 0, "scales_values": False, **{name: parameter.default for name, parameter in usual.items()}}
    return {name: value for name, value in entries.items() if name in _ALWAYS or value != usual.get(name, ...)}


class NativeWriter(LatentWriter):
    """Writes the native format.

    Attributes:
        row_codes: How rows of the layers that were written are stored, where they are coded, by the layers' numbers.
    """

    name = "native"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._entries: list[dict[str, Any] | None] = []
        self.row_codes: dict[int, RowCode] = {}
        self._table = self.spec.frequencies
        self._packed = False

    def saved(self, made: ConvertedLayer) -> LatentWeights:
        assert made.latent is not None
        return made.latent.to(self.dtype).to(torch.float32)

    def layer(self, made: ConvertedLayer) -> None:
        place, latent = self.spec.layer_prefix(made.index), made.latent
        prefix = "source." + place
        attention = self.spec.module("attention") + "."
        if latent is not None:
            for name, tensor in state_dict(latent, self._table).items():
                self._add(prefix + attention + name, tensor)
        for name, tensor in made.stored.items():
            if latent is None or not name.startswith(attention):
                self._keep(place + name, tensor)
        if latent is not None and latent.code is not None:
            self.row_codes[made.index] = latent.code
        self._entries.append(None if latent is None else layer_entry(latent))

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """What is the source's: as it is quantised there, where transformers reads that anywhere."""
        packed = self.checkpoint.packed(name)
        for part, stored in packed.items():
            self.folder.add("source." + part, stored)
        if not packed:
            self._add("source." + name, tensor)
        self._packed |= bool(packed)

    def top(self) -> None:
        for name in self.spec.table.top_tensors:
            self._add("source." + name, self.checkpoint.load(name))
        if not self.spec.tied:
            # Whatever it is called in the files.
            self._add("source.lm_head.weight", self.checkpoint.load(self.spec.module("head") + ".weight"))
        for name, tensor in self.checkpoint.carried():
            self.folder.add(name, tensor)

    def config(self) -> dict[str, Any]:
        source, spec = dict(self.spec.stated), self.spec
        return {
            "architectures": ["LatentizeForCausalLM"],
            "model_type": "latentize",
            "dtype": self._dtype_name(),
            # Caches are made by these.
            **({"layer_types": list(spec.kinds), "sliding_window": spec.window} if spec.kinds else {}),
            **({"attention_chunk_size": spec.window} if CHUNKED in spec.kinds else {}),
            "source_config": source,
            "latent_layers": self._entries,
            "frequency_table": list(self._table),
            **self._quantization(),
            **({} if self.checkpoint.whole is None else {"whole_config": dict(self.checkpoint.whole)}),
        }

    def _quantization(self) -> dict[str, Any]:
        """What transformers has to know of weights that stay quantised."""
        if not self._packed:
            return {}
        assert self.checkpoint.quantization is not None
        return {"quantization_config": {"quant_method": self.checkpoint.quantization["format"]}}
