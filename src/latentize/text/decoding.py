"""From the bytes of a file, or of standard input, to characters: compression, encodings, and what is no text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import stat
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from latentize.errors import DataError

__all__ = ["COMPRESSED", "STDIN", "Source", "display", "encoding_of", "readable", "without_surrogates"]

STDIN = "-"
# What goes by a pipe is read once and kept; more would fill the memory.
_PIPED_BYTES = 1 << 28
# Bytes that are to be decodable, and bytes that an encoding without a mark is told from.
_LOOKED_AT, _GUESSED_FROM = 1 << 20, 1 << 16
# Of so many characters one may be damaged; more are another encoding.
_DAMAGED_ONE_IN = 10_000
# Endings of names; what is in a file is told from its first bytes.
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16: its mark begins with the same two bytes.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_FILES = (
    (b"%PDF", "a PDF file"),
    (b"PK\x03\x04", "a zip archive, or a document of an office program"),
    (b"\xd0\xcf\x11\xe0", "a document of an office program"),
    (b"PAR1", "a parquet file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x7fELF", "a program"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"SQLite format 3", "a database"),
)
# Of older encodings: what their text is full of, and which share of its non-ASCII characters that is.
_OLDER = (
    ("shift_jis", "[\u3040-\u30ff]", 0.4),
    ("euc_jp", "[\u3040-\u30ff]", 0.4),
    ("euc_kr", "[\uac00-\ud7a3]", 0.9),
    ("gb18030", "[的一是不了在有]", 0.06),
    ("big5", "[的一是不了在有]", 0.06),
    ("cp1251", "[а-яё]", 0.9),
    ("koi8_r", "[а-яё]", 0.9),
    ("cp1252", "[à-ÿœ“”‘’–—€ß…äöüéèçñ°§£«»]", 0.8),
)
_USUAL = re.compile("[ \n\ra-zA-Z0-9\u3001\u3002\uff0c]")


@dataclass(frozen=True)
class Source:
    """Bytes that can be read again and again.

    Attributes:
        name: For messages.
        path: A file; ``None`` where ``held`` has all of it.
        held: What came by a pipe.
    """

    name: str
    path: Path | None = None
    held: bytes = b""

    @classmethod
    def of(cls, path: Path) -> Source:
        """A file, or a pipe with a name."""
        status = path.stat()
        if not stat.S_ISFIFO(status.st_mode):
            return cls(str(path), path)
        return cls(str(path), held=_named_pipe(path, status.st_dev, status.st_ino))

    @classmethod
    def stdin(cls) -> Source:
        """Standard input."""
        if sys.stdin is None or sys.stdin.closed or not hasattr(sys.stdin, "buffer"):
            raise DataError("standard input is closed", where=STDIN, fix="pipe text into it, or give a file")
        return cls("standard input", held=_read_once(sys.stdin.buffer, "standard input"))

    @contextmanager
    def bytes(self) -> Iterator[BinaryIO]:
        """From the beginning, decompressed."""
        with self._stored() as stream:
            magic = stream.read(6)
        with self._stored() as stream, _decompressor(magic)(stream, self.name) as plain:
            yield plain

    def _stored(self) -> BinaryIO:
        return io.BytesIO(self.held) if self.path is None else self.path.open("rb")

    def head(self) -> bytes:
        """The first bytes, decompressed."""
        with self.bytes() as stream:
            return _at_most(stream, _LOOKED_AT)

    @contextmanager
    def characters(self, tell: Callable[[str], None]) -> Iterator[TextIO]:
        """From the beginning, decoded, with ``\\n`` for every end of line.

        Args:
            tell: Told what the user should know.

        Raises:
            DataError: it is no text, or in an encoding that is not read.
        """
        head = self.head()
        encoding = encoding_of(head, self.name)
        if encoding == "utf-8" and _damaged(head, "utf-8"):
            tell(f"{self.name}: a few bytes that are not UTF-8 are read as U+FFFD")
        with self.bytes() as stream, io.TextIOWrapper(stream, encoding=encoding, errors="replace") as text:
            yield text


def _at_most(stream: BinaryIO, size: int) -> bytes:
    """What there is, up to ``size``; one read of a pipe, or of a decompressor, may give less."""
    parts, missing = [], size
    while missing and (part := stream.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


@cache
def _read_once(stream: Any, name: str) -> bytes:
    found = _at_most(stream, _PIPED_BYTES + 1)
    if len(found) > _PIPED_BYTES:
        raise DataError(
            f"more than {_PIPED_BYTES >> 20} MiB come by a pipe", where=name, fix="write it to a file, and give that"
        )
    return found


@cache
def _named_pipe(path: Path, device: int, node: int) -> bytes:
    with path.open("rb") as stream:
        return _read_once(stream, str(path))


def _plain(stream: BinaryIO, name: str) -> Any:
    return stream


def _zstd(stream: BinaryIO, name: str) -> Any:
    """Of whichever package is there."""
    try:
        import zstandard  # pyright: ignore[reportMissingImports]

        return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
    except ImportError:
        pass
    try:
        import pyarrow

        return pyarrow.CompressedInputStream(stream, "zstd")
    except ImportError:
        raise DataError(
            "a package that .zst files need is not installed", where=name, fix="pip install zstandard"
        ) from None


def _decompressor(magic: bytes) -> Callable[[BinaryIO, str], Any]:
    """What the first bytes ask for; a name may lie."""
    if magic.startswith(b"\x1f\x8b"):
        return lambda stream, _: gzip.GzipFile(fileobj=stream)
    if magic.startswith(b"BZh"):
        return lambda stream, _: bz2.BZ2File(stream)
    if magic.startswith(b"\xfd7zXZ\0"):
        return lambda stream, _: lzma.LZMAFile(stream)
    return _zstd if magic.startswith(b"\x28\xb5\x2f\xfd") else _plain


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Errors of reading, decompressing and parsing as errors of a user's."""
    try:
        yield
    except DataError:
        raise
    # What a damaged archive or table raises depends on the package, and on where it is damaged.
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read text: {_first(error)}", where=name) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("zstd", "zstandard", "pyarrow"):
            raise
        raise DataError(f"cannot read text: {_first(error)}", where=name) from error


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def encoding_of(head: bytes, name: str) -> str:
    """Python's name of the encoding of a text.

    Args:
        head: Its beginning, which may end in the middle of a character.
        name: For messages.

    Raises:
        DataError: it is none of UTF-8, UTF-16 and UTF-32, with or without a byte order mark; the message names what it
            seems to be.
    """
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            if _damaged(head, encoding) > 1 + len(head) // 100:
                raise _refusal(f"damaged {encoding.removesuffix('-sig').upper()}", name, "take an undamaged copy")
            return encoding
    kinds = [kind for magic, kind in _OTHER_FILES if head.startswith(magic)]
    if head[257:262] == b"ustar":
        kinds.append("a tar archive")
    if kinds:
        raise _refusal(kinds[0], name, "extract its text first")
    damaged, zeros = _damaged(head, "utf-8"), head.count(0)
    if not damaged and not zeros:
        return "utf-8"
    wide = _wide(head)
    if wide is not None:
        return wide
    if zeros * 1000 > len(head):
        raise _refusal("binary data", name, "give a file of text")
    foreign = sum(not c.isascii() for c in _decoded(head, "utf-8", "replace")) - damaged
    if damaged * _DAMAGED_ONE_IN <= len(head) or damaged * 10 <= foreign:
        return "utf-8"
    older = _older(head)
    if older is None:
        raise _refusal("in no encoding that is known here, or binary data", name, "convert it to UTF-8 with iconv")
    convert = f"iconv -f {older.upper().replace('_', '-')} -t UTF-8 FILE > NEW"
    raise _refusal(f"in {older} or the like, not in UTF-8, UTF-16 or UTF-32", name, convert)


def _refusal(kind: str, name: str, fix: str) -> DataError:
    return DataError(f"the file seems to be {kind}", where=name, fix=fix)


def _decoded(head: bytes, encoding: str, errors: str) -> str:
    """All whole characters."""
    return codecs.getincrementaldecoder(encoding)(errors).decode(head)


def _damaged(head: bytes, encoding: str) -> int:
    """Characters that cannot be decoded. U+FFFD that was written is none, nor is half a pair of UTF-16 in UTF-8."""
    written = 0
    if encoding.startswith("utf-8"):
        head, written = re.sub(rb"\xed[\xa0-\xbf][\x80-\xbf]", b"", head), head.count("\ufffd".encode())
    try:
        _decoded(head, encoding, "strict")
        return 0
    except UnicodeDecodeError:
        return max(1, _decoded(head, encoding, "replace").count("\ufffd") - written)


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: what most looks like text, if any of them does."""
    best, found = 0.02, None
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = _decoded(head[:_GUESSED_FROM], encoding, "strict")
        except UnicodeDecodeError:
            continue
        odd = sum(c not in "\t\n\r\f\x1b\ufeff" and unicodedata.category(c) in ("Cc", "Cn", "Co") for c in text)
        usual = len(_USUAL.findall(text)) / max(1, len(text))
        if odd * 1000 <= len(text) and usual > best:
            best, found = usual, encoding
    return found


def _older(head: bytes) -> str | None:
    """Which older encoding a text is in, most likely."""
    best, found = 0.05, None
    for encoding, usual, typical in _OLDER:
        try:
            text = _decoded(head[:_GUESSED_FROM], encoding, "strict")
        except UnicodeDecodeError:
            continue
        foreign = [c for c in text if not c.isascii()]
        letters = sum(c.isascii() and c.isalpha() for c in text)
        # Of a text in Latin letters few are not ASCII; of one in others most are.
        latin = encoding == "cp1252"
        if not foreign or (len(foreign) > letters if latin else len(foreign) < letters / 4):
            continue
        score = len(re.findall(usual, "".join(foreign))) / len(foreign) / typical
        if score > best:
            best, found = score, encoding
    return found


def without_surrogates(text: str) -> str:
    """Halves of UTF-16 pairs joined, and U+FFFD for what is alone: no encoding, and no tokenizer, has those."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def display(name: str) -> str:
    """A path as it can be written into a file; its bytes need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
