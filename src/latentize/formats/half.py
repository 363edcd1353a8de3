"""What fp16 does to weights: it has 11 bits, and few exponents."""

from __future__ import annotations

from torch import Tensor

__all__ = ["FP16_ROUNDING", "lost_in_fp16"]

# Half a unit in the last place, relative: no normal number loses more.
FP16_ROUNDING = 2.0**-11


def lost_in_fp16(t: Tensor) -> float:
    """Root mean square error of rounding to fp16, relative to that of ``t``; infinite where it overflows.

    Numbers in the normal range lose at most :data:`FP16_ROUNDING`; a tensor that consists of smaller ones loses more.
    """
    exact = t.double()
    size = float(exact.square().sum())
    return (float((exact.half().double() - exact).square().sum()) / size) ** 0.5 if size else 0.0
