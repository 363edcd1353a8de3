"""The script that measures a page of the documentation anew asks for what commands and benchmarks take."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from tests.common import call_cli

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "reproduce_bits.sh"


def asked(tmp_path: Path, **settings: str) -> list[list[str]]:
    """Every command that it runs, by stand-ins that do nothing; twice, as what is there is not made again."""
    written = tmp_path / "asked"
    for name in ("python", "make"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\t" {name} "$@" >>{written}\necho >>{written}\n')
        (tmp_path / name).chmod(0o755)
    settings |= {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONVERT": "--fast"}
    for _ in range(2):
        command = [str(SCRIPT), "model", "valid.txt", "test.txt", "piqa,lambada_openai", str(tmp_path / "out")]
        subprocess.run(command, check=True, env={**os.environ, **settings}, capture_output=True)
    return [line.split("\t")[1:-1] for line in written.read_text().splitlines()]


def test_every_option_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = asked(tmp_path)
    assert len(commands) == len({tuple(arguments) for arguments in commands}) > 20
    for arguments in commands:
        options = [argument for argument in arguments if argument.startswith("--")]
        if arguments == ["engines", "ENGINE=llama.cpp"]:
            continue
        if arguments[:2] == ["-m", "latentize"]:
            known = call_cli(capsys, arguments[2], "--help").stdout
        else:
            script = f"{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0]
            known = (ROOT / script).read_text()
        assert all(re.search(rf"{option}\b", known) for option in options), arguments


def test_some_steps_alone(tmp_path: Path) -> None:
    commands = asked(tmp_path, ONLY="convert-12.5 needles-*")
    assert [arguments[0] for arguments in commands] == ["-m", *["benchmarks/needles.py"] * 2]


def test_without_arguments_it_says_what_it_wants() -> None:
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "reproduce_bits.sh MODEL CALIBRATE" in done.stderr and "set -uo" not in done.stderr
