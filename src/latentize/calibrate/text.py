"""Where text comes from, and which part of it may be looked at for what.

A document belongs to exactly one of two splits, decided by a hash and so the same on every machine and
in every run: ``"calibration"`` (statistics, choices, refinement) and ``"heldout"`` (reported numbers). Who trains for
long divides the former once more, into ``"training"`` and ``"selection"``, half as much as is held out: other text of
a document that was learnt from is no test of what was learnt.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from latentize.errors import DataError

__all__ = ["Split", "describe", "documents", "stdlib_documents"]

Split = Literal["calibration", "heldout", "training", "selection", "all"]

STDLIB = "python-stdlib"
HUB_DEFAULT = "HuggingFaceFW/fineweb-edu"

# The tables of `encodings` are numbers, not text; site-packages is not the standard library.
_NOT_TEXT = {"encodings", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_SEGMENT_CHARS = 16_384


def _bucket(key: str) -> int:
    """A number in 0 … 999 that depends on ``key`` only."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 1000


def _belongs(key: str, split: Split, heldout_permille: int) -> bool:
    bucket, selected = _bucket(key), heldout_permille * 3 // 2
    return {
        "all": True,
        "heldout": bucket < heldout_permille,
        "calibration": bucket >= heldout_permille,
        "selection": heldout_permille <= bucket < selected,
        "training": bucket >= selected,
    }[split]


def stdlib_documents(split: Split) -> Iterator[str]:
    """The source files of the running interpreter's standard library, 2 % of them held out.

    It is on every machine and needs no download. Files are visited in the order of a hash of their
    name, so that a prefix of the stream is a fair sample of the whole.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = _text_files(root)
    if not names:
        raise DataError(
            "the Python standard library's sources are not on this machine",
            where=str(root),
            fix="pass text with --data FILE (.txt, .jsonl or .parquet)",
        )
    for name in names:
        if not _belongs(name, split, heldout_permille=20):
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if len(text) > 200:
            yield text


@cache
def _text_files(root: Path) -> list[str]:
    """Names below ``root``, in the order of their hashes; thousands, so they are looked for once."""
    names = []
    for folder, folders, files in os.walk(root):
        # Not walked into: site-packages may hold ten times as many files.
        folders[:] = [name for name in folders if name not in _NOT_TEXT]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()[8:])


def _segments(text: str) -> Iterator[str]:
    """Cut one long text at line ends into pieces that the split can tell apart."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _SEGMENT_CHARS)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _read_file(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield from _segments(path.read_text(encoding="utf-8", errors="replace"))
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_field(json.loads(line), f"{path}, line {number}")
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
                for text in batch.column("text").to_pylist():
                    yield _text_field({"text": text}, str(path))
        else:
            raise DataError(
                f"cannot read text from a {path.suffix or 'nameless'} file",
                where=str(path),
                fix="use .txt, .jsonl with a `text` field, or .parquet with a `text` column",
            )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read text: {error}", where=str(path)) from error


def _text_field(record: object, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError("a record has no `text` field", where=where)
    return record["text"]


def _hub_documents(name: str) -> Iterator[str]:
    """Stream a hub data set; nothing but the rows that are used is downloaded."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
        for index, row in enumerate(rows):
            yield _text_field(row, f"{name}, row {index}")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot stream the data set: {error}",
            where=name,
            fix="check the name and the network, or pass a local .txt, .jsonl or .parquet file",
        ) from error


def documents(data: Iterable[str], split: Split) -> Iterator[str]:
    """Documents of ``split`` from ``data``: paths, or hub data set names. Empty means the standard library.

    A tenth of the user's own documents is held out.

    Raises:
        DataError: a file cannot be read or has no text, or a name is neither a file nor a data set.
    """
    sources = list(data)
    if not sources or sources == [STDLIB]:
        yield from stdlib_documents(split)
        return
    for source in sources:
        path = Path(source)
        if path.is_file():
            stream = _read_file(path)
        elif path.exists() or path.suffix in {".txt", ".jsonl", ".parquet"} or source.count("/") > 1:
            raise DataError("no such text file", where=source, fix="check the path given with --data")
        else:
            stream = _hub_documents(source)
        for text in stream:
            if text.strip() and _belongs(text, split, heldout_permille=100):
                yield text


def describe(data: Iterable[str]) -> str:
    """One line for reports: what text it was."""
    sources = list(data)
    if not sources or sources == [STDLIB]:
        return f"the Python {sysconfig.get_python_version()} standard library's source text"
    return ", ".join(sources)
