"""The benchmark of sliced latents: one slice is all of it, in any basis; several are less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import SMALL, random_tokens, relative_error

import latentize
from latentize.modeling.load import load_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("sliced") / "out"
    latentize.convert(source("llama", 2), out, kv_lora_rank=24, qk_rope_head_dim=16, data=(text,), **SMALL)
    return latentize.accelerate(load_model(out))


@pytest.mark.parametrize("basis", ["own", "rotated", "balanced and rotated"])
def test_one_slice_is_the_whole(model: Any, basis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sliced_latents

    passages, moments = list(random_tokens()), sliced_latents.Moments()
    exact = torch.stack(sliced_latents.run(model, moments, passages))
    assert len(moments.found) == model.config.num_hidden_layers
    for slices in (1, 2):
        made = torch.stack(sliced_latents.run(model, sliced_latents.Sliced(moments, basis, slices), passages))
        assert (relative_error(made, exact) < 1e-4) == (slices == 1)
