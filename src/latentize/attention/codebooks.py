"""Codebooks: several values of a Gaussian as one index.

Of all ways to say ``b`` bits about each of many Gaussian values, one value at a time is the worst. The best levels for
one value lose 4.35 dB to the bound at high rates, points in the plane 3.0 dB, in four dimensions 2.1 dB (Zador, IEEE
Trans. Inf. Theory 28, 1982), and an index is looked up all the same. So four values of two or three bits, two of four
to six, and eight of one share an index, of at most twelve bits. ``benchmarks/codebooks.py`` makes them.

n vectors, v values of a vector, k words, c cells, m words that a cell knows.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["VALUES_AT_ONCE", "Codebook", "codebook", "words"]

# Values that share an index, by the bits of each.
VALUES_AT_ONCE = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 8: 1}
# Cells that a vector is looked up by, how wide they spread in standard deviations, and how many words each knows: with
# these no codebook loses more than a hundredth to trying all words (``benchmarks/codebooks.py``).
_CELLS, _SPREAD, _KNOWN = 1 << 14, 1.8, 16
# Vectors that are looked up at once: what the cells know of them stays in the cache of a core.
_AT_ONCE = 1 << 14


class Codebook:
    """Words, and how the nearest is found.

    Each axis is cut into intervals, so that vectors fall into cells, and each cell knows the words that are nearest to
    its middle. Only those are tried.

    Args:
        words_kv: In standard deviations.
    """

    def __init__(self, words_kv: Tensor) -> None:
        self.words_kv = words_kv.float()

    @property
    def values(self) -> int:
        """Values that share an index."""
        return self.words_kv.shape[1]

    @cached_property
    def _intervals(self) -> int:
        """Of each axis."""
        return int(_CELLS ** (1 / self.values) + 1e-6)

    @cached_property
    def _edges(self) -> Tensor:
        """Between the intervals of an axis."""
        inner = torch.arange(1, self._intervals, device=self.words_kv.device) / self._intervals
        return _SPREAD * torch.special.ndtri(inner)

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor]:
        """What each cell knows: numbers of words, ``[c, m]``; half their squares and the words, ``[c, v + 1, m]``."""
        device, count = self.words_kv.device, min(_KNOWN, len(self.words_kv))
        middle = _SPREAD * torch.special.ndtri((torch.arange(self._intervals, device=device) + 0.5) / self._intervals)
        middle_cv = torch.cartesian_prod(*[middle] * self.values).view(-1, self.values)
        half_k = self.words_kv.square().sum(1) / 2
        parts = [
            torch.addmm(-half_k, part_cv, self.words_kv.T).topk(count).indices for part_cv in middle_cv.split(2048)
        ]
        index_cm = torch.cat(parts)
        with_half_kv = torch.cat([half_k[:, None], self.words_kv], dim=1)
        return index_cm.to(torch.int32), with_half_kv[index_cm].mT.contiguous()

    def nearest(self, x_nv: Tensor) -> Tensor:
        """The numbers of the nearest words, ``[n]`` int32."""
        index_cm, known_cvm = self._known
        places_v = self._intervals ** torch.arange(self.values - 1, -1, -1, device=x_nv.device)
        found = []
        for part_nv in x_nv.float().contiguous().split(_AT_ONCE):
            cell_n = (torch.bucketize(part_nv, self._edges) * places_v).sum(1)
            half_nm, *words = known_cvm.index_select(0, cell_n).unbind(1)
            # The largest product, less half of the word's square, is the least distance. Value by value: a vector's
            # word must not depend on which others are looked up with it.
            score_nm = half_nm.neg()
            for x_n1, word_nm in zip(part_nv.split(1, dim=1), words, strict=True):
                score_nm.addcmul_(x_n1, word_nm)
            found.append(index_cm[cell_n, score_nm.argmax(1)])
        return torch.cat(found)


def words(bits: int) -> Tensor:
    """The words for values of so many bits, ``[2^(bits · v), v]`` float16, in standard deviations."""
    with safe_open(Path(__file__).with_name("codebooks.safetensors"), framework="pt") as file:
        return file.get_tensor(str(bits))


@lru_cache(maxsize=64)
def codebook(bits: int, device: torch.device) -> Codebook:
    """The codebook for values of so many bits."""
    # Not an inference tensor: training looks things up in it, too.
    with torch.inference_mode(False):
        return Codebook(words(bits).to(device))
