"""Tokenizers in GGUF files: llama.cpp cuts text as they do, or they are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from tests.models import portable, trained_tokenizer
from tests.sentencepieces import STEPS, sentencepiece
from tests.unit.formats.test_gguf import changed, values

from latentize.errors import FormatError
from latentize.formats.gguf import write_gguf
from latentize.formats.gguf_check import check_gguf
from latentize.formats.gguf_pieces import BYTE, UNKNOWN
from latentize.formats.gguf_vocab import pre_tokenizer_name, read_vocab

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ENCODE = {**BYTES, "use_regex": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a byte-level BPE."""
    return portable(tmp_path_factory.mktemp("bytes"), heads=2, rank=32, rope=16, nope=16, value=16)


def refused(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], why: str) -> None:
    """The folder with another ``tokenizer.json``."""
    copy = Path(shutil.copytree(folder, tmp_path / "folder"))
    entries = json.loads((copy / "tokenizer.json").read_text())
    change(entries)
    (copy / "tokenizer.json").write_text(json.dumps(entries))
    with pytest.raises(FormatError, match=why) as error:
        write_gguf(copy, tmp_path / "out.gguf", "f32")
    assert "tokenizer.json" in error.value.where and error.value.fix


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([BYTES], False, "gpt-2"),
        ([BYTES], True, None),
        ([{**BYTES, "add_prefix_space": True}], False, None),
        ([{"type": "Digits", "individual_digits": True}, BYTES], False, "smollm"),
        ([{"type": "Digits", "individual_digits": False}, BYTES], False, None),
        ([split(LLAMA3), ENCODE], True, "llama-bpe"),
        ([split(LLAMA3), ENCODE], False, None),
        ([split(LLAMA3), BYTES], True, None),
        ([split(LLAMA3.replace("{1,3}", "")), ENCODE], False, "qwen2"),
        ([split(r"\w+"), ENCODE], False, None),
        ([split(LLAMA3), split(r"\w+"), ENCODE], True, None),
        ([{"type": "Metaspace", "replacement": "_"}], False, None),
        ([], False, None),
    ],
)
def test_pre_tokenizer_names(steps: list[dict[str, Any]], ignore_merges: bool, name: str | None) -> None:
    several = {"type": "Sequence", "pretokenizers": steps}
    for pre_tokenizer in [several, *steps] if len(steps) == 1 else [several if steps else None]:
        entries = {"pre_tokenizer": pre_tokenizer, "model": {"type": "BPE", "ignore_merges": ignore_merges}}
        assert pre_tokenizer_name(entries) == name


def test_vocabulary(folder: Path) -> None:
    entries = json.loads((folder / "tokenizer.json").read_text())
    vocab = read_vocab(folder, 400)
    assert len(vocab.tokens) == len(vocab.types) == 400
    assert vocab.tokens[: len(entries["model"]["vocab"])] == sorted(
        entries["model"]["vocab"], key=entries["model"]["vocab"].get
    )
    assert vocab.types[0] == 3 and set(vocab.types[1:320]) == {1} and set(vocab.types[320:]) == {5}
    assert vocab.tokens[399] == "[PAD399]"
    assert vocab.merges == [" ".join(pair) for pair in entries["model"]["merges"]]
    assert vocab.special == {"bos": 0, "eos": 0} and not vocab.add_bos and vocab.notes == []


@pytest.fixture(scope="module")
def pieced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of SentencePiece's kind."""
    made = portable(tmp_path_factory.mktemp("pieced"), heads=2, rank=32, rope=16, nope=16, value=16, vocab_size=600)
    for file in made.glob("tokenizer*"):
        file.unlink()
    sentencepiece("llama", 590).save_pretrained(made)
    return made


@pytest.mark.parametrize("kind", STEPS)
def test_sentencepiece_has_scores_in_the_place_of_merges(pieced: Path, tmp_path: Path, kind: str) -> None:
    copy = Path(shutil.copytree(pieced, tmp_path / "folder"))
    sentencepiece(kind, 590).save_pretrained(copy)
    write_gguf(copy, tmp_path / "out.gguf", "f32")
    assert check_gguf(tmp_path / "out.gguf", copy)["keys"] > 10
    found, stored = values(tmp_path / "out.gguf"), json.loads((copy / "tokenizer.json").read_text())["model"]
    assert found["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in found
    assert found["tokenizer.ggml.add_space_prefix"] == (kind != "gemma")
    assert (
        found["tokenizer.ggml.token_type"][:4] == [UNKNOWN, 3, 3, BYTE] and found["tokenizer.ggml.token_type"][-1] == 5
    )
    scores = found["tokenizer.ggml.scores"]
    made = [stored["vocab"][left + right] for left, right in stored["merges"]]
    assert all(scores[a] > scores[b] for a, b in zip(dict.fromkeys(made), list(dict.fromkeys(made))[1:], strict=False))
    never = set(stored["vocab"].values()) - set(made)
    assert max(scores[number] for number in never) < min(scores[number] for number in made)


def _spread(entries: dict[str, Any]) -> None:
    """A merge that makes a piece far from the others that make it."""
    merges = entries["model"]["merges"]
    made = [left + right for left, right in merges]
    twice = next(at for at in range(len(made) - 1) if made[at] == made[at + 1])
    merges.append(merges.pop(twice))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t["model"]["merges"].pop(), "would merge"),
        (_spread, "have others between them"),
        (lambda t: t["model"]["vocab"].update({"zz": t["model"]["vocab"].pop("<0x7A>")}), "byte 122"),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "normalizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
        (lambda t: t["model"].update(dropout=0.1), "dropout"),
    ],
)
def test_pieces_that_llama_cpp_would_put_together_otherwise(
    pieced: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], why: str
) -> None:
    refused(pieced, tmp_path, change, why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t["model"].update(byte_fallback=True), "its pre-tokenizer"),
        (lambda t: t["model"].update(merges=[]), "merges nothing"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "no name"),
        (lambda t: t["model"]["vocab"].update({"toolate": 400}), "no embedding"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_hold(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], why: str
) -> None:
    refused(folder, tmp_path, change, why)


def test_what_llama_cpp_skips_is_noted(folder: Path, tmp_path: Path) -> None:
    from tokenizers import normalizers

    # Others use the same one.
    tokenizer = deepcopy(trained_tokenizer())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    told = changed(folder, tmp_path)
    tokenizer.save_pretrained(told)
    assert "NFC" in write_gguf(told, tmp_path / "out.gguf", "f32")["notes"][0]
