"""The portable format with experts that a softmax chooses: DeepSeek-V2's layout, for vLLM and llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from latentize.checkpoint.towers import NORMALISED
from latentize.families.values import value_of, whole_number
from latentize.formats.deepseek_v3 import DeepseekWriter
from latentize.formats.layer import ConvertedLayer

__all__ = ["DeepseekV2Writer"]

# Parts of names of a layer's tensors as Granite's class has them.
_RENAMED = {"block_sparse_moe.router.": "mlp.gate.", "block_sparse_moe.": "mlp."}


class DeepseekV2Writer(DeepseekWriter):
    """Writes a ``DeepseekV2ForCausalLM`` with the source's experts, which a softmax over all of them chooses.

    vLLM and llama.cpp read how they are weighted. transformers does not, and its class would weigh chosen experts by
    what all of them share. So where they share among each other, the config names a way to choose that it does not
    know, and it stops. What loads it there is :func:`latentize.modeling.load.load_model`.

    Each of them wants an expert that every token goes through. It is of zeros.
    """

    name = "deepseek_v2"

    def layer(self, made: ConvertedLayer) -> None:
        super().layer(replace(made, stored={_renamed(name): tensor for name, tensor in made.stored.items()}))
        experts, hidden = self.spec.table.experts, self.spec.attention.hidden_size
        assert experts is not None
        if not experts.in_layer(made.index, self.spec.config):
            return
        size, prefix = whole_number(self.spec.config, experts.intermediate), f"model.layers.{made.index}.mlp."
        for part, shape in {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}.items():
            self._add(f"{prefix}shared_experts.{part}_proj.weight", torch.zeros(shape))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "architectures": ["DeepseekV2ForCausalLM"], "model_type": self.name}

    def _experts(self) -> dict[str, Any]:
        spec, experts = self.spec, self.spec.table.experts
        assert experts is not None
        normalised = bool(value_of(experts.normalised, spec.config))
        return {
            "first_k_dense_replace": sum(not experts.in_layer(layer, spec.config) for layer in range(spec.layers)),
            "moe_intermediate_size": whole_number(spec.config, experts.intermediate),
            "n_routed_experts": spec.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": whole_number(spec.config, experts.chosen),
            "n_group": 1,
            "topk_group": 1,
            "scoring_func": "softmax",
            "topk_method": NORMALISED if normalised else "greedy",
            "norm_topk_prob": normalised,
            "routed_scaling_factor": 1.0,
        }


def _renamed(name: str) -> str:
    """As DeepSeek's checkpoints have it."""
    for part, own in _RENAMED.items():
        name = name.replace(part, own)
    return name
