"""Calibration text in which a passage is read twice, as happens in long contexts.

Some heads look for the last time that the present token was read, and copy what followed (induction heads, Olsson et
al., arXiv 2209.11895). Plain text of a few hundred tokens seldom asks for that. A layer that is refined on it alone
unlearns to copy, and the model no longer finds what stands far back in a long context.
"""

from __future__ import annotations

import random

from torch import Tensor

__all__ = ["repeated"]

# Length of a passage, as a share of a sequence.
_SHORTEST, _LONGEST = 1 / 8, 3 / 8


def repeated(tokens_NT: Tensor, *, sequences: int, lead: int = 0, seed: int = 0) -> Tensor:
    """Some of the sequences with a passage of theirs again in the place of their end, the others as they were.

    Args:
        tokens_NT: Sequences of text, int64.
        sequences: How many, at most all.
        lead: Tokens at the beginning of each that are not of the text, and are not read again.
        seed: Draws which sequences, and which passages.

    Returns:
        ``[N, T]`` int64. A passage is an eighth to three eighths of a sequence, and its two places do not overlap.
    """
    draw = random.Random(seed)
    result_NT, body = tokens_NT.clone(), tokens_NT.shape[1] - lead
    longest = int(body * _LONGEST)
    if longest < 2:
        return result_NT
    for number in draw.sample(range(len(tokens_NT)), min(sequences, len(tokens_NT))):
        row_T = result_NT[number, lead:]
        length = draw.randint(max(2, int(body * _SHORTEST)), longest)
        start = draw.randint(0, body - 2 * length)
        row_T[body - length :] = row_T[start : start + length].clone()
    return result_NT
