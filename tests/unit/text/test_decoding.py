"""Text is read in the encoding that it is in, or refused by the name of what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentize.errors import DataError
from latentize.text.decoding import Source, encoding_of, without_surrogates
from latentize.text.documents import documents

LANGUAGES = {
    "English": "The people gathered at noon, and nobody knew why.\n" * 40,
    "German": "Der Bär läuft über die Straße; größer als üblich.\n" * 40,
    "Russian": "Люди собрались в полдень, и никто не знал зачем.\n" * 40,
    "Greek": "Οι άνθρωποι μαζεύτηκαν το μεσημέρι, κανείς δεν ήξερε γιατί.\n" * 40,
    "Hebrew": "האנשים התאספו בצהריים, ואיש לא ידע מדוע.\n" * 40,
    "Hindi": "लोग दोपहर को इकट्ठा हुए, और कोई नहीं जानता था क्यों।\n" * 40,
    "Chinese": "人们在中午聚集在一起，没有人知道为什么。这是一个不了的故事，在有的地方。\n" * 40,
    "Japanese": "人々は正午に集まりましたが、なぜなのかは誰も知りませんでした。\n" * 40,
    "Korean": "사람들은 정오에 모였고 아무도 그 이유를 몰랐다.\n" * 40,
    "emoji": "🦙🦙 some words, and a llama 🦙\n" * 40,
}
WIDE = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


def read(path: Path, told: list[str] | None = None) -> str:
    return "".join(documents([path], "all", tell=(told if told is not None else []).append))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("encoding", WIDE)
def test_unicode_is_read_with_and_without_a_mark(tmp_path: Path, language: str, encoding: str) -> None:
    text = LANGUAGES[language]
    (tmp_path / "text.txt").write_bytes(text.encode(encoding))
    told: list[str] = []
    assert read(tmp_path / "text.txt", told) == text
    record = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "text.jsonl").write_bytes(f"{record}\r\n\n{record}\n".encode(encoding))
    assert read(tmp_path / "text.jsonl", told) == text * 2
    assert not told


@pytest.mark.parametrize(
    ("language", "encoding"),
    [
        ("German", "cp1252"),
        ("Russian", "cp1251"),
        ("Russian", "koi8_r"),
        ("Chinese", "gb18030"),
        ("Japanese", "shift_jis"),
        ("Japanese", "euc_jp"),
        ("Korean", "euc_kr"),
    ],
)
def test_an_older_encoding_is_refused_by_its_name(tmp_path: Path, language: str, encoding: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(LANGUAGES[language].encode(encoding))
    with pytest.raises(DataError, match=encoding) as caught:
        read(path)
    assert caught.value.code == "LZ302"
    assert caught.value.where == str(path)
    assert caught.value.fix.startswith(f"iconv -f {encoding.upper().replace('_', '-')} -t UTF-8")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"%PDF-1.7\nwords", "PDF"),
        (b"PK\x03\x04 words", "zip"),
        (b"\x89PNG\r\n", "picture"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (b"PAR1 words", "parquet"),
        (b"name" + bytes(253) + b"ustar words", "tar"),
        (bytes(1000), "binary"),
        (bytes(range(256)) * 8, "binary"),
        (os.urandom(4000) + b"\0" * 96, "binary"),
        (b"\xff\xfe" + b"\x00\xdc" * 100, "damaged UTF-16"),
        (b"\x81\x8d\x9d" * 400, "no encoding that is known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("content", "text", "damaged"),
    [
        (b"word " * 4000 + b"\xff", "word " * 4000 + "\ufffd", True),
        ("größer ".encode() * 100 + b"\xfc", "größer " * 100 + "\ufffd", True),
        (b"a half: \xed\xa0\x80\n" * 9, f"a half: {3 * chr(0xFFFD)}\n" * 9, False),
        ("a \ufffd that was written\n".encode(), "a \ufffd that was written\n", False),
        (b"cut in a charac\xc3", "cut in a charac\ufffd", False),
        (b"one zero\0 in many\n" + b"word " * 500, "one zero\0 in many\n" + "word " * 500, False),
        (b"", "", False),
        (b"\xef\xbb\xbf", "", False),
    ],
    ids=range(8),
)
def test_a_little_damage_is_told_and_read(tmp_path: Path, content: bytes, text: str, damaged: bool) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    told: list[str] = []
    assert read(tmp_path / "text.txt", told) == text
    assert [bool(text) and "not UTF-8" in note for note in told] == [True] * damaged


def test_a_character_at_the_end_of_what_is_looked_at(tmp_path: Path) -> None:
    for encoding, start in itertools.product(("utf-8", "utf-16-le"), ("", "x", "xx", "xxx")):
        text = start + "🦙🦙🦙 llama\n" * 80_000
        (tmp_path / "text.txt").write_bytes(text.encode(encoding))
        told: list[str] = []
        assert read(tmp_path / "text.txt", told) == text
        assert not told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("größer 🦙", "größer 🦙"),
        ("a\ud83e\udd99b", "a🦙b"),
        ("a\ud83e", "a\ufffd"),
        ("\udd99a", "\ufffda"),
        ("\udd99\ud83e", "\ufffd\ufffd"),
        ("\udcff", "\ufffd"),
    ],
    ids=ascii,
)
def test_halves_of_pairs(tmp_path: Path, text: str, expected: str) -> None:
    assert without_surrogates(text) == expected
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps(record) + "\n" for record in ({"text": text}, {"prompt": text, "completion": text}))
    )
    first, second = documents([path], "all")
    assert first == expected
    assert second == f"user: {expected}\n\nassistant: {expected}\n\n"
    assert len([*documents([path], "calibration"), *documents([path], "heldout")]) == 2


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pa.compress(content, codec="zstd", asbytes=True)),
}
TEXT = LANGUAGES["German"]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text", "text.TXT"])
def test_compressed(tmp_path: Path, suffix: str, name: str) -> None:
    content = json.dumps({"text": TEXT}) if name.endswith("jsonl") else TEXT
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](content.encode("utf-16")))
    assert read(path) == TEXT


@pytest.mark.parametrize("suffix", COMPRESS)
def test_names_may_lie(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "plain").with_suffix(f".txt{suffix}").write_text(TEXT)
    (tmp_path / "text.txt").write_bytes(COMPRESS[suffix](TEXT.encode()))
    assert read(tmp_path / "text.txt") == TEXT
    assert read(tmp_path / f"plain.txt{suffix}") == TEXT


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:20] + b"damage" + raw[26:]])
def test_damaged_archives(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](os.urandom(3000).hex().encode())))
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.where == str(path)


def test_the_package_for_zstd_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "text.txt.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd and more")
    with pytest.raises(DataError, match="not installed") as caught:
        read(path)
    assert caught.value.fix == "pip install zstandard"


class Standard:
    """Standard input of these bytes."""

    closed = False

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def parquet(text: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-16"),
        gzip.compress(TEXT.encode()),
        json.dumps({"text": TEXT}).encode(),
        gzip.compress(b"\n\n" + json.dumps({"text": TEXT}).encode()),
        parquet(TEXT),
    ],
    ids=["text", "utf-16", "gz", "jsonl", "jsonl.gz", "parquet"],
)
def test_standard_input_is_looked_into_and_can_be_read_again(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Standard(content))
    for _ in range(2):
        assert "".join(documents("-", "all")) == TEXT


@pytest.mark.parametrize("stdin", [None, io.StringIO("text")], ids=["closed", "without bytes"])
def test_no_standard_input(stdin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(DataError, match="standard input"):
        list(documents("-", "all"))


def test_what_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentize.text.decoding._PIPED_BYTES", 1 << 16)
    with Path("/dev/zero").open("rb") as endless:
        standard = Standard(b"")
        standard.buffer = endless  # type: ignore[assignment]
        monkeypatch.setattr(sys, "stdin", standard)
        with pytest.raises(DataError, match="by a pipe"):
            Source.stdin()


def test_a_pipe_with_a_name_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(TEXT,))
    writer.start()
    assert read(path) == read(path) == TEXT
    writer.join()


def test_an_encoding_by_its_python_name() -> None:
    assert encoding_of("größer".encode(), "") == "utf-8"
    assert encoding_of("größer und".encode("utf-16-be"), "") == "utf-16-be"
