"""``--for``: sizes that an engine serves fast, and zeros that make them fit and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.common import SMALL, call_cli, logits, random_tokens, relative_error

import latentize
from latentize.conversion.serving import fit, fitting_settings
from latentize.errors import FormatError, OptionError
from latentize.planning.inspection import plan
from latentize.planning.reading import read_spec
from latentize.planning.serving import serving
from latentize.recipe import Recipe


@pytest.mark.parametrize(
    ("model", "where", "keep", "sizes", "padded", "standing"),
    [
        ("llama-3-8b", "vllm@h100", "25%", (448, 64), (128, 128), (0, 0)),
        ("llama-3-8b", "vllm@b200", "25%", (512, 64), (128, 128), (0, 0)),
        ("llama-3-8b", "vllm@a100", "50%", (512, 64), (128, 128), (0, 1)),
        ("llama-3-8b", "flashmla@h100", "50%", (512, 64), (128, 128), (1, 1)),
        ("llama-2-7b", "llama.cpp@rtx4090", "10%", (512, 64), (128, 128), (0, 1)),
    ],
)
def test_the_sizes_nearest_to_the_budget_that_are_served_best(
    model: str, where: str, keep: str, sizes: tuple[int, int], padded: tuple[int, int], standing: tuple[int, int]
) -> None:
    recipe, spec = Recipe.build(keep=keep, serve_on=where), read_spec(model).attention
    found = {(s.kv_lora_rank, s.qk_rope_head_dim) for s in fitting_settings(recipe, spec)}
    made = fit(recipe, spec, *sizes)
    assert found == {sizes} and made.standing == standing
    assert (made.sizes.qk_nope_head_dim, made.sizes.v_head_dim) == padded


def test_where_any_size_is_served_alike_the_method_chooses() -> None:
    spec = read_spec("llama-3-8b").attention
    free, bound = (Recipe.build(keep="25%", serve_on=where) for where in (None, "llama.cpp@cpu"))
    from latentize.methods.registry import settings

    assert fitting_settings(bound, spec) == settings(free, spec)


@pytest.fixture(scope="module")
def models(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Heads of 32: FlashInfer's prefill on Hopper wants values of 64 beside keys of 64."""
    folder, found = tmp_path_factory.mktemp("for"), {}
    options = {**SMALL, "dtype": "bfloat16", "kv_lora_rank": 24, "qk_rope_head_dim": 32, "data": (text,)}
    for name, where in (("plain", None), ("padded", "flashinfer@h100")):
        found[name] = folder / name
        report = latentize.convert(source("llama", 2, head_dim=32), found[name], serve_on=where, **options)
        notes = " ".join(report["notes"])
        assert ("values of each head from 32 to 64: padded with zeros" in notes) == (name == "padded"), notes
    return found


@torch.no_grad()
def test_zeros_change_nothing(models: dict[str, Path]) -> None:
    tokens = random_tokens()
    assert relative_error(logits(models["padded"], tokens), logits(models["plain"], tokens)) < 1e-5
    assert latentize.verify(models["padded"])["ok"]
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in models.items()}
    assert [configs[name]["v_head_dim"] for name in ("plain", "padded")] == [32, 64]
    assert all(configs["padded"][key] == configs["plain"][key] for key in ("kv_lora_rank", "qk_rope_head_dim"))
    tensors = load_file(next(models["padded"].glob("*.safetensors")))
    values_HVr = tensors["model.layers.0.self_attn.kv_b_proj.weight"].unflatten(0, (4, -1))[:, -64:]
    assert bool(values_HVr[:, :32].any()) and not bool(values_HVr[:, 32:].any())
    served = {phase["phase"]: phase for phase in serving(str(models["padded"]), "flashinfer@h100")["phases"]}
    assert served["prefill"]["backend"] == "fa3" and served["prefill"]["fast"]


@torch.no_grad()
def test_heads_of_zeros_change_nothing(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """llama.cpp's kernels on CUDA take 128 + 64 with heads in eights; here are six, which share up-projections."""
    model = source("llama", 2, hidden_size=192, num_attention_heads=6, head_dim=96)
    options = {**SMALL, "dtype": "bfloat16", "kv_lora_rank": 128, "qk_rope_head_dim": 64, "data": (text,)}
    report = latentize.convert(model, tmp_path / "padded", serve_on="llama.cpp@rtx4090", **options)
    latentize.convert(model, tmp_path / "plain", **options)
    assert any("heads from 6 to 8" in note for note in report["notes"]), report["notes"]
    tokens = random_tokens()
    assert relative_error(logits(tmp_path / "padded", tokens), logits(tmp_path / "plain", tokens)) < 1e-5
    assert latentize.verify(tmp_path / "padded", serve_on="llama.cpp@rtx4090")["served_decode"].endswith("these sizes")
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert config["num_attention_heads"] == config["num_key_value_heads"] == 8


def test_heads_are_padded_where_kernels_count_them() -> None:
    spec = replace(read_spec("llama-3-8b").attention, num_heads=24)
    made = fit(Recipe.build(keep="25%", serve_on="vllm@b200"), spec, 256, 64)
    assert made.standing == (0, 0) and made.padded == (32, 128, 128)
    assert fit(Recipe.build(keep="25%", serve_on="vllm@b200"), spec, 512, 64).padded == (24, 128, 128)


def test_what_cannot_be(source: Callable[..., Path], text: str, tmp_path: Path, capsys: Any) -> None:
    conflicts = (({"method": "care"}, "calibrated"), ({"bytes": 0.2}, "bytes"), ({"format": "native"}, "format"))
    for entries, words in conflicts:
        with pytest.raises(OptionError, match=words):
            Recipe.build(serve_on="vllm@h100", **entries)
    done = call_cli(capsys, "convert", source("llama", 2), tmp_path / "out", "--for", "tgi", "--data", text)
    assert done.returncode == 2 and "--for" in done.stderr and not (tmp_path / "out").exists()
    with pytest.raises(FormatError, match="soft-capped") as caught:
        latentize.convert(source("gemma2", 2), tmp_path / "out", serve_on="vllm@h100", keep=0.5, data=(text,))
    assert caught.value.where == "--for vllm@h100"


def test_verify_says_who_will_serve_it(models: dict[str, Path], capsys: Any) -> None:
    done = call_cli(capsys, "verify", models["padded"], "--for", "sglang@a100", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"] and found["served_decode"] == "triton, made for any sizes, slower"
    refused = call_cli(capsys, "verify", models["plain"], "--for", "vllm@h100")
    assert (
        refused.returncode == 2 and "prefill is refused" in refused.stderr and "mla_attention.py" not in refused.stdout
    )


@pytest.mark.parametrize("ranks", [1, 4])
def test_plan_says_which_sizes_it_would_choose(ranks: int, capsys: Any) -> None:
    asked = ("plan", "llama-3-8b", "--keep", "25%", "--for", "vllm@b200", "--tensor-parallel", ranks)
    made = json.loads(call_cli(capsys, *asked, "--json").stdout.splitlines()[-1])["serving"]
    assert made["served"] and made["fast"] and made["sizes"]["kv_lora_rank"] == 512
    assert made["sizes"]["heads"] == 32 // ranks
    assert "decode by FLASHINFER_MLA" in " ".join(call_cli(capsys, *asked).stdout.split())


def test_plan_of_latents_that_are_there(models: dict[str, Path]) -> None:
    found = plan(str(models["plain"]), serve_on="vllm@h100")["serving"]
    assert not found["served"] and found["sizes"]["kv_lora_rank"] == 24
