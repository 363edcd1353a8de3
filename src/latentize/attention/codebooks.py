"""Codebooks: several values of a Gaussian as one index.

Of all ways to say ``b`` bits about each of many Gaussian values, one value at a time is the worst. The best levels for
one value lose 4.35 dB to the bound at high rates, points in the plane 3.0 dB, in four dimensions 2.1 dB (Zador, IEEE
Trans. Inf. Theory 28, 1982), and an index is looked up all the same. So four values of two or three bits, two of four
to six, and eight of one share an index, of at most twelve bits. ``benchmarks/codebooks.py`` makes them.

n vectors, v values of a vector, k words, c cells, m words that a cell knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["VALUES_AT_ONCE", "Codebook", "Finder", "codebook", "finder", "words"]

# Values that share an index, by the bits of each.
VALUES_AT_ONCE = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 8: 1}
# Cells that a vector is looked up by, how wide they spread in standard deviations, and how many words each knows: with
# these no codebook loses more than a hundredth to trying all words (``benchmarks/codebooks.py``).
_CELLS, _SPREAD, _KNOWN = 1 << 14, 1.8, 16
# Vectors that are looked up at once: what the cells know of them stays in the cache of a core.
_AT_ONCE = 1 << 14


class Finder:
    """Finds the nearest words, in one of several codebooks for each vector.

    Each axis is cut into intervals, so that vectors fall into cells, and each cell knows the words that are nearest to
    its middle. Only those are tried.

    Args:
        books: Words of each, ``[k, v]`` float32, in standard deviations; ``v`` is the same for all.
    """

    def __init__(self, books: Sequence[Tensor]) -> None:
        self.values, device = books[0].shape[1], books[0].device
        # Of each axis.
        self._intervals = int(_CELLS ** (1 / self.values) + 1e-6)
        number_i = torch.arange(self._intervals, dtype=torch.float32, device=device)
        self._middles = _SPREAD * torch.special.ndtri((number_i + 0.5) / self._intervals)
        # Exact in float32: there are fewer cells than it has whole numbers.
        self._places_v = self._intervals ** torch.arange(self.values - 1, -1, -1, dtype=torch.float32, device=device)
        known = [self._known(words_kv) for words_kv in books]
        # What each cell knows, one book after the other: numbers of words, [c, m]; half their squares and the words,
        # [c, v + 1, m].
        self._index_cm, self._words_cvm = (torch.cat(parts) for parts in zip(*known, strict=True))

    @property
    def cells(self) -> int:
        """Of one book."""
        return self._intervals**self.values

    def _known(self, words_kv: Tensor) -> tuple[Tensor, Tensor]:
        count = min(_KNOWN, len(words_kv))
        middle_cv = torch.cartesian_prod(*[self._middles] * self.values).view(-1, self.values)
        half_k = words_kv.square().sum(1) / 2
        # So few at a time that distances to all words stay in the cache of a core.
        parts = [torch.addmm(-half_k, part_cv, words_kv.T).topk(count).indices for part_cv in middle_cv.split(256)]
        index_cm = torch.cat(parts)
        with_half_kv = torch.cat([half_k[:, None], words_kv], dim=1)
        return index_cm.to(torch.int32), with_half_kv[index_cm].mT.contiguous()

    def _cells_of(self, x_nv: Tensor) -> Tensor:
        """The cells that vectors fall into, ``[n]`` int64: intervals hold equal shares of a wider Gaussian."""
        number_nv = torch.special.ndtr(x_nv / _SPREAD).mul_(self._intervals).floor_().clamp_(max=self._intervals - 1)
        # What is not a number is nowhere; its word is of no use in any case.
        return number_nv.mul_(self._places_v).sum(1).nan_to_num_(0.0).long()

    def nearest(self, x_nv: Tensor, first_n: Tensor | None = None) -> Tensor:
        """The numbers of the nearest words in their books, ``[n]`` int32.

        Args:
            x_nv: Vectors, float32.
            first_n: :attr:`cells` times the number of each vector's book; the first book for all by default.
        """
        found = []
        for start in range(0, max(1, len(x_nv)), _AT_ONCE):
            part_nv = x_nv[start : start + _AT_ONCE].contiguous()
            cell_n = self._cells_of(part_nv)
            if first_n is not None:
                cell_n += first_n[start : start + _AT_ONCE]
            half_nm, *words = self._words_cvm.index_select(0, cell_n).unbind(1)
            # The largest product, less half of the word's square, is the least distance. Value by value: a vector's
            # word must not depend on which others are looked up with it.
            score_nm = half_nm.neg_()
            for x_n1, word_nm in zip(part_nv.split(1, dim=1), words, strict=True):
                score_nm.addcmul_(x_n1, word_nm)
            found.append(self._index_cm[cell_n, score_nm.argmax(1)])
        return found[0] if len(found) == 1 else torch.cat(found)


class Codebook:
    """The words of one codebook.

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
    def _finder(self) -> Finder:
        return Finder([self.words_kv])

    def nearest(self, x_nv: Tensor) -> Tensor:
        """The numbers of the nearest words, ``[n]`` int32."""
        return self._finder.nearest(x_nv.float())


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


@lru_cache(maxsize=64)
def finder(widths: tuple[int, ...], device: torch.device) -> Finder:
    """Finds words for values of so many bits, several widths whose indices stand for equally many values."""
    with torch.inference_mode(False):
        return Finder([codebook(bits, device).words_kv for bits in widths])
