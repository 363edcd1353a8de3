"""Text as users have it, and paths as they write them, through the commands."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import SMALL, call_cli, last_json

import latentize
from latentize.checkpoint import Manifest
from latentize.errors import CheckpointError, OptionError, OutputError
from latentize.paths import expanded
from latentize.text.documents import TextWarning

Run = Callable[..., dict[str, Any]]
QUICK = ("--tokens", 512, "--sequence-length", 64)


@pytest.fixture
def home(tmp_path: Path, source: Callable[..., Path], text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model and a text in it; commands run elsewhere, where nothing may appear."""
    folder, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for made in (folder, elsewhere):
        made.mkdir()
    shutil.copytree(source(), folder / "model")
    shutil.copyfile(text, folder / "text.jsonl")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(elsewhere)
    return folder


@pytest.fixture
def ok(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object) -> dict[str, Any]:
        done = call_cli(capsys, *args, "--json")
        assert done.returncode == 0, done.stderr
        return last_json(done.stdout)

    return run


def test_every_command_takes_the_home_folder(
    home: Path, ok: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "recipe.yaml").write_text("data: [~/text.jsonl]\nkeep: 50%\n")
    ok("inspect", "~/model")
    ok("plan", "~/model/config.json")
    small = ("--tokens", 2048, "--sequence-length", 64, "--dtype", "float32", "--fast")
    ok("convert", "~/model", "~/out", "--recipe", "~/recipe.yaml", *small)
    assert Manifest.load(home / "out").recipe["data"] == ["~/text.jsonl"]
    data = ("--data", "~/text.jsonl", *QUICK)
    ok("eval", "~/out", "--reference", "~/model", *data)
    ok("compare", "~/model", "~/out", "--plot", "~/compare.svg", *data)
    ok("bench", "~/out", "--reference", "~/model", "--context", 16, "--steps", 1, "--plot", "~/bench.svg")
    ok("generate", "~/out", "words", "--max-new-tokens", 2)
    ok("verify", "~/out")
    healed = ("--step-tokens", 256, "--looks", 1, "--no-autocast")
    ok("heal", "~/out", "~/healed", "--teacher", "~/model", *healed, *data)
    (home / "out" / "report.html").unlink()
    assert ok("report", "~/out", "--reference", "~/model")["report"] == str(home / "out" / "report.html")
    kinds = [json.loads(line)["kind"] for line in (home / "out" / "measurements.jsonl").read_text().splitlines()]
    assert kinds == ["eval", "bench", "sample"]
    assert {"compare.svg", "bench.svg", "healed", "out"} <= {path.name for path in home.iterdir()}
    for args in (
        ("convert", "~/model", "~/out"),
        ("heal", "~/out", "~/healed", "--teacher", "~/model"),
        ("export", "~/out", "~/text.jsonl"),
        ("demo", "~/out"),
    ):
        done = call_cli(capsys, *args)
        assert (done.returncode, "LZ401" in done.stderr) == (2, True), done.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_every_function_takes_the_home_folder(home: Path, tmp_path: Path) -> None:
    latentize.convert("~/model", Path("~/out"), keep="50%", data=("~/text.jsonl",), **SMALL)
    assert latentize.verify(Path("~/out"))["ok"]
    options = {"tokens": 512, "sequence_length": 64}
    found = latentize.evaluate(Path("~/out"), Path("~/model"), data="~/text.jsonl", **options)
    assert found == latentize.evaluate("~/out", "~/model", data=[home / "text.jsonl"], **options) | {
        "text": "~/text.jsonl"
    }
    with pytest.raises(OutputError, match="LZ401"):
        latentize.export(Path("~/out"), Path("~/text.jsonl"))
    with pytest.raises(OutputError, match="LZ404"):
        latentize.convert("~/model", "~/model", keep="50%", data=("~/text.jsonl",), **SMALL)
    assert latentize.Recipe.load("~/out/latentize.json").data == ("~/text.jsonl",)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_paths_of_tasks_and_engines(home: Path) -> None:
    from latentize.engines.run import engine_python
    from latentize.evaluation.tasks import _is_path, _manager

    assert _is_path("~") and _is_path("~/task.yaml")
    (home / "tasks").mkdir()
    with pytest.raises(OptionError, match="no such folder") as caught:
        _manager([], Path("~/nowhere"))
    assert str(home / "nowhere") in caught.value.where
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "venv" / "bin" / "python").touch()
    assert engine_python("vllm", Path("~/venv")) == home / "venv" / "bin" / "python"


def test_a_user_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "~nobody-of-this-name/x"
    assert expanded(name) == tmp_path / name
    for ask in (latentize.verify, lambda path: latentize.evaluate(path), lambda path: latentize.heal(path, "o", "t")):
        with pytest.raises(CheckpointError):
            ask(name)
    with pytest.raises(OptionError, match="recipe"):
        latentize.Recipe.load(name)
    assert list(tmp_path.iterdir()) == []


def test_a_small_text_is_converted_with_a_note(
    source: Callable[..., Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One record, which no hash can divide; it is learnt from and reported on, and nobody is left to wonder."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": Path(text).read_text()[:3000]}) + "\n")
    sizes = ("--tokens", 2048, "--sequence-length", 64, "--dtype", "float32", "--fast", "--json")
    done = call_cli(capsys, "convert", source(), tmp_path / "out", "--data", tmp_path / "one.jsonl", *sizes)
    assert done.returncode == 0, done.stderr
    notes = last_json(done.stdout)["notes"]
    told = [line.removeprefix("note: ") for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert told == notes[: len(told)] and len(told) == 3
    assert "sequences of the same documents" in told[0]
    assert "were asked for" in told[1] and "were asked for" in told[2]
    assert Manifest.load(tmp_path / "out").notes == notes
    assert all(note in (tmp_path / "out" / "README.md").read_text() for note in told)


def test_a_small_text_is_healed_on(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    words = Path(text).read_text()
    (tmp_path / "small.txt").write_text(words[:1500])
    latentize.convert(source(), tmp_path / "out", keep="50%", data=(text,), **SMALL)
    options = {"sequence_length": 64, "looks": 1, "autocast": False}
    with pytest.warns(TextWarning, match="sequences of the same documents"):
        told = latentize.heal(
            tmp_path / "out", tmp_path / "healed", source(), data=(str(tmp_path / "small.txt"),), **options
        )
    assert 0 < told["tokens"] + told["evaluation_tokens"] < 1501
    (tmp_path / "two.txt").write_text(words[:128])
    with pytest.warns(TextWarning, match="one sequence of text is all there is"):
        told = latentize.heal(
            tmp_path / "out", tmp_path / "more", source(), data=(str(tmp_path / "two.txt"),), **options
        )
    assert told["tokens"] == 64


def test_standard_input(source: Callable[..., Path], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes by a pipe, compressed, is what is in the file."""
    command = ("eval", source(), *QUICK, "--json", "--data")
    content = gzip.compress(Path(text).read_bytes())
    piped = [sys.executable, "-m", "latentize", *map(str, command), "-"]
    done = subprocess.run(piped, input=content, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found, expected = last_json(done.stdout.decode()), last_json(call_cli(capsys, *command, text).stdout)
    assert found.pop("text") == "standard input"
    assert found == {k: v for k, v in expected.items() if k != "text"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"few words", "--sequence-length 5"),
        ("größer und weiter\n".encode("latin-1") * 9, "cp1252"),
        (b"%PDF-1.4", "PDF"),
        (b"\x1f\x8b\x08 broken", "cannot read"),
    ],
    ids=["empty", "short", "older", "PDF", "broken"],
)
def test_refusals(
    source: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    done = call_cli(capsys, "convert", source(), tmp_path / "out", "--keep", "50%", "--data", tmp_path / "text.txt")
    assert done.returncode == 2
    assert "LZ302" in done.stderr and words in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_prompt_whose_bytes_are_not_utf8(source: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """As the system hands over what a shell was given as ``$'\\xff'``."""
    done = call_cli(capsys, "generate", source(), "words \udcff", "--max-new-tokens", 2, "--json")
    assert done.returncode == 0, done.stderr
