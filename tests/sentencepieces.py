"""A tokenizer as SentencePiece's BPE becomes one of transformers: merges for every pair of pieces that make one."""

from __future__ import annotations

import functools
import json
from typing import Any

from tests.common import sentences

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
STEPS: dict[str, dict[str, Any]] = {
    # Llama 2 and Mistral 0.1, Llama 2 as it is read without `legacy`, and Gemma.
    "llama": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
    },
    "metaspace": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    },
    "gemma": {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
    },
}


@functools.cache
def _learnt(count: int) -> list[str]:
    """Pieces in the order in which a BPE has learnt them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=count, show_progress=False)
    fast.train_from_iterator(sentences(), trainer)
    return [token for token, _ in sorted(fast.get_vocab().items(), key=lambda item: item[1])]


def sentencepiece(kind: str = "llama", count: int = 320) -> Any:
    """A tokenizer of so many tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    first = ["<unk>", "<s>", "</s>", *BYTES]
    learnt = [piece for piece in _learnt(count - len(first) + 64) if piece not in first]
    vocab = {token: number for number, token in enumerate([*first, *learnt][:count])}
    merges = []
    for piece in sorted(set(learnt) & vocab.keys(), key=vocab.__getitem__):
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    special = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for token, number in list(vocab.items())[:3]
    ]  # fmt: skip
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    entries = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        **STEPS[kind],
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    fast = Tokenizer.from_str(json.dumps(entries))
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
