"""What a conversion is predicted to hold follows the shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import FAMILIES

from latentize.conversion.footprint import Footprint
from latentize.conversion.latent import LatentJob
from latentize.conversion.pooled import PooledJob
from latentize.families.opening import open_source
from latentize.modeling.source import SourceModel
from latentize.recipe import Recipe

SIZES = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}


@pytest.fixture
def predicted(source: Callable[..., Path]) -> Callable[..., Footprint]:
    def of(family: str = "llama", config: dict[str, Any] | None = None, **entries: Any) -> Footprint:
        # GPT-NeoX has no groups.
        checkpoint, spec = open_source(source(family, 4 if family == "gpt_neox" else 2, **(config or {})))
        recipe = Recipe.build(**entries)
        job = (LatentJob if recipe.to == "mla" else PooledJob)(recipe, checkpoint, spec)
        return job.footprint(SourceModel(checkpoint, spec))

    return of


def test_hidden_states_of_the_text_are_counted_once_or_four_times(predicted: Callable[..., Footprint]) -> None:
    """Once where it is only looked at; four times where layers are refined on it, which is on the first part."""
    for few, many, more, part, entries in (
        (1 << 20, 1 << 21, 1, "converting layers", {"fast": True}),
        (1 << 14, 1 << 15, 4, "refining layers", {"polish": False, "self_generated": 0}),
        (1 << 20, 1 << 21, 1, "refining layers", {"polish": False, "self_generated": 0}),
    ):
        sizes = [predicted(tokens=n, **entries, **SIZES).stretches[part] for n in (few, many)]
        assert sizes[1] - sizes[0] == more * 4 * 64 * (many - few)


def test_text_of_the_models_own_is_counted_beside_the_users(predicted: Callable[..., Footprint]) -> None:
    options: dict[str, Any] = {"tokens": 1 << 15, "polish": False, **SIZES}
    without, beside = (predicted(self_generated=share, **options).stretches["refining layers"] for share in (0, 0.5))
    more = predicted(self_generated=0, **{**options, "tokens": 3 << 14}).stretches["refining layers"]
    assert beside == more > without


def test_what_is_done_more_takes_more(predicted: Callable[..., Footprint]) -> None:
    fast, refined = predicted(fast=True, **SIZES), predicted(polish=False, **SIZES)
    polished, pooled = predicted(polish=True, **SIZES), predicted(to="mqa")
    assert set(pooled.stretches) < set(fast.stretches)
    assert set(fast.stretches) < set(refined.stretches) < set(polished.stretches)
    assert fast.bytes <= refined.bytes <= polished.bytes
    assert pooled.stretches["converting layers"] < fast.stretches["converting layers"]
    assert "choosing sizes" in predicted(fast=True, keep="25%").stretches


def test_a_step_is_no_larger_than_the_text(predicted: Callable[..., Footprint]) -> None:
    """Fewer tokens are what a refusal advises; they have to take less even where they are fewer than a step's."""
    few, many = (predicted(tokens=n, sequence_length=64, polish=True, **SIZES) for n in (128, 256))
    hidden_states = 4 * 64 * 128
    assert many.stretches["polishing"] - few.stretches["polishing"] > 2 * hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one(predicted: Callable[..., Footprint], family: str) -> None:
    found = predicted(family, fast=True)
    assert all(size > 0 for size in found.stretches.values()) and found.largest in found.stretches


def test_layers_are_counted_as_they_run(source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large model the MLP stays as it is stored; so the bytes that are loaded are those that are counted."""
    from latentize.conversion.footprint import _Shapes

    monkeypatch.setattr("latentize.modeling.source.multiplies_bfloat16", lambda _: True)
    for stored, limit in ((torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 1 << 40)):
        monkeypatch.setattr("latentize.modeling.source._LARGE", limit)
        checkpoint, spec = open_source(source("llama", 2) if stored == torch.float32 else half(source))
        model = SourceModel(checkpoint, spec)
        shapes = _Shapes(spec, checkpoint, Recipe.build(), 2, model.precision)
        for layer, expected in zip(model.layers(), shapes.layers(), strict=True):
            kept = {t.untyped_storage().data_ptr(): t for t in [*layer.tensors.values(), *layer._module.parameters()]}
            assert sum(t.untyped_storage().nbytes() for t in kept.values()) == expected


def half(source: Callable[..., Path]) -> Path:
    """The same model, stored in bfloat16."""
    from transformers import AutoModelForCausalLM

    folder = source("llama", 2)
    out = folder.parent / "half"
    if not out.exists():
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(out)
    return out
