"""Where the mean of the keys points, which is no part of coded rows (``attention.coding.RowCode.means``).

B batch, s rows, F pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from latentize.attention.coding import angles_at

__all__ = ["BLOCK_OF_CODES", "Means"]

# Rows in codes that are attended to at once: of fewer bytes than others, and by more calls.
BLOCK_OF_CODES = 16384


@dataclass(frozen=True)
class Means:
    """What turns the mean.

    Attributes:
        frequencies_F: Radians per position, float32.
        starts_B: Number of the row that each text begins with, int32.
        shared: The frequencies as numbers, where all texts begin with the first row: their angles are kept.
    """

    frequencies_F: Tensor
    starts_B: Tensor
    shared: tuple[float, ...] | None = None

    def at(self, numbers_Bs: Tensor) -> Tensor:
        """Cosines and sines at rows by their numbers, ``[B, s, 2 F]`` float32."""
        return angles_at(numbers_Bs - self.starts_B[:, None], self.frequencies_F)

    def from_row(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """The same for ``count`` rows from ``first`` on, ``[B, s, 2 F]``, or one for all sequences."""
        device, (block, within) = self.frequencies_F.device, divmod(first, BLOCK_OF_CODES)
        if self.shared is not None and within + count <= BLOCK_OF_CODES:
            return _of_block(self.shared, block, device, dtype)[None, within : within + count]
        return self.at(first + torch.arange(count, device=device)[None]).to(dtype)


@lru_cache(maxsize=256)
def _of_block(frequencies: tuple[float, ...], number: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """All layers of a model have the same."""
    with torch.inference_mode(False):
        position_s = BLOCK_OF_CODES * number + torch.arange(BLOCK_OF_CODES, device=device)
        return angles_at(position_s, torch.tensor(frequencies, dtype=torch.float32, device=device)).to(dtype)
