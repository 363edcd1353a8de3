"""Which rows of a layer's cache the newest tokens see, and how far away those seem.

With a window only the first tokens ("sinks") and the last ones are seen (StreamingLLM, Xiao et al., arXiv 2309.17453).
What lies between them is let go of now and then.

T newest tokens, S rows that some of them see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.attention.masks import narrowed, newest_mask

__all__ = ["Sight"]


@dataclass(frozen=True)
class Sight:
    """Rows, as the ``new`` last tokens see them.

    Attributes:
        new: How many these tokens are.
        seen: Tokens so far, these included.
        kept: Rows that are still there: sinks, and the last ones.
        stored: Of those, the first ones that are stored for good.
        window: Tokens that a token sees beside the sinks, itself included; ``None`` is all.
        sinks: First tokens that all see.
        band: Last rows that are seen as they are, where each token sees others of them so; 0 is none.
        newest: Rows that a token sees as they are.
    """

    new: int
    seen: int
    kept: int
    stored: int
    window: int | None = None
    sinks: int = 0
    band: int = 0
    newest: int = 0

    @property
    def gone(self) -> int:
        """Rows that were let go of, between the sinks and the rest."""
        return self.seen - self.kept

    def number(self, row: int, shift: int) -> int:
        """Of a row that is kept, its number among all that there were, as near as it seems."""
        return row + (shift if row < self.sinks else self.gone)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of the rows that are kept, those that some of the tokens see."""
        if self.window is None or self.kept <= self.sinks + self.window + self.new - 1:
            return [(0, self.kept)]
        return [(0, self.sinks), (self.kept - self.window - self.new + 1, self.kept)]

    @property
    def spans_beside_band(self) -> list[tuple[int, int]]:
        """The same without rows that the band has."""
        if not self.band:
            return self.spans
        return [(min(start, self.stored), min(stop, self.stored)) for start, stop in self.spans]

    @property
    def shift(self) -> int:
        """Positions by which the sinks seem nearer than they are.

        They stay as near as the window's far end: no distance is one that was never trained on.
        """
        spans = self.spans
        return self.gone + spans[1][0] - self.sinks if len(spans) == 2 else self.gone

    def positions(self, device: torch.device) -> Tensor:
        """Of every row that some of the tokens see, ``[S]``; those of the band come last."""
        spans, gone = self.spans_beside_band, self.gone
        first = torch.arange(*spans[0], device=device)
        # Nothing was let go of but what lies between the sinks and the rest.
        found = [torch.where(first < self.sinks, first, first + gone) if gone and len(spans) == 1 else first]
        found += [gone + torch.arange(*span, device=device) for span in spans[1:]]
        found.append(torch.arange(self.seen - self.band, self.seen, device=device))
        return torch.cat(found)

    def allowed(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Of a mask for all tokens, ``[B, h, T, S]``, what the rows that are seen need; ``None`` is causal."""
        if self.window is None and not self.band:
            return mask
        at_S = self.positions(device)
        if self.new == 1:
            return None if mask is None else mask[..., at_S]
        now_T = torch.arange(self.seen - self.new, self.seen, device=device)
        seen_TS = at_S <= now_T[:, None]
        if self.window is not None:
            seen_TS &= (now_T[:, None] - at_S < self.window) | (at_S < self.sinks)
        if self.band:
            border = len(at_S) - self.band
            seen_TS &= newest_mask(now_T, at_S[:border], at_S[border:], self.newest)
        return narrowed(mask, seen_TS, at_S)
