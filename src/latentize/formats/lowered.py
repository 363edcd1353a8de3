"""The format of a model whose rank was lowered: its own. What has not changed is written as it was stored."""

from __future__ import annotations

from typing import Any

import torch

from latentize.checkpoint import Checkpoint, OutputFolder
from latentize.families import LatentModel, ModelSpec
from latentize.formats.base import FormatWriter
from latentize.formats.layer import ConvertedLayer
from latentize.modeling.latent_source import ATTENTION, layer_names

__all__ = ["LoweredWriter"]

# Code that came with the checkpoint is not copied, and transformers knows the type without it.
_LEFT_OUT = ("auto_map",)


class LoweredWriter(FormatWriter):
    """Writes a model of the source's type with another ``kv_lora_rank``.

    Args:
        folder: Where to.
        checkpoint: The source.
        spec: Its shape.
        dtype: Precision of its weights, which stays.
    """

    def __init__(
        self, folder: OutputFolder, checkpoint: Checkpoint, spec: ModelSpec | LatentModel, dtype: torch.dtype
    ) -> None:
        assert isinstance(spec, LatentModel)
        self.folder, self.checkpoint, self.latent, self.dtype = folder, checkpoint, spec, dtype
        self.name, self.rope_theta = spec.model_type, spec.rope.theta
        self.rank = spec.attention.kv_lora_rank

    def layer(self, made: ConvertedLayer) -> None:
        prefix = f"model.layers.{made.index}."
        if made.lowered:
            self.rank = len(made.lowered["kv_a_layernorm.weight"])
        for name, tensor in made.stored.items():
            changed = made.lowered.get(name.removeprefix(ATTENTION)) if name.startswith(ATTENTION) else None
            self.folder.add(prefix + name, (tensor if changed is None else changed).cpu())

    def no_more_layers(self) -> None:
        self.folder.make_room(self.checkpoint.size("model.embed_tokens.weight"))

    def top(self) -> None:
        inside = {name for layer in range(self.latent.layers) for name in layer_names(self.checkpoint, layer)}
        for name in self.checkpoint.names():
            if name not in inside and not name.startswith("model.layers."):
                self.folder.add(name, self.checkpoint.load(name))

    def config(self) -> dict[str, Any]:
        config = {key: value for key, value in self.checkpoint.config.items() if key not in _LEFT_OUT}
        config["kv_lora_rank"] = self.rank
        if predicts_further(self.checkpoint, self.latent):
            config["num_nextn_predict_layers"] = 0
        return config


def predicts_further(checkpoint: Checkpoint, model: LatentModel) -> bool:
    """Whether the files have layers beyond the model's that predict several tokens at once."""
    return checkpoint.count("model.layers.{layer}.") > model.layers
