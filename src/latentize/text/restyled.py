"""Calibration text in other styles: the same words in lower case, without punctuation, as a corpus is tokenised.

A user's text is mostly written in one way. What is learnt from it alone unlearns what the source makes of others: that
after a space before every comma there will be one before the next. Text in other styles is text augmentation as it is
done for classifiers (EDA, arXiv 1901.11196), but no word is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentize.text.tokens import leading_tokens

__all__ = ["STYLES", "restyled"]

_MARK = re.compile(r"[^\w\s']")
_SENTENCE_END = re.compile(r"(?<=[.!?])[ \t]+(?=\S)")
_SPACES = re.compile(r"  +")


def _apart(text: str) -> str:
    """Spaces around every mark, as in tokenised corpora."""
    return _SPACES.sub(" ", _MARK.sub(r" \g<0> ", text))


def _bare(text: str) -> str:
    """No marks, as in a transcript."""
    return _SPACES.sub(" ", _MARK.sub(" ", text))


def _lines(text: str) -> str:
    """Each sentence on a line of its own."""
    return _SENTENCE_END.sub("\n", text)


STYLES: tuple[Callable[[str], str], ...] = (str.lower, _apart, _bare, _lines)


def restyled(tokenizer: Any, tokens_NT: Tensor, *, sequences: int, seed: int = 0) -> Tensor:
    """Some of the sequences in other styles, the others as they were.

    Args:
        tokenizer: A transformers tokenizer.
        tokens_NT: Sequences of text, int64.
        sequences: How many are written anew, at most all; each of :data:`STYLES` gets as many. Where text has become
            too short for as many, some stay as they were.
        seed: Draws which ones.

    Returns:
        ``[N, T]`` int64.
    """
    lead, length = leading_tokens(tokenizer), tokens_NT.shape[1]
    order = torch.randperm(len(tokens_NT), generator=torch.Generator().manual_seed(seed))
    chosen = order[:sequences]
    result_NT = tokens_NT.clone()
    for style, rows in zip(STYLES, chosen.tensor_split(len(STYLES)), strict=True):
        ids: list[int] = []
        for row in rows.tolist():
            # A sequence may begin and end within a character.
            text = tokenizer.decode(
                tokens_NT[row].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            ).strip("\ufffd")
            ids += tokenizer(style(text), add_special_tokens=False, verbose=False)["input_ids"]
        body = length - len(lead)
        for row, start in zip(rows.tolist(), range(0, len(ids) - body + 1, body), strict=False):
            result_NT[row] = torch.tensor(lead + ids[start : start + body])
    return result_NT
