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
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, TextIO

from latentize.errors import DataError
from latentize.paths import expanded
from latentize.text.decoding import COMPRESSED, STDIN, Source, display, readable, without_surrogates
from latentize.text.records import Chat, Renderer, document_of, fields, plainly

__all__ = [
    "ALONE",
    "Data",
    "Split",
    "TextWarning",
    "describe",
    "documents",
    "pieces",
    "sources",
    "stdlib_documents",
    "warn",
]

Split = Literal["calibration", "heldout", "training", "selection", "all"]
# Paths, or names of hub data sets; or one of them.
Data = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

STDLIB = "python-stdlib"
HUB_DEFAULT = "HuggingFaceFW/fineweb-edu"

# The tables of `encodings` are numbers, not text; site-packages is not the standard library.
_NOT_TEXT = {"encodings", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_SEGMENT_CHARS = 16_384
# Where there are too few documents, they are cut into pieces of this.
_PIECE_CHARS = 4096
# No line of text is longer than this, and no record.
_LINE_CHARS, _RECORD_CHARS = 1 << 24, 1 << 28
_READ_CHARS = 1 << 20

_PLAIN = (".txt", ".text", ".md", ".markdown", ".rst")
_RECORDS = (".jsonl", ".ndjson")
_PARQUET = ".parquet"
_KINDS = "use .txt, .md, .jsonl with a `text` or `messages` field, .parquet with such a column, or one of them as .gz"


class TextWarning(UserWarning):
    """Something about the text that the user should know; it goes on."""


# One sequence is too few to keep some apart.
ALONE = "one sequence of text is all there is to learn from and to choose on"


def warn(note: str) -> None:
    """Say it to whoever listens to warnings; a command prints it on stderr."""
    warnings.warn(note, TextWarning, stacklevel=2)


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
            fix=f"pass text with --data FILE: {_KINDS}",
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


def _segments(text: TextIO) -> Iterator[str]:
    """Cut one long text at line ends into pieces that the split can tell apart."""
    held = ""
    while part := text.read(_READ_CHARS):
        held += part
        start = 0
        while len(held) - start > _SEGMENT_CHARS:
            end = held.find("\n", start + _SEGMENT_CHARS) + 1
            if not end and len(held) - start >= _LINE_CHARS:
                end = start + _LINE_CHARS
            if not end:
                break
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def pieces(text: str, size: int) -> Iterator[str]:
    """``text`` in parts of at most ``size`` characters, cut at line ends where there are any."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _kind(path: Path) -> str:
    """The ending of a name, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _guessed(source: Source) -> str:
    """The ending that would suit what has none."""
    head = source.head()
    if head.startswith(b"PAR1"):
        return _PARQUET
    with source.characters(lambda note: None) as text:
        first = next((line for line in iter(lambda: text.readline(_READ_CHARS), "") if line.strip()), "")
    return _RECORDS[0] if first.lstrip().startswith("{") else _PLAIN[0]


def _read(source: Source, kind: str, tell: Callable[[str], None]) -> Iterator[str | Chat]:
    with readable(source.name):
        kind = kind or _guessed(source)
        if kind == _PARQUET:
            yield from _read_parquet(source)
        elif kind in _PLAIN:
            with source.characters(tell) as text:
                yield from _segments(text)
        elif kind in _RECORDS:
            with source.characters(tell) as text:
                yield from _read_records(text, source.name)
        else:
            more = {".json": "one record a line, as `jq -c '.[]' FILE > NEW.jsonl` writes them; or "}
            raise DataError(f"cannot read text from a {kind} file", where=source.name, fix=more.get(kind, "") + _KINDS)


def _read_records(text: TextIO, name: str) -> Iterator[str | Chat]:
    for number, line in enumerate(iter(lambda: text.readline(_RECORD_CHARS), ""), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read text: the line is no JSON: {error}", where=where) from error
        yield document_of(record, where)


def _read_parquet(source: Source) -> Iterator[str | Chat]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(
            "a package that .parquet files need is not installed",
            where=source.name,
            fix="pip install 'latentize[data]'",
        ) from None
    with source.bytes() as stream, pq.ParquetFile(stream) as table:
        names = table.schema_arrow.names
        columns = [name for name in names if name in fields()]
        if not columns:
            document_of(dict.fromkeys(names), source.name)
        first = 0
        for batch in table.iter_batches(columns=columns):
            for number, row in enumerate(batch.to_pylist(), first):
                yield document_of(row, f"{source.name}, row {number}")
            first += batch.num_rows


def _hub_documents(name: str) -> Iterator[str | Chat]:
    """Stream a hub data set; nothing but the rows that are used is downloaded."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            "a package that hub data sets need is not installed", where=name, fix="pip install 'latentize[data]'"
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        for index, row in enumerate(rows):
            yield document_of(row, f"{name}, row {index}")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot stream the data set: {error}",
            where=name,
            fix="check the name and the network, or pass a local .txt, .jsonl or .parquet file",
        ) from error


def _files_in(folder: Path) -> list[Path]:
    """All files of text below a folder, by name; what is hidden is left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder: {error.strerror}", where=str(folder)) from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    found = [path for path in found if _kind(path) in (*_PLAIN, *_RECORDS, _PARQUET) and path.is_file()]
    if not found:
        raise DataError("no text file in the folder", where=str(folder), fix=_KINDS)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _documents_of(source: str, tell: Callable[[str], None]) -> Iterator[str | Chat]:
    if source == STDIN:
        with readable("standard input"):
            opened = Source.stdin()
        yield from _read(opened, "", tell)
        return
    path = expanded(source)
    with readable(source):
        folder = bool(source) and path.is_dir()
        file = path.is_file() or path.is_fifo()
        there = path.exists()
    if folder:
        for inner in _files_in(path):
            yield from _read(Source.of(inner), _kind(inner), tell)
    elif file:
        with readable(source):
            opened = Source.of(path)
        yield from _read(opened, _kind(path), tell)
    elif there or _is_path(source):
        wrong = "neither a file, a folder nor a pipe" if there else "no such text file"
        raise DataError(wrong, where=source, fix="check the path given with --data")
    else:
        yield from _hub_documents(source)


def _is_path(source: str) -> bool:
    """Whether it cannot be the name of a data set on the hub."""
    kinds = (*_PLAIN, *_RECORDS, _PARQUET, *COMPRESSED)
    return not source or source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(kinds)


def sources(data: Data) -> list[str]:
    """Paths and names as a list; empty means the standard library."""
    given = [data] if isinstance(data, str | os.PathLike) else data
    found = [os.fspath(source) for source in given]
    return [] if found == [STDLIB] else found


def documents(
    data: Data,
    split: Split,
    *,
    cut: bool = False,
    render: Renderer = plainly,
    tell: Callable[[str], None] = warn,
) -> Iterator[str]:
    """Documents of ``split`` from ``data``: files, folders, ``-`` for standard input, or hub data sets; else the
    standard library.

    A tenth of the user's own documents is held out.

    Args:
        data: What to read; nothing means the standard library.
        split: Which part.
        cut: Tell apart pieces of documents, not documents: for few long ones.
        render: Writes a conversation out. It does not decide which part the conversation belongs to.
        tell: Told what the user should know.

    Raises:
        DataError: a file cannot be read or has no text, or a name is neither a file nor a data set.
    """
    named = sources(data)
    if not named:
        yield from stdlib_documents(split)
        return
    for source in named:
        for document in _documents_of(source, tell):
            text = without_surrogates(plainly(document) if isinstance(document, Chat) else document)
            for part in pieces(text, _PIECE_CHARS) if cut and isinstance(document, str) else (text,):
                if part.strip() and _belongs(part, split, heldout_permille=100):
                    yield without_surrogates(render(document)) if isinstance(document, Chat) else part


def describe(data: Data) -> str:
    """One line for reports: what text it was."""
    named = sources(data)
    if not named:
        return f"the Python {sysconfig.get_python_version()} standard library's source text"
    return ", ".join("standard input" if source == STDIN else display(source) for source in named)
