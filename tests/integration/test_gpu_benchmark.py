"""``benchmarks/gpu_decode.py`` where there is no GPU: it checks, times nothing, and says so."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="2026-11-25: triton is not installed (extra: triton)"
)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_decode.py"), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


@needs_triton
@pytest.mark.slow
def test_every_stage_on_a_cpu(tmp_path: Path) -> None:
    done = run("--cpu", "--out", tmp_path / "made.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "NOTHING IS TIMED" in done.stdout and done.stdout.rstrip().endswith("All right.")
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["timed"] is False and made["copy_bytes_per_second"] is None and made["model"] == []
    assert {"date", "command", "versions", "device"} <= made["machine"].keys()
    assert len(made["correctness"]) == 16 and all(row["right"] for row in made["correctness"])
    assert len(made["graphs"]) == 5 and all(row["right"] and not row["captured"] for row in made["graphs"])
    ours = [row for row in made["layer"] if row["name"].startswith("latentize")]
    assert len(ours) == 8 and all(row["right"] for row in ours)
    said = json.dumps(made)
    assert not any(word in said for word in ("milliseconds", "share_of_copy", "tokens_per_second", '"seconds'))


@pytest.fixture
def gpu_decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # What it sets for its own process must not stay.
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return importlib.import_module("gpu_decode")


def test_without_a_gpu_that_was_wanted_it_does_not_succeed(
    gpu_decode: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_decode.py", "--stages", "model"])
    assert gpu_decode.main() == 3
    assert "without a GPU nothing was timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "wanted", "expected"),
    [
        ({}, False, 0),
        ({}, True, 3),
        ({"timed": True}, True, 0),
        ({"correctness": [{"right": True}, {"right": False}]}, False, 1),
        ({"model": [{"right": False}], "timed": True}, True, 1),
        ({"conversion": {"trouble": "out of memory", "right": False}}, True, 1),
        # Another library that is not there is nobody's fault; a kernel of ours that does not run is.
        ({"layer": [{"name": "flashinfer", "trouble": "not installed"}]}, False, 0),
        ({"layer": [{"name": "latentize int4+int8", "trouble": "out of resource"}]}, False, 1),
    ],
)
def test_status(gpu_decode: Any, change: dict[str, Any], wanted: bool, expected: int) -> None:
    empty = {name: [] for name in gpu_decode.STAGES}
    assert gpu_decode.status({**empty, "timed": False, **change}, wanted=wanted) == expected
