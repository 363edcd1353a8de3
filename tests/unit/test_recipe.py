"""A recipe is strict, and an error says which entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentize.errors import OptionError
from latentize.recipe import Recipe, parse_keep


@pytest.mark.parametrize(
    ("given", "share"),
    [("25%", 0.25), ("12.5%", 0.125), (" 50% ", 0.5), ("100%", 1.0), (0.25, 0.25), ("0.25", 0.25), (1, 1.0)],
)
def test_keep_is_a_share(given: Any, share: float) -> None:
    assert Recipe.build(keep=given).keep == pytest.approx(share)
    assert Recipe.build(keep=given).budget == pytest.approx(share)


def test_without_keep_a_quarter_is_kept() -> None:
    assert Recipe.build().budget == 0.25
    assert Recipe.build().keep is None


@pytest.mark.parametrize("given", ["0%", "-5%", "101%", 0, 1.5, 25, "a lot", "%", float("nan"), "nan%"])
def test_a_keep_that_is_no_share(given: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Recipe.build(keep=given)
    assert caught.value.where == "--keep"


def test_what_is_not_a_percentage_is_left_to_validation() -> None:
    assert parse_keep("x%") == "x%"
    assert parse_keep(None) is None


@pytest.mark.parametrize(
    ("entries", "where"),
    [
        ({"kv_lora_rnak": 3}, "--kv-lora-rnak"),
        ({"method": "svd"}, "--method"),
        ({"format": "gguf2"}, "--format"),
        ({"to": "moe"}, "--to"),
        ({"selection": "1-norm"}, "--selection"),
        ({"svd": "both"}, "--svd"),
        ({"dtype": "int8"}, "--dtype"),
        ({"cache_for": "q2_k"}, "--cache-for"),
        ({"tokens": 0}, "--tokens"),
        ({"sequence_length": 1}, "--sequence-length"),
        ({"freqfold": -1}, "--freqfold"),
        ({"damping": -0.1}, "--damping"),
        ({"kv_lora_rank": 0, "qk_rope_head_dim": 4}, "--kv-lora-rank"),
        ({"kv_lora_rank": 8.5, "qk_rope_head_dim": 4}, "--kv-lora-rank"),
        ({"seed": "x"}, "--seed"),
    ],
    ids=lambda e: next(iter(e)) if isinstance(e, dict) else None,
)
def test_wrong_entries_are_refused_by_name(entries: dict[str, Any], where: str) -> None:
    with pytest.raises(OptionError) as caught:
        Recipe.build(**entries)
    assert caught.value.where == where
    assert caught.value.code == "LZ301"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"keep": "25%", "kv_lora_rank": 8, "qk_rope_head_dim": 4}, "either keep"),
        ({"qk_rope_head_dim": 8}, "belong together"),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 3}, "even"),
        ({"bytes": "25%", "cache_for": "int4"}, "one of bytes and cache_for"),
        ({"method": "care", "cache_for": "int4"}, "calibrated"),
        ({"format": "native", "cache_for": "q4_0"}, "no native"),
    ],
)
def test_entries_that_contradict_each_other(entries: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Recipe.build(**entries)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 1


def test_yaml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: mha2mla\nkeep: 50%\nselection: high\ndata: [a.txt, b.txt]\n")
    assert Recipe.load(path) == Recipe.build(method="mha2mla", keep=0.5, selection="high", data=("a.txt", "b.txt"))
    assert Recipe.load(path, keep="25%", seed=3).keep == 0.25
    assert Recipe.load(path, seed=3).seed == 3


@pytest.mark.parametrize("text", ["- a\n- b\n", "text", "a: [", ""])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        Recipe.load(path)
    assert caught.value.where == str(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_an_unknown_entry_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("keep: 50%\ndevice: cuda\n")
    with pytest.raises(OptionError, match="Extra") as caught:
        Recipe.load(path)
    assert caught.value.where == "--device"


def test_the_recipe_inside_a_manifest(tmp_path: Path) -> None:
    """``latentize.json`` of an output is a recipe for the same."""
    from latentize.checkpoint import Manifest

    recipe = Recipe.build(method="care", keep="25%", damping=0.1, data=["a.txt"], seed=7)
    path = tmp_path / "latentize.json"
    path.write_text(Manifest("native", {}, recipe.model_dump(mode="json")).dumps())
    assert Recipe.load(path) == recipe
