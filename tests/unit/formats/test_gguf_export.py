"""``latentize export`` to GGUF: the command, and that nothing is lost when it fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.common import call_cli, last_json, leftovers, run_python

import latentize
from latentize.errors import LatentizeError, OptionError, OutputError
from latentize.formats.gguf import write_gguf


def test_nothing_is_overwritten_unless_asked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        write_gguf(folder, out, "f32")
    assert out.read_text() == "mine"
    write_gguf(folder, out, "f32", overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF"
    with pytest.raises(OutputError, match="exists"):
        write_gguf(folder, tmp_path, "f32", overwrite=True)
    with pytest.raises(OutputError, match="cannot write"):
        write_gguf(folder, tmp_path / "missing" / "out.gguf", "f32")
    with pytest.raises(OptionError, match="no such type"):
        write_gguf(folder, tmp_path / "b.gguf", "q4_k")


def test_a_write_that_fails_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    out = tmp_path / "out.gguf"
    write_gguf(folder, out, "f32")
    before, written = out.read_bytes(), []
    original = GGUFWriter.write_tensor_data

    def fails(self: Any, *args: Any) -> None:
        written.append(1)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        original(self, *args)

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fails)
    with pytest.raises(OutputError, match="No space left"):
        write_gguf(folder, out, "bf16", overwrite=True)
    assert out.read_bytes() == before
    assert leftovers(tmp_path, out) == ["out.gguf"]


def test_export_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    done = call_cli(capsys, "export", folder, out, "--to", "gguf", "--type", "q8_0", "--json")
    assert done.returncode == 0, done.stderr
    report = last_json(done.stdout)
    assert report.keys() >= {
        "file",
        "to",
        "type",
        "bytes",
        "sha256",
        "tensors",
        "pre_tokenizer",
        "notes",
        "largest_error",
    }
    assert (report["file"], report["to"], report["type"]) == (str(out), "gguf", "q8_0")
    again = call_cli(capsys, "export", folder, out, "--to", "gguf")
    assert again.returncode == 2 and "LZ401" in again.stderr and "--overwrite" in again.stderr
    assert call_cli(capsys, "export", folder, out, "--to", "gguf", "--overwrite").returncode == 0
    done = call_cli(capsys, "verify", out, "--folder", folder, "--json")
    assert done.returncode == 0 and last_json(done.stdout)["tensors"] == {"BF16": 18, "F32": 7}
    done = call_cli(capsys, "verify", out)
    assert done.returncode == 2 and "LZ301" in done.stderr and "--folder" in done.stderr
    for to in ("deepseek_v3", "onnx"):
        done = call_cli(capsys, "export", folder, tmp_path / "other", "--to", to)
        assert done.returncode == 2 and "--to" in done.stderr


def test_export_beside_the_folder(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "changed")
    report = latentize.export(copy, kind="f16")
    assert Path(report["file"]) == tmp_path / "changed-f16.gguf" and Path(report["file"]).is_file()


def test_without_the_package(folder: Path, tmp_path: Path) -> None:
    code = """
import sys
sys.modules["gguf"] = None
import latentize
try:
    latentize.export(sys.argv[1], sys.argv[2])
except latentize.errors.OptionError as error:
    assert "latentize[gguf]" in error.fix, error
else:
    sys.exit("exported")
"""
    done = run_python(code, folder, tmp_path / "out.gguf")
    assert done.returncode == 0, done.stderr


def test_errors_are_of_ours(tmp_path: Path) -> None:
    with pytest.raises(LatentizeError):
        latentize.export(tmp_path / "missing", tmp_path / "out.gguf")
