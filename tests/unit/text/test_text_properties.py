"""Whatever is in a file, it is text that has both parts, or an error of the user's; neither takes long."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from tests.common import mutants
from tests.models import byte_tokenizer

from latentize.errors import LatentizeError
from latentize.text.documents import TextWarning
from latentize.text.drawing import Part, draw, draw_all

SECONDS = 20
SUFFIXES = [".txt", ".md", ".jsonl", ".parquet", "", ".gz", ".txt.gz", ".jsonl.zst", ".txt.xz"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "cp1252", "gb18030"]
PARTS = [Part("calibration", 2048, 1), Part("heldout", 512)]
# Files that are written, and no two examples share them.
FEW = mutants(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [text.encode("utf-8", "replace").decode() for text in texts]}), sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def records(texts: list[str]) -> bytes:
    messages = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    return "".join(json.dumps(record) + "\n" for record in (*({"text": t} for t in texts), *messages)).encode()


# Lone surrogates, too.
any_text = st.text(st.characters(), max_size=300)
texts = st.lists(any_text, max_size=6)
encoded = st.builds(
    lambda text, encoding, times: (text * times).encode(encoding, "replace"),
    any_text,
    st.sampled_from(ENCODINGS),
    st.sampled_from([1, 3, 40]),
)
plain = st.one_of(st.binary(max_size=3000), encoded, st.builds(records, texts), st.builds(parquet, texts))
compressed = st.builds(
    lambda compress, content: compress(content),
    st.sampled_from([gzip.compress, bz2.compress, lzma.compress, zstd]),
    plain,
)
contents = st.one_of(plain, compressed)


def mutated(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """With stretches replaced."""
    for at, size, new in changes:
        at %= len(content) + 1
        content = content[:at] + new + content[at + size :]
    return content


mutations = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 40), st.binary(max_size=8)), max_size=4)


def read(tokenizer: Any, content: bytes, suffix: str, length: int) -> None:
    """All that may happen: an error with a code, or rows of that length from both parts."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        path = Path(folder, f"text{suffix}")
        path.write_bytes(content)
        for ask in (
            lambda: draw(tokenizer, path, PARTS, sequence_length=length),
            lambda: [draw_all(tokenizer, folder, tokens=512, sequence_length=length)],
        ):
            started, found, refusal = time.monotonic(), [], None
            try:
                found = ask()
            except LatentizeError as error:
                refusal = error
            assert time.monotonic() - started < SECONDS
            assert all(len(rows_NT) >= 1 and rows_NT.shape[1] == length for rows_NT in found)
            if refusal is None:
                assert found
            else:
                assert refusal.code == "LZ302"
                assert refusal.where and refusal.fix


@FEW
@given(content=contents, changes=mutations, suffix=st.sampled_from(SUFFIXES), length=st.sampled_from([2, 16, 64]))
def test_any_file(
    tokenizer: Any, content: bytes, changes: list[tuple[int, int, bytes]], suffix: str, length: int
) -> None:
    read(tokenizer, mutated(content, changes), suffix, length)


NAMES = st.sampled_from(
    ["text", "content", "messages", "conversations", "role", "from", "value", "prompt", "completion", "instruction",
     "input", "output", "tool_calls"]
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | any_text, inner, max_size=4),
    max_leaves=12,
)


@FEW
@given(lines=st.lists(json_values, max_size=5))
def test_any_record(tokenizer: Any, lines: list[Any]) -> None:
    read(tokenizer, "".join(json.dumps(line) + "\n" for line in lines).encode(), ".jsonl", 4)


LARGE: dict[str, Callable[[int], bytes]] = {
    "one letter": lambda size: b"a" * size,
    "one letter in UTF-16": lambda size: ("a" * (size // 2)).encode("utf-16"),
    "line ends": lambda size: b"\n" * size,
    "halves of line ends": lambda size: b"\r" * size,
    "spaces": lambda size: b" " * size,
    "zeros": lambda size: b"\0" * size,
    "brackets": lambda size: b"[" * size,
    "names": lambda size: b'{"a":' * (size // 5),
    "every byte": lambda size: bytes(range(256)) * (size // 256),
    "combining marks": lambda size: ("e" + "\u0301" * 40).encode() * (size // 81),
    "broken UTF-8": lambda size: b"\xf0\x9f" * (size // 2),
    "bytes that two encodings share": lambda size: b"\xe4\xa1" * (size // 2),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ""])
def test_a_megabyte_of_one_thing(tokenizer: Any, kind: str, suffix: str) -> None:
    read(tokenizer, LARGE[kind](1 << 20), suffix, 512)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 511, 512, 1023, 1024, 1025, 16_384, 16_385, 1 << 20])
def test_every_size_of_good_text_has_both_parts(tokenizer: Any, tmp_path: Path, size: int) -> None:
    text = "".join(f"{n:07d}\n" for n in range(size // 8 + 1))[:size]
    for name, content in (("a.txt", text.encode()), ("b.txt", text.encode("utf-16")), ("c.jsonl", records([text]))):
        (tmp_path / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TextWarning)
            if size < 1023:
                with pytest.raises(LatentizeError, match="LZ302"):
                    draw(tokenizer, tmp_path / name, PARTS, sequence_length=1024)
            if size >= 1024:
                rows = draw(tokenizer, tmp_path / name, PARTS, sequence_length=512)
                assert all(len(rows_NT) for rows_NT in rows)
