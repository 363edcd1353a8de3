"""Proof that RoPE is read as transformers reads it: frequencies, at any length, and a factor on what turns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentize.errors import CheckpointError
from latentize.families import ModelSpec
from latentize.families.model import FULL

__all__ = ["check_turning", "differs", "near"]

# Numbers that both sides compute from the same entries; transformers does in float32.
_EXACT = 1e-5


def differs(what: str, where: str) -> CheckpointError:
    """Something that is read otherwise than transformers reads it."""
    return CheckpointError(
        f"{what} is read otherwise than transformers reads it",
        code="LZ122",
        where=where,
        fix="please report it with config.json and the version of transformers; it would have been converted wrongly",
    )


def near(a: float, b: float) -> bool:
    """Whether two numbers are the same but for rounding."""
    return abs(a - b) <= _EXACT * max(abs(a), abs(b))


def check_turning(spec: ModelSpec, body: Any, where: str) -> None:
    """Compare the layers that are converted with transformers' module.

    Args:
        spec: The model as it is read.
        body: transformers' decoder.
        where: What an error names.

    Raises:
        CheckpointError: they turn otherwise.
    """
    rotary, rope = getattr(body, "rotary_emb", None), spec.attention.rope
    if rotary is None:
        return
    # Where kinds of layers turn otherwise, each has a table.
    by_kind = f"{FULL}_inv_freq" in dict(rotary.named_buffers())
    table, kind = (f"{FULL}_inv_freq", {"layer_type": FULL}) if by_kind else ("inv_freq", {})
    theirs = getattr(rotary, table, None)
    if rope.rope_type == "proportional" and theirs is not None and not theirs[len(rope.frequencies) :].any():
        # Its table has the pairs, too, that do not turn.
        theirs = theirs[: len(rope.frequencies)]
    _check_frequencies(theirs, rope.frequencies, where)
    if rope.length:
        # It goes by the last position; a short text comes last, so that its frequencies are the usual ones again.
        for tokens in (rope.length + 1, 3 * rope.length, 1):
            rotary(torch.zeros(1), torch.tensor([[tokens - 1]]), **kind)
            _check_frequencies(getattr(rotary, table), rope.at_length(tokens), where)
    scaling = getattr(rotary, f"{FULL}_attention_scaling", getattr(rotary, "attention_scaling", 1.0))
    if not near(scaling, rope.attention_factor):
        raise differs("a factor on what RoPE rotates", where)


def _check_frequencies(theirs: Tensor | None, usual: tuple[float, ...], where: str) -> None:
    ours = torch.tensor(usual)
    if theirs is None or theirs.shape != ours.shape or not torch.allclose(ours, theirs.float(), rtol=_EXACT, atol=0):
        raise differs("RoPE", where)
