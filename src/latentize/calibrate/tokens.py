"""From documents to packed token sequences."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from latentize.errors import DataError

__all__ = ["pack"]


def pack(
    tokenizer: Any,
    documents: Iterable[str],
    *,
    tokens: int,
    sequence_length: int,
    seed: int = 0,
    pool: int = 262_144,
) -> Tensor:
    """Concatenate documents, separated by the end-of-text token, and cut into equal sequences.

    Args:
        tokenizer: A transformers tokenizer.
        documents: Text, in a fixed order. Reading stops when enough tokens are there.
        tokens: Upper bound on the tokens returned; rounded down to whole sequences (at least one).
        sequence_length: Tokens per sequence ``T``.
        seed: The sequences are drawn at random.
        pool: Tokens to draw from, at least; more where ``tokens`` is more.

    Returns:
        ``[N, T]`` int64 with ``N = max(1, tokens // T)``, fewer if the text ends before.

    Raises:
        DataError: the text does not fill one sequence.
    """
    wanted = max(1, tokens // sequence_length)
    separator = tokenizer.eos_token_id
    enough = max(pool, wanted * sequence_length)
    stream: list[int] = []
    for text in documents:
        stream.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if separator is not None:
            stream.append(separator)
        if len(stream) >= enough:
            break
    available = len(stream) // sequence_length
    if available == 0:
        raise DataError(
            f"the text has {len(stream)} tokens, fewer than one sequence of {sequence_length}",
            fix="pass more text with --data, or a shorter --sequence-length",
        )
    chosen = list(range(available))
    random.Random(seed).shuffle(chosen)
    rows = torch.tensor(stream[: available * sequence_length], dtype=torch.int64)
    return rows.view(available, sequence_length)[chosen[:wanted]].contiguous()
