"""Attention over rows in codes, in PyTorch, against its naive twin."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tests.coded_rows import coded_call, coded_configuration

from latentize.runtime import coded_attention
from latentize.runtime.coded_attention import attend_codes
from latentize.runtime.kernels.reference import coded_decode_reference
from latentize.runtime.means import BLOCK_OF_CODES, Means

# Of a query's sum, relative to its largest value; bfloat16 rounds the rows, too, and the probabilities.
LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 5e-2}


@pytest.mark.parametrize("dtype", LIMITS)
@torch.inference_mode()
def test_as_its_twin_over_random_plans(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths, ranks, roped keys, exact rows first and last, padding, masks, lengths."""
    random.seed(dtype)
    torch.manual_seed(0)
    seen = 0
    for _ in range(60):
        made = coded_configuration() | {"dtype": dtype}
        call, options = coded_call(made)
        monkeypatch.setattr(coded_attention, "BLOCK_OF_CODES", random.choice([7, 16, BLOCK_OF_CODES]))
        got_BHTr, got_lse_BHT = attend_codes(*call, **options)
        want_BHTr, lse_BHT = coded_decode_reference(*call, **options)
        blind_BHT = lse_BHT == -torch.inf
        assert got_BHTr.dtype == getattr(torch, dtype) and not got_BHTr[blind_BHT].any(), made
        torch.testing.assert_close(got_lse_BHT.double(), lse_BHT, atol=LIMITS[dtype], rtol=LIMITS[dtype])
        error_BHT = (got_BHTr.double() - want_BHTr).abs().amax(-1) / want_BHTr.abs().amax(-1)
        assert bool((error_BHT[~blind_BHT] <= LIMITS[dtype]).all()), made
        seen += int((~blind_BHT).sum())
    assert seen > 250


def test_angles_that_are_kept_are_those_of_the_positions() -> None:
    frequencies_F = torch.tensor([1.0, 0.1, 0.003])
    starts_B = torch.zeros(1, dtype=torch.int32)
    kept = Means(frequencies_F, starts_B, tuple(frequencies_F.tolist()))
    made = Means(frequencies_F, starts_B)
    for first, count in ((0, 5), (BLOCK_OF_CODES - 3, 3), (BLOCK_OF_CODES - 3, 9), (3 * BLOCK_OF_CODES, 7)):
        rows = [means.from_row(first, count, torch.float32) for means in (kept, made)]
        torch.testing.assert_close(*rows, atol=2e-6, rtol=0)


@torch.inference_mode()
def test_what_all_rows_and_all_of_every_key_are_spared() -> None:
    """Rows that are all seen need no mask, and keys that are all roped no latents: nothing but work is left out."""
    random.seed(1)
    torch.manual_seed(1)
    for _ in range(30):
        plain = {"sinks": 0, "newest": 0, "padded": False, "masked": False, "ragged": False}
        (q_BHTr, *call), options = coded_call(coded_configuration() | plain)
        want_BHTr = attend_codes(q_BHTr, *call, **options)
        rows, *rest = call[1:]
        full = [replace(part, full=True) for part in rows]
        torch.testing.assert_close(attend_codes(q_BHTr, call[0], full, *rest, **options), want_BHTr)
        unroped = attend_codes(torch.zeros_like(q_BHTr), *call, **options)
        torch.testing.assert_close(attend_codes(None, *call, **options), unroped)
