"""From the user's text to sequences of its parts, however little text there is.

What is learnt from and what is reported are parts of the text that have nothing in common, by whole documents. Of few
documents one part may have none. Then pieces of documents are told apart, and of yet less text sequences: every tenth
is held out. All parts are always told apart in the same way, which depends on the text and on the length of a sequence
only, so that one run learns from nothing that another reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentize.text.documents import Data, Split, documents, sources, warn
from latentize.text.records import chat_renderer
from latentize.text.tokens import TooShortError, pack

__all__ = ["Part", "draw", "draw_all"]

# One sequence of so many is held out, where sequences are told apart.
_HELD_OUT_ONE_IN = 10
# Characters that are read to see whether there are some; much less than to draw from.
_LOOKED_AT = 1 << 18
_BY_PIECES = "the text has too few documents to hold some out: pieces of the same documents are held out"
_BY_SEQUENCES = "the text is too short to hold documents out: sequences of the same documents are held out"
_USES = {"heldout": "hold out", "all": "measure on", "selection": "choose on", "training": "learn from"}


class Part(NamedTuple):
    """A part of the text.

    Attributes:
        split: Which.
        tokens: Wanted of it, at most.
        seed: Draws them.
    """

    split: Split
    tokens: int
    seed: int = 0


class _Notes:
    """What the user should know, each said once."""

    def __init__(self, notes: list[str] | None) -> None:
        self._notes = [] if notes is None else notes

    def tell(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)
            warn(note)


def draw(
    tokenizer: Any,
    data: Data,
    parts: Sequence[Part],
    *,
    sequence_length: int,
    notes: list[str] | None = None,
) -> list[Tensor]:
    """Sequences of parts of a text.

    The user's text always has both what is learnt from and what is held out, or is refused; which of the two a sequence
    belongs to is the same in every call with the same text, tokenizer and length.

    Args:
        tokenizer: A transformers tokenizer.
        data: As for :func:`latentize.text.documents.documents`.
        parts: What is wanted.
        sequence_length: Tokens per sequence ``T``.
        notes: Gets what the user should know; it is a warning in any case.

    Returns:
        For each part ``[N, T]`` int64, as :func:`latentize.text.tokens.pack`; fewer sequences than wanted if there
        is no more text.

    Raises:
        TooShortError: the text does not fill one sequence of each part.
        DataError: it cannot be read.
    """
    tell, data = _Notes(notes).tell, sources(data)
    drawing = _Drawing(tokenizer, data, sequence_length, tell)
    # Of the standard library there is enough.
    rows = drawing.of_few(parts) if data else [drawing.of_documents(part, cut=False) for part in parts]
    for part, found_NT in zip(parts, rows, strict=True):
        _tell_of_less(part, found_NT, sequence_length, tell)
    return rows


def draw_all(
    tokenizer: Any, data: Data, *, tokens: int, sequence_length: int, seed: int = 0, notes: list[str] | None = None
) -> Tensor:
    """Sequences to measure on: of all of the user's text, or of the held-out part of the standard library's.

    Arguments, result and errors are those of :func:`draw`.
    """
    tell, data = _Notes(notes).tell, sources(data)
    part = Part("all" if data else "heldout", tokens, seed)
    rows_NT = _Drawing(tokenizer, data, sequence_length, tell).of_documents(part, cut=False)
    _tell_of_less(part, rows_NT, sequence_length, tell)
    return rows_NT


def _tell_of_less(part: Part, rows_NT: Tensor, length: int, tell: Callable[[str], None]) -> None:
    if len(rows_NT) < part.tokens // length:
        use = _USES.get(part.split, "calibrate on")
        tell(f"there are {rows_NT.numel():,} tokens of text to {use}, {part.tokens:,} were asked for")


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    """Each once: of two that are the same one could be held out and the other be learnt from."""
    seen = set()
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


class _Drawing:
    def __init__(self, tokenizer: Any, data: list[str], length: int, tell: Callable[[str], None]) -> None:
        self.tokenizer, self.data, self.length, self.tell = tokenizer, data, length, tell
        self.render = chat_renderer(tokenizer, tell)

    def of_documents(self, part: Part, *, cut: bool, **options: Any) -> Tensor:
        return self._packed(self._documents(part.split, cut=cut), part, **options)

    def _documents(self, split: Split, *, cut: bool) -> Iterator[str]:
        return documents(self.data, split, cut=cut, render=self.render, tell=self.tell)

    def _packed(self, text: Iterable[str], part: Part, **options: Any) -> Tensor:
        options |= {"tokens": part.tokens, "sequence_length": self.length, "seed": part.seed}
        return pack(self.tokenizer, text, **options)

    def of_few(self, parts: Sequence[Part]) -> list[Tensor]:
        wanted = {part.split: part for part in parts}
        for cut, note in ((False, ""), (True, _BY_PIECES)):
            found: dict[Split, Tensor] = {}
            try:
                # Held-out text is what there may be none of. Of a part that is not wanted a glance suffices.
                for split in ("heldout", "calibration"):
                    options = {} if split in wanted else {"pool": _LOOKED_AT}
                    found[split] = self.of_documents(wanted.get(split, Part(split, self.length)), cut=cut, **options)
            except TooShortError:
                continue
            if note:
                self.tell(note)
            return [found[p.split] if p.split in found else self.of_documents(p, cut=cut) for p in parts]
        rows = [self.of_sequences(part) for part in parts]
        self.tell(_BY_SEQUENCES)
        return rows

    def of_sequences(self, part: Part) -> Tensor:
        """Every tenth of all sequences, or the others; the seed only orders these."""
        wanted, each = max(1, part.tokens // self.length), _HELD_OUT_ONE_IN
        held = part.split == "heldout"
        drawn = each * (wanted - 1) + 2 if held else wanted + wanted // (each - 1) + 2
        # A larger draw begins as a smaller one does, so that a number means the same sequence in all.
        rows_NT = self._packed(_distinct(self._documents("all", cut=False)), Part("all", drawn * self.length), least=2)
        if part.split == "selection":
            raise TooShortError(rows_NT.numel(), self.length, what="what is kept to choose on")
        if held:
            return rows_NT[::each][:wanted]
        others_NT = rows_NT[torch.arange(len(rows_NT)) % each != 0][:wanted]
        order = torch.randperm(len(others_NT), generator=torch.Generator().manual_seed(part.seed))
        return others_NT[order]
