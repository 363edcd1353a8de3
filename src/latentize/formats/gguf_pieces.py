"""SentencePiece's BPE as ``tokenizer.json`` has it, for llama.cpp, which knows it by the name ``llama``.

A text is cut into characters; the two neighbours whose concatenation has the best score become one, until none has a
score; what is left unknown is cut into bytes (Kudo & Richardson, arXiv 1808.06226). ``tokenizer.json`` has merges in
the place of scores, the best first. A piece is as good as the first merge that makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["BYTE", "UNKNOWN", "Pieces", "is_sentencepiece", "pieces"]

# Token types of GGUF.
UNKNOWN, BYTE = 2, 6
_SPACE = "▁"
# What no merge makes is never looked for.
_NEVER = -1e9


@dataclass(frozen=True)
class Pieces:
    """What ``llama`` needs beside tokens.

    Attributes:
        scores: Of each token, the best is 0.
        types: GGUF's type of those tokens that have another than they seem to, by id.
        space_prefix: Whether a text begins with a space that it has not.
        notes: What llama.cpp does differently.
    """

    scores: list[float]
    types: dict[int, int]
    space_prefix: bool
    notes: list[str]


def is_sentencepiece(entries: dict[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is such a BPE."""
    model = entries["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def pieces(entries: dict[str, Any], count: int) -> Pieces | str:
    """What a ``tokenizer.json`` says; or why llama.cpp would cut text in another way.

    Args:
        entries: Of the file; :func:`is_sentencepiece`.
        count: Tokens of the model.
    """
    model, vocab = entries["model"], entries["model"]["vocab"]
    spaces = _spaces(entries)
    if isinstance(spaces, str):
        return spaces
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            return f"it has '{name}'"
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        return f"it has no token for the byte {missing[0]}"
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    apart = {entry["content"] for entry in entries["added_tokens"]} | {f"<0x{byte:02X}>" for byte in range(256)}
    scores = _scores(merges, vocab, apart, count)
    if isinstance(scores, str):
        return scores
    types = {vocab[f"<0x{byte:02X}>"]: BYTE for byte in range(256)}
    unknown = model.get("unk_token")
    if unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    prefix, notes = spaces
    return Pieces(scores, types, prefix, notes)


def _scores(merges: list[tuple[str, ...]], vocab: dict[str, int], apart: set[str], count: int) -> list[float] | str:
    """Of each token; or why scores do not say what merges say. Tokens ``apart`` are looked for before anything else."""
    scores, made = [_NEVER] * count, ""
    for rank, (left, right) in enumerate(merges):
        number = vocab[left + right]
        # A piece has one score: no merge that makes another may come between those that make it.
        if scores[number] != _NEVER and made != left + right:
            return f"merges that make '{left + right}' have others between them"
        if made != left + right:
            scores[number], made = -float(rank), left + right
    known = set(merges)
    for token in vocab.keys() - apart:
        for left, right in ((token[:at], token[at:]) for at in range(1, len(token))):
            if left in vocab and right in vocab and (left, right) not in known:
                return f"llama.cpp would merge '{left}' and '{right}', and it does not"
    return scores


def _spaces(entries: dict[str, Any]) -> tuple[bool, list[str]] | str:
    """Whether a text begins with a space more, and what llama.cpp does differently; or what it does not know."""
    normal, before = entries.get("normalizer"), entries.get("pre_tokenizer")
    steps: list[dict[str, Any]] = []
    if normal is not None:
        steps = normal["normalizers"] if normal["type"] == "Sequence" else [normal]
    kinds = [step["type"] for step in steps]
    replaced = [s for s in steps if s["type"] == "Replace"]
    if any(s["pattern"] != {"String": " "} or s["content"] != _SPACE for s in replaced):
        return "its normalizer replaces something else than spaces"
    if before is not None and before["type"] == "Metaspace" and not kinds:
        scheme = before.get("prepend_scheme", "always" if before.get("add_prefix_space", True) else "never")
        if before.get("replacement") != _SPACE or before.get("split", True):
            return "it cuts text at spaces first"
        notes = ["llama.cpp puts a space after special tokens within a text, too"] if scheme == "first" else []
        return scheme != "never", notes
    # Every space has become something else by then.
    if before is not None and not (before["type"] == "Split" and before.get("pattern") == {"String": " "}):
        return f"its pre-tokenizer ({before['type']}) is none that llama.cpp has beside it"
    if kinds == ["Replace"]:
        return False, []
    if kinds == ["Prepend", "Replace"] and steps[0].get("prepend") == _SPACE:
        return True, []
    return f"its normalizer ({', '.join(kinds) or 'none'}) is none that llama.cpp has beside it"
