"""Calibration text that the source writes itself.

A user's text is about a few things, and what a conversion learns from it goes for other text only in part. The source
knows what else it was trained on: it begins with any token of its vocabulary and goes on as it would (LLM-QAT, arXiv
2305.17888, section 3.1; for calibration arXiv 2410.17170). Such text costs no data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentize.text.tokens import leading_tokens

__all__ = ["PIECE", "pieces_at_once", "self_generated"]

# Tokens of a piece; short, because many beginnings tell more than long continuations, and cost less.
PIECE = 128
# Pieces that are written at a time, and logits of them, which exist a few times over.
_AT_ONCE, _LOGITS = 256, 1 << 24
# Entries of the vocabulary whose probabilities are summed before one of them is drawn.
_TOGETHER = 256


def pieces_at_once(vocabulary: int) -> int:
    """How many pieces are written at a time.

    Args:
        vocabulary: Logits of a token.
    """
    return max(1, min(_AT_ONCE, _LOGITS // vocabulary))


@torch.no_grad()
def self_generated(
    model: Any,
    tokenizer: Any,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Sequences of short pieces, each a random token and what the model goes on with, drawn as it predicts them.

    Control tokens are neither begun with nor drawn. Each sequence begins with what the tokenizer puts before a text.

    Args:
        model: A transformers model that generates.
        tokenizer: Its tokenizer.
        sequences: How many, ``N``.
        length: Tokens of each, ``T``.
        seed: Draws first tokens and continuations.
        progress: Told how many pieces are written.

    Returns:
        ``[N, T]`` int64, on the CPU.
    """
    lead = leading_tokens(tokenizer)
    text = max(1, length - len(lead))
    piece = min(PIECE, text)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    known = min(len(tokenizer), vocabulary)
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    control |= set(tokenizer.all_special_ids)
    control |= set(range(known, vocabulary))
    plain = torch.tensor([token for token in range(known) if token not in control])
    count = -(-sequences * text // piece)
    barred = torch.tensor(sorted(control), dtype=torch.int64, device=model.device)
    size = pieces_at_once(vocabulary)
    written: list[Tensor] = []
    device = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=device):
        torch.manual_seed(seed)
        for start in range(0, count, size):
            first_B1 = plain[torch.randint(len(plain), (min(size, count - start), 1))]
            led_BT = torch.cat([torch.tensor([lead], dtype=torch.int64).expand(len(first_B1), -1), first_B1], dim=1)
            led_BT = led_BT.to(model.device)
            written.append(_continued(model, led_BT, piece - 1, barred)[:, len(lead) :].cpu())
            progress(start + len(first_B1), count)
    pieces = torch.cat(written).flatten()[: sequences * text].view(sequences, text)
    return torch.cat([torch.tensor([lead], dtype=torch.int64).expand(sequences, -1), pieces], dim=1)


def _continued(model: Any, tokens_BT: Tensor, more: int, barred: Tensor) -> Tensor:
    """``tokens_BT`` and so many more tokens, drawn as the model predicts them, none of those that are barred.

    transformers' ``generate`` does the same in several times the time: with a large vocabulary most of a step is its
    drawing, and on a CPU the rest is fused attention and copies of the cache.
    """
    # It needs transformers, and what tells how long text takes does not.
    from latentize.modeling.attending import attending, cache_of

    read_BT, cache = tokens_BT, cache_of(model, tokens_BT.shape[1] + more)
    with attending(model):
        for _ in range(more):
            out = model(read_BT, past_key_values=cache, use_cache=True)
            cache, logits_BV = out.past_key_values, out.logits[:, -1].float().index_fill_(-1, barred, float("-inf"))
            read_BT = _drawn(logits_BV)
            tokens_BT = torch.cat([tokens_BT, read_BT], dim=1)
    return tokens_BT


def _drawn(logits_BV: Tensor) -> Tensor:
    """A token for each row, ``[B, 1]``, by its probability: first some of the vocabulary, then one of these."""
    weight_BV = logits_BV.sub_(logits_BV.amax(-1, keepdim=True)).exp_()
    padded_BV = torch.nn.functional.pad(weight_BV, (0, -weight_BV.shape[-1] % _TOGETHER))
    weight_BKs = padded_BV.unflatten(-1, (-1, _TOGETHER))
    which_B1 = _one_of(weight_BKs.sum(-1))
    these_Bs = weight_BKs.gather(1, which_B1[..., None].expand(-1, -1, _TOGETHER))[:, 0]
    return which_B1 * _TOGETHER + _one_of(these_Bs)


def _one_of(weight_Bn: Tensor) -> Tensor:
    """Of each row the number of one weight, ``[B, 1]``, drawn in proportion."""
    end_Bn = weight_Bn.cumsum(-1)
    # Never at the very end, where rounding would find what weighs nothing.
    place_B1 = torch.rand(len(end_Bn), 1, device=end_Bn.device).clamp_max_(1 - 1e-6) * end_Bn[:, -1:]
    return torch.searchsorted(end_Bn, place_B1, right=True)
