"""What a conversion multiplies in bfloat16: decided once, from the model, the machine and the request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

__all__ = ["Precision", "Use"]


class Use(Enum):
    """What a product is for."""

    MEASURED = auto()
    """Numbers that are reported."""
    STATISTICS = auto()
    """A closed form comes from it."""
    LEARNT = auto()
    """Steps are taken on it, or something is chosen by it."""


@dataclass(frozen=True)
class Precision:
    """Which products are in bfloat16; the residual stream is float32 in any case.

    Attributes:
        faster: Whether the machine multiplies bfloat16 faster than float32.
        large: Whether the model has so many parameters that everything does, where that is faster.
        hurried: Whether statistics do, too.
    """

    faster: bool = False
    large: bool = False
    hurried: bool = False

    @property
    def everything(self) -> bool:
        """Whether every product is."""
        return self.faster and self.large

    def narrow(self, use: Use) -> bool:
        """Whether products for this use are."""
        statistics = self.hurried and use is Use.STATISTICS
        return self.faster and (self.large or use is Use.LEARNT or statistics)
