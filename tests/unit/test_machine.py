"""Keeping freed memory changes nothing but time, and ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentize.machine import (
    has_matrix_units,
    keeping_freed_memory,
    memory_room,
    multiplies_bfloat16,
    peak_rss_bytes,
    rss_bytes,
)


def test_freed_memory_is_kept_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    calls: list[tuple[int, int]] = []

    class Libc:
        @staticmethod
        def mallopt(option: int, value: ctypes.c_int) -> int:
            calls.append((option, value.value))
            return 1

        @staticmethod
        def malloc_trim(pad: ctypes.c_size_t) -> int:
            calls.append((0, pad.value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc)
    with keeping_freed_memory():
        assert dict(calls)[-4] == 0, "mappings are not switched off"
    assert calls[-1] == (0, 0), "what is free does not go back"
    assert dict(calls)[-4] > 0


def test_elsewhere_than_on_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with keeping_freed_memory():
        assert float(torch.ones(3).sum()) == 3


def test_large_tensors_are_made_and_freed_meanwhile() -> None:
    with keeping_freed_memory():
        for _ in range(3):
            assert float(torch.ones(1 << 24).sum()) == 1 << 24
    assert peak_rss_bytes() > 1 << 26


def test_matrix_units_multiply_bfloat16() -> None:
    assert multiplies_bfloat16("cuda")
    assert multiplies_bfloat16("cpu") or not has_matrix_units()


GROUPS = [
    ("memory.max", "memory.current", "inactive_file 20\nactive_file 10\nanon 5\n", "0::/outer/inner\n", ""),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file 20\ntotal_active_file 10\n",
        "4:memory:/outer/inner\n1:cpu:/\n",
        "memory",
    ),
]


@pytest.mark.parametrize(("limit", "used", "stat", "own", "top"), GROUPS, ids=["version 2", "version 1"])
@pytest.mark.parametrize("at", ["outer/inner", "outer", ""], ids=["its own", "above it", "of a container"])
def test_a_control_group_bounds_memory(
    tmp_path: Path, limit: str, used: str, stat: str, own: str, top: str, at: str
) -> None:
    """What is left, cached files not counted; a group that has no limit is passed over."""
    inner, group = tmp_path / top / "outer" / "inner", tmp_path / top / at
    (inner if at else group).mkdir(parents=True, exist_ok=True)
    (tmp_path / "own").write_text(own)
    for folder in {inner, group}:
        if folder.is_dir():
            (folder / limit).write_text("1000\n" if folder == group else "max\n")
            (folder / used).write_text("400\n")
            (folder / "memory.stat").write_text(stat)
    room = memory_room(tmp_path, tmp_path / "own")
    assert room.bytes == 1000 - 400 + 30 and str(group) in room.bound


def test_without_control_groups_the_machine_bounds_memory(tmp_path: Path) -> None:
    room = memory_room(tmp_path, tmp_path / "nothing")
    assert 1 << 20 < room.bytes < 1 << 50
    assert rss_bytes() <= peak_rss_bytes() * 1.05


@pytest.mark.skipif(sys.platform != "linux", reason="2026-11-25: other systems count as they should")
def test_the_peak_is_not_that_of_whoever_started_the_process() -> None:
    child = "from latentize.machine import peak_rss_bytes; print(peak_rss_bytes())"
    parent = f"import subprocess, sys; held = b'x' * (1 << 30); subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 30
