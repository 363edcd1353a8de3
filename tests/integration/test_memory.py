"""Memory that does not suffice: predicted before anything is done, and told where a prediction was too low."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import leftovers, run_python

# The activations of one long sequence decide: a third of a gigabyte, in few multiplications.
WIDE = {"hidden_size": 64, "intermediate_size": 16_384}
ARGUMENTS = ("--fast", "--tokens", 2048, "--sequence-length", 2048, "--kv-lora-rank", 24, "--qk-rope-head-dim", 8)
# As the command line does, with so much of the need as address space beyond what the process has after its imports.
LIMITED = """
import resource, sys
import latentize.conversion.limits, latentize.conversion.job, latentize.cli
from latentize.modeling.source import SourceModel
from latentize.machine import memory_room, peak_rss_bytes
share, certain, *arguments = sys.argv[1:]
latentize.conversion.limits._CERTAIN = float(certain)
check = latentize.conversion.job.Job._check_memory
def checked(self, source):
    size = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (size + round(float(share) * self.footprint(source).bytes),) * 2)
    check(self, source)
latentize.conversion.job.Job._check_memory = checked
sys.argv[1:] = arguments
latentize.cli.main()
"""
# The bounds of what was predicted by what the system has counted.
LEAST, MOST = 0.75, 1.25


@pytest.fixture
def limited(source: Callable[..., Path], text: str, tmp_path: Path) -> Callable[..., Any]:
    """A conversion to ``tmp_path / "out"`` that has ``share`` of its need."""

    def run(share: float, certain: float) -> Any:
        model, out = source("llama", 2, **WIDE), tmp_path / "out"
        arguments = ("convert", model, out, *ARGUMENTS, "--data", text, "--json")
        return run_python(LIMITED, share, certain, *arguments)

    return run


@pytest.mark.parametrize("certain", [0.8, pytest.param(0.0, marks=pytest.mark.slow)], ids=["predicted", "met"])
def test_three_fifths_of_the_need(limited: Callable[..., Any], tmp_path: Path, certain: float) -> None:
    """Refused before anything is done; and where nothing is predicted, when an allocation fails."""
    done = limited(0.6, certain)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "LZ422" in done.stderr and "Traceback" not in done.stderr
    assert "where:" in done.stderr and "fewer --tokens" in done.stderr
    assert ("would take about" in done.stderr and "ulimit -v" in done.stderr) == (certain > 0)
    assert not leftovers(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_what_fits_is_not_refused_and_was_predicted(limited: Callable[..., Any], tmp_path: Path) -> None:
    done = limited(1.25, 0.8)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert LEAST < report["predicted_peak_rss_bytes"] / report["peak_rss_bytes"] < MOST
    manifest = json.loads((tmp_path / "out" / "latentize.json").read_text())
    assert "predicted_peak_rss_bytes" not in json.dumps(manifest), "the same bytes on every machine"


def test_not_even_the_libraries_fit(source: Callable[..., Path], tmp_path: Path) -> None:
    """The linker finds no room for PyTorch."""
    code = (
        "import resource, sys\n"
        "import latentize.cli\n"
        "resource.setrlimit(resource.RLIMIT_AS, (300 << 20,) * 2)\n"
        "latentize.cli.main()\n"
    )
    done = run_python(code, "convert", source("llama", 2), tmp_path / "out")
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("LZ422") and "Traceback" not in done.stderr
