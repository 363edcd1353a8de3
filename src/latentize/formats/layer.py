"""What a conversion hands to a writer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.latent import LatentWeights

__all__ = ["ConvertedLayer"]


@dataclass
class ConvertedLayer:
    """One layer of a converted model; with nothing but ``stored`` it stays as it is.

    Attributes:
        index: Its number.
        stored: All tensors of the source's layer, in the stored precision, by name without the layer's prefix.
        latent: MLA weights that take the place of the attention, or ``None``.
        latent_rms: Largest and mean root mean square of a token's latent on the calibration text.
        grouped: Pooled heads that take its place, or ``None``.
        lowered: Tensors of a latent attention that change with its rank, by name within the attention.
    """

    index: int
    stored: dict[str, Tensor]
    latent: LatentWeights | None = None
    latent_rms: tuple[float, float] = (0.0, 0.0)
    grouped: AttentionWeights | None = None
    lowered: dict[str, Tensor] = field(default_factory=dict)
