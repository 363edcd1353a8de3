"""Keeping freed memory changes nothing but time, and ends."""

from __future__ import annotations

import pytest
import torch

from latentize.machine import has_matrix_units, keeping_freed_memory, multiplies_bfloat16, peak_rss_bytes


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
