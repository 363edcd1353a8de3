"""What the writers of all formats share: tensors that conversion does not touch pass through."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from latentize.attention.latent import LatentWeights
from latentize.checkpoint import Checkpoint, OutputFolder
from latentize.checkpoint.writer import NoFolder
from latentize.errors import FormatError
from latentize.families import ModelSpec
from latentize.formats.half import FP16_ROUNDING, lost_in_fp16
from latentize.formats.layer import ConvertedLayer

__all__ = ["FormatWriter", "LatentWriter"]

# Numbers of a tensor that is scaled which are there in float64 at once.
_WIDE_AT_ONCE = 1 << 20
# Rows of a tensor that are together held against fp16's range.
_ROWS_CHECKED = 4096


class FormatWriter(ABC):
    """Writes one converted model, layer by layer.

    Args:
        folder: Where to.
        checkpoint: The source.
        spec: Its description.
        dtype: Precision of the saved weights.
    """

    name: str

    def __init__(
        self, folder: OutputFolder | NoFolder, checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype
    ) -> None:
        self.folder, self.checkpoint, self.spec, self.dtype = folder, checkpoint, spec, dtype
        # Base of the roped key's frequencies; a method may choose another.
        self.rope_theta = spec.attention.rope.theta

    @abstractmethod
    def layer(self, made: ConvertedLayer) -> None:
        """Write the layer; nothing of it is needed any more."""

    def no_more_layers(self) -> None:
        """Write what has gathered if the embedding, which comes next, will not go into the same file."""
        embedding = self.checkpoint.shape(self.spec.module("embedding") + ".weight")
        self.folder.make_room(math.prod(embedding) * self.dtype.itemsize)

    @abstractmethod
    def top(self) -> None:
        """Write what lies outside the layers."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """``config.json`` of the output, once all layers are written."""

    def _add(self, name: str, tensor: Tensor, factor: float = 1.0, *, own: bool = False) -> None:
        """Write ``factor · tensor``, rounded once.

        Args:
            name: Of the tensor in the output.
            tensor: As it was read or made.
            factor: On it.
            own: Nobody else has it, and it may be overwritten: a large one need not be there twice.

        Raises:
            FormatError: it is to be fp16, and is not in that range.
        """
        if self.dtype == torch.float16 and tensor.dtype != torch.int32:
            self._check_fp16(name, tensor, factor)
        if factor != 1.0:
            scaled = tensor if own and tensor.dtype == self.dtype else torch.empty_like(tensor, dtype=self.dtype)
            for out, part in zip(_parts(scaled), _parts(tensor), strict=True):
                out.copy_(part.double() * factor)
            tensor = scaled
        kept = tensor if tensor.dtype == torch.int32 else tensor.to(self.dtype)
        self.folder.add(name, kept.cpu())

    def _check_fp16(self, name: str, tensor: Tensor, factor: float) -> None:
        lost = max(lost_in_fp16(part.double() * factor) for part in tensor.split(_ROWS_CHECKED))
        if not lost <= FP16_ROUNDING:
            raise FormatError(
                f"the weights are outside of fp16's normal range: {lost:.1%} of them would be lost",
                where=f"--dtype float16, tensor {name}",
                fix="use bfloat16 or float32",
            )

    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class LatentWriter(FormatWriter):
    """Writes a model whose attention has become latent.

    Attributes:
        suited: Whether rows already have the axes and the size that they are to have.
        padded: Heads, and un-roped and value dimensions of each, zeros included; ``None`` is as they come.
    """

    suited = False
    padded: tuple[int, int, int] | None = None

    def oriented(self, w: LatentWeights, index: int) -> LatentWeights:
        """The same layer in the axes that it is to be written in, where it computes the same in any: as they come."""
        return w

    @abstractmethod
    def saved(self, made: ConvertedLayer) -> LatentWeights:
        """The weights of the layer as they will be when they are loaded again, in float32."""


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of some rows each."""
    return tensor.split(max(1, _WIDE_AT_ONCE * len(tensor) // tensor.numel()))
