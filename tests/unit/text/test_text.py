"""No document is in two splits, on any machine, in any run."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.common import run_python

from latentize.errors import DataError
from latentize.text.documents import describe, documents, pieces, stdlib_documents

TEXTS = [f"document {n}: " + "some words " * (n % 7 + 1) for n in range(300)]


def save(path: Path, texts: list[Any]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"other": list(range(len(texts))), "text": texts}), path)
    else:
        path.write_text("".join(texts))
    return str(path)


def test_the_standard_library_in_two_disjoint_parts() -> None:
    calibration, heldout = (list(stdlib_documents(split)) for split in ("calibration", "heldout"))
    assert not set(calibration) & set(heldout)
    both = list(stdlib_documents("all"))
    assert sorted(calibration + heldout) == sorted(both)
    assert 0.005 < len(heldout) / len(both) < 0.05, "2 % are held out"
    assert all(len(text) > 200 for text in both)
    assert list(documents((), "heldout")) == heldout
    assert list(documents(("python-stdlib",), "heldout")) == heldout


def test_calibration_is_training_and_selection() -> None:
    calibration, training, selection = (
        list(stdlib_documents(split)) for split in ("calibration", "training", "selection")
    )
    assert sorted(calibration) == sorted(training + selection)
    assert 0 < len(selection) < len(training) / 20


def test_splits_do_not_depend_on_the_process() -> None:
    """Python's own ``hash`` of a string differs from run to run."""
    code = (
        "import hashlib; from latentize.text.documents import documents\n"
        "print([hashlib.md5(t.encode()).hexdigest() for t in documents((), 'heldout')])"
    )
    one, other = (run_python(code, env={"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2"))
    assert one == other
    here = [hashlib.md5(t.encode()).hexdigest() for t in documents((), "heldout")]
    assert one.strip() == str(here)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_of_documents(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"text{suffix}", [*TEXTS, "  \n"])
    calibration, heldout = (list(documents([path], split)) for split in ("calibration", "heldout"))  # type: ignore[arg-type]
    assert not set(calibration) & set(heldout)
    assert 0.03 < len(heldout) / len(TEXTS) < 0.2, "a tenth is held out"
    assert list(documents([path], "all")) == TEXTS
    assert calibration == [t for t in TEXTS if t not in set(heldout)], "in the order of the file"
    assert list(documents([path], "heldout")) == heldout


def test_a_document_is_in_the_same_split_wherever_it_stands(tmp_path: Path) -> None:
    """The text decides, not its number: a file in another order, or another format, splits alike."""
    files = [save(tmp_path / "a.jsonl", TEXTS), save(tmp_path / "b.parquet", TEXTS[::-1])]
    parts = [set(documents([f], "heldout")) for f in files]
    assert parts[0] == parts[1]
    assert set(documents(files, "heldout")) == parts[0]


def test_a_long_text_is_cut_at_line_ends_and_split(tmp_path: Path) -> None:
    lines = [f"{n} " + "word " * 30 + "\n" for n in range(8000)]
    path = save(tmp_path / "book.txt", lines)
    pieces = {split: list(documents([path], split)) for split in ("all", "calibration", "heldout")}  # type: ignore[arg-type]
    assert "".join(pieces["all"]) == "".join(lines)
    assert all(piece.endswith("\n") for piece in pieces["all"])
    assert pieces["calibration"]
    assert pieces["heldout"]
    assert sorted(pieces["calibration"] + pieces["heldout"]) == sorted(pieces["all"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("text.jsonl", '{"text": 3}\n', "text"),
        ("text.jsonl", '["a"]\n', "text"),
        ("text.jsonl", "{\n", "cannot read"),
        ("text.parquet", "not parquet", "cannot read"),
        ("text.csv", "a,b\n", "csv"),
        ("text.json", "[]", "json"),
        ("text.tar.gz", "", "tar"),
        ("text.jsonl", "[" * 100_000, "no JSON"),
        ("text.jsonl", "1" * 10_000, "no JSON"),
        ("text.jsonl", "null\n", "text"),
        ("text.jsonl.gz", "not JSON", "no JSON"),
    ],
)
def test_files_that_hold_no_text(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        list(documents([str(tmp_path / name)], "all"))
    assert name in caught.value.where


@pytest.mark.parametrize("columns", [{"other": ["a"]}, {"text": [1, 2]}, {"text": ["a", None]}], ids=repr)
def test_parquet_without_text(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="text") as caught:
        list(documents([str(tmp_path / "text.parquet")], "all"))
    assert "text.parquet" in caught.value.where


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.jsonl", "a/b/nowhere", "/nowhere/at/all"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(DataError, match="no such text file") as caught:
        list(documents([name], "all"))
    assert caught.value.where == name


def test_a_folder_is_all_its_text_files_by_name(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save(tmp_path / "b.jsonl", ["second"])
    save(tmp_path / "a.txt", ["first"])
    save(inner / "c.md", ["third"])
    for name in (".hidden.txt", "weights.bin", "script.py"):
        (tmp_path / name).write_bytes(b"\xff\x00")
    assert list(documents([tmp_path], "all")) == ["first", "second", "third"]


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="no text file in the folder") as caught:
        list(documents([str(tmp_path)], "all"))
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("given", [str, Path, lambda path: [str(path)], lambda path: (path,)])
def test_one_path_or_several(tmp_path: Path, given: Callable[[Path], Any]) -> None:
    save(tmp_path / "text.txt", ["some words"])
    data = given(tmp_path / "text.txt")
    assert list(documents(data, "all")) == ["some words"]
    assert describe(data) == str(tmp_path / "text.txt")


@pytest.mark.parametrize(
    "source",
    ["", "./nowhere", "../nowhere", "~/nowhere", "~nobody-of-this-name/x", "x" * 5000, "a\0b/c/d", "\udcff.txt"],
)
def test_a_path_that_cannot_be_a_data_set(source: str) -> None:
    with pytest.raises(DataError) as caught:
        list(documents([source], "all"))
    assert caught.value.where == source


def test_a_path_whose_bytes_are_not_utf8_can_be_written_down() -> None:
    describe(["a\udcff.txt"]).encode("utf-8")


@pytest.mark.parametrize("package", ["datasets", "pyarrow.parquet"])
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "text.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match="not installed") as caught:
        list(documents([path if package.startswith("pyarrow") else "organisation/name"], "all"))
    assert "pip install" in caught.value.fix


def test_pieces_of_one_document_are_told_apart(tmp_path: Path) -> None:
    path = save(tmp_path / "one.jsonl", ["".join(f"line {n} of the only document\n" for n in range(9000))])
    assert list(documents([path], "all", cut=True)) == list(pieces("".join(documents([path], "all")), 4096))
    found, rest = (list(documents([path], s, cut=True)) for s in ("calibration", "heldout"))
    assert found and rest and not set(found) & set(rest)
    assert sorted(found + rest) == sorted(documents([path], "all", cut=True))


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    """Nothing else would bound the memory that a compressed file can ask for."""
    path = tmp_path / "zeros.txt.gz"
    path.write_bytes(gzip.compress(b"0" * (40 << 20), 1))
    assert [len(text) for text in documents([path], "all")] == [1 << 24, 1 << 24, 8 << 20]


def test_a_report_says_which_text() -> None:
    assert "standard library" in describe(())
    assert describe(["a.txt", "b.txt"]) == "a.txt, b.txt"
