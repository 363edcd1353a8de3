"""What takes long is not lost: a place that cannot be written is refused before, what was measured is printed first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import SMALL, call_cli, last_json, leftovers, run_cli
from tests.models import pico

from latentize import api
from latentize.checkpoint import Journal, OutputFolder, places
from latentize.checkpoint.manifest import Manifest
from latentize.errors import LatentizeError, OutputError, ResumeError
from latentize.report.card import licence

SMALL_EVAL = ("--tokens", 512, "--sequence-length", 64)


@pytest.fixture(scope="module")
def made(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kept") / "out"
    api.convert(source("llama", 2), out, keep="50%", data=(text,), **SMALL)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def blocked(folder: Path, name: str) -> None:
    """A file's name is that of a folder: not even the superuser can write it."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


def measuring(command: str, out: Path, text: str) -> tuple[object, ...]:
    return {
        "eval": ("eval", out, "--data", text, *SMALL_EVAL),
        "bench": ("bench", out, "--context", "16", "--steps", 1),
        "report": ("report", out, "--reference", out),
    }[command]


@pytest.mark.parametrize("command", ["eval", "bench", "report"])
@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (lambda folder: blocked(folder, "report.html"), "LZ405"),
        (lambda folder: blocked(folder, "measurements.jsonl"), "LZ405"),
        (lambda folder: (folder / "measurements.jsonl").write_bytes(b"\xff\n"), "LZ118"),
        (
            lambda folder: (folder / "measurements.jsonl").write_text('{"kind": "eval", "at": "", "result": {}}'),
            "LZ118",
        ),
        (lambda folder: (folder / "measurements.jsonl").write_text("[" * 100_000), "LZ118"),
        (lambda folder: (folder / "latentize.json").write_bytes(b"\xff"), "LZ118"),
    ],
    ids=["report", "measurements", "not text", "nothing in it", "deep", "manifest"],
)
def test_what_cannot_be_kept_is_not_measured(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    text: str,
    command: str,
    harm: Callable[[Path], object],
    code: str,
) -> None:
    harm(out)
    for name in ("evaluate", "bench", "generate"):
        monkeypatch.setattr(api, name, lambda *args, **options: pytest.fail("this takes long"))
    done = call_cli(capsys, *measuring(command, out, text))
    assert done.returncode == 2 and code in done.stderr and done.stdout == ""


@pytest.mark.parametrize("command", ["eval", "bench"])
@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.parametrize("name", ["report.html", "measurements.jsonl"])
def test_what_cannot_be_kept_after_all_is_printed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    text: str,
    command: str,
    form: tuple[str, ...],
    name: str,
) -> None:
    run = getattr(api, {"eval": "evaluate"}.get(command, command))

    def measured(*args: Any, **options: Any) -> Any:
        found = run(*args, **options)
        blocked(out, name)
        return found

    monkeypatch.setattr(api, {"eval": "evaluate"}.get(command, command), measured)
    done = call_cli(capsys, *measuring(command, out, text), *form)
    assert done.returncode == 2 and "LZ405" in done.stderr and name in done.stderr
    if form:
        assert ("perplexity" if command == "eval" else "rows") in last_json(done.stdout)
    else:
        assert ("perplexity" if command == "eval" else "prefill") in done.stdout


@pytest.mark.parametrize("command", ["bench", "compare"])
@pytest.mark.parametrize("plot", ["nowhere/chart.svg", "folder", "n" * 300, "file/chart.svg"])
def test_a_chart_that_cannot_be_written_is_refused_before(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Path, command: str, plot: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    models = (made, made) if command == "compare" else (made,)
    done = call_cli(capsys, command, *models, "--plot", tmp_path / plot)
    assert done.returncode == 2 and "LZ405" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_full_stdout(out: Path, text: str, command: str) -> None:
    """What cannot be printed is kept, and it is said."""
    code = "import sys; sys.argv[1:] = sys.argv[1:]; from latentize.cli import main; main()"
    arguments = [sys.executable, "-c", code, *map(str, measuring(command, out, text)), "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2 and "LZ405" in done.stderr and "Traceback" not in done.stderr
    assert len((out / "measurements.jsonl").read_text().splitlines()) == 1


def test_a_line_that_does_not_fit_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    places.append_line(path, "whole")
    real = Path.open

    def half(self: Path, *args: Any, **options: Any) -> Any:
        stream = real(self, *args, **options)

        def write(text: str) -> int:
            type(stream).write(stream, text[:3])
            stream.flush()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(stream, "write", write, raising=False)
        return stream

    monkeypatch.setattr(Path, "open", half)
    for target in (path, tmp_path / "new"):
        with pytest.raises(OutputError) as caught:
            places.append_line(target, "another")
        assert caught.value.code == "LZ405"
    monkeypatch.undo()
    assert path.read_text() == "whole\n" and not (tmp_path / "new").exists()


def test_a_file_that_does_not_fit_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    places.write_file(path, "before")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        places.write_file(path, "after")
    monkeypatch.undo()
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["page.html"]


def dangling(tmp_path: Path) -> Path:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("place", "code"),
    [
        (dangling, "LZ401"),
        (lambda tmp_path: tmp_path / ("n" * 250), "LZ402"),
        (lambda tmp_path: tmp_path / ("n" * 300), "LZ402"),
        (lambda tmp_path: tmp_path / ("n" * 300) / "out", "LZ402"),
        (lambda tmp_path: Path("/proc/out"), "LZ402"),
    ],
    ids=["link", "long", "longer", "in a long one", "proc"],
)
@pytest.mark.parametrize("command", ["convert", "heal", "demo"])
def test_an_output_that_cannot_be(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    made: Path,
    source: Callable[..., Path],
    tmp_path: Path,
    command: str,
    place: Callable[[Path], Path],
    code: str,
) -> None:
    from latentize.cli import demo
    from latentize.conversion import job
    from latentize.healing import run as healing

    for where, name in ((demo, "evaluate"), (healing, "_text"), (job, "draw_text")):
        monkeypatch.setattr(where, name, lambda *args, **options: pytest.fail("this takes long"))
    out, model = place(tmp_path), source("llama", 2)
    more = {"convert": (model, out), "heal": (made, out, "--teacher", model), "demo": (out,)}[command]
    before = sorted(os.listdir(tmp_path))
    done = call_cli(capsys, command, *more)
    assert done.returncode == 2 and code in done.stderr, done.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_a_model_with_a_name_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "plan", "eval", "report"):
        done = call_cli(capsys, command, "n" * 300)
        assert done.returncode == 2 and "LZ" in done.stderr and "Traceback" not in done.stderr


REQUEST = {"recipe": 1}


def test_another_conversion_to_the_same_place(tmp_path: Path) -> None:
    """Whoever comes second hears of it before it begins, however close they were."""
    out = tmp_path / "out"
    first, second = Journal(out), Journal(out)
    with first:
        first.begin(REQUEST)
        with pytest.raises(ResumeError) as caught, second:
            second.begin({"recipe": 2})
        assert caught.value.code == "LZ413" and "another conversion" in caught.value.what
        for resume in (False, True):
            with pytest.raises(ResumeError) as caught, Journal(out, resume=resume) as third:
                third.begin({"recipe": 3})
            assert caught.value.code == "LZ413"
        assert first.folder is not None and leftovers(tmp_path, out) == [first.folder.name]
    assert leftovers(tmp_path, out) == []


def test_an_interrupted_conversion_is_nobodys(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = Journal(out)
    first.begin(REQUEST)
    assert first._stream is not None
    first._stream.close()
    with pytest.raises(ResumeError) as caught:
        Journal(out)
    assert caught.value.code == "LZ411"
    with pytest.raises(ResumeError) as caught:
        Journal(out, resume=True).begin({"recipe": 2})
    assert caught.value.code == "LZ412"


def test_two_that_begin_at_once(tmp_path: Path) -> None:
    """Of many that have all seen nothing one begins, and one at least."""
    out = tmp_path / "out"
    journals = [Journal(out) for _ in range(8)]
    codes: list[str] = []
    gate = threading.Barrier(len(journals))

    def begin(number: int) -> None:
        gate.wait()
        try:
            journals[number].begin({"recipe": number})
            codes.append("began")
        except LatentizeError as error:
            codes.append(error.code)

    threads = [threading.Thread(target=begin, args=(n,)) for n in range(len(journals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == ["LZ413"] * (len(journals) - 1) + ["began"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_name_that_was_taken_meanwhile(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    manifest = Manifest(format="native", source={}, recipe={})
    with OutputFolder(out) as folder:
        if kind == "folder":
            out.mkdir()
            (out / "theirs").write_text("theirs")
        else:
            out.write_text("theirs")
        with pytest.raises(OutputError) as caught:
            folder.finish({}, manifest)
    assert caught.value.code == "LZ406" and "disk" not in str(caught.value)
    assert leftovers(tmp_path, out) == ["out"]
    assert (out / "theirs" if kind == "folder" else out).read_text() == "theirs"


def test_two_healings_to_the_same_place(
    made: Path, source: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentize.healing import run as healing

    options: dict[str, Any] = {"tokens": 512, "sequence_length": 64, "selection_tokens": 128, "data": (text,)}
    out = tmp_path / "healed"
    learn = healing._learn

    def meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(healing, "_learn", learn)
        for seed in (1, 2):
            with pytest.raises(LatentizeError) as caught:
                api.heal(made, out, source("llama", 2), resume=True, seed=seed, **options)
            assert caught.value.code == {1: "LZ413", 2: "LZ412"}[seed]
        raise KeyboardInterrupt

    monkeypatch.setattr(healing, "_learn", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        api.heal(made, out, source("llama", 2), seed=1, **options)


NAMES = ["out[/v2]", "out[v2]", "out[bold]", "a :smile: b", "[link=x]", "out\\[v2]"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(made, tmp_path / name))
    for command in ("inspect", "plan", "verify", "report"):
        done = call_cli(capsys, command, out)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr
        printed = "".join((done.stdout + done.stderr).split())
        assert name.replace(" ", "") in printed, command
    done = call_cli(capsys, "eval", tmp_path / f"no{name}")
    assert done.returncode == 2 and f"no{name}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out[/v2]", "out[v2]", "out\udcff"])
def test_a_conversion_to_such_a_name(source: Callable[..., Path], text: str, tmp_path: Path, name: str) -> None:
    arguments = ("--keep", "50%", "--fast", "--data", text, *SMALL_EVAL)
    done = run_cli("convert", source("llama", 2), tmp_path / name, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (name if name.isascii() else "\\udcff") in done.stdout
    assert (tmp_path / name / "report.html").is_file()


def test_a_terminal_of_few_letters(made: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made, tmp_path / "größe"))
    done = run_cli("inspect", out, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and "gr\\xf6\\xdfe" in done.stdout, done.stderr


FRONTS: dict[str, tuple[str, dict[str, Any]]] = {
    "number": ("license: 4.0", {"license": "4.0"}),
    "date": ("license: 2024-01-31", {"license": "2024-01-31"}),
    "no date": ("license: mit\ndate: 2024-13-45", {"license": "mit"}),
    "mapping": ("license: {name: mit}", {"license": "unknown"}),
    "truth": ("license: yes", {"license": "yes"}),
    "nothing": ("license: ~", {"license": "unknown"}),
    "list": ("license: [mit, 2, {a: b}, ~]", {"license": ["mit", "2"]}),
    "list of nothing": ("license: [{a: b}]", {"license": "unknown"}),
    "itself": ("license: &a [*a, mit]", {"license": "unknown"}),
    "other": (
        "license: other\nlicense_name: 1.10\nlicense_link: [a]",
        {"license": "other", "license_name": "1.10", "license_link": ["a"]},
    ),
    "lines": ("license: |\n  a\n  b", {"license": "a b"}),
    "deep": ("license: " + "[" * 5000, {"license": "unknown"}),
    "tag": ("license: !!python/object:os.system x", {"license": "unknown"}),
    "bytes": ("license: !!binary a", {"license": "a"}),
}


@pytest.mark.parametrize("name", FRONTS)
def test_whatever_a_card_says_of_a_licence(tmp_path: Path, name: str) -> None:
    front, expected = FRONTS[name]
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    found = licence(tmp_path)
    if name in ("tag", "bytes"):
        assert found["license"]
    else:
        assert found == expected


@pytest.mark.parametrize("name", ["number", "date", "no date", "mapping", "list", "deep"])
def test_a_card_is_written_whatever_the_source_says(text: str, tmp_path: Path, name: str) -> None:
    import yaml

    model = pico(tmp_path, num_hidden_layers=1)
    (model / "README.md").write_text(f"---\n{FRONTS[name][0]}\n---\n")
    api.convert(model, tmp_path / "out", to="mqa", data=(text,), **SMALL)
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == FRONTS[name][1]["license"]
    assert json.loads((tmp_path / "out" / "latentize.json").read_text())["files"]["README.md"]
