"""``--cache-for``: the model stays the same, and its rows are what a cache of one width holds best."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import SMALL, call_cli, logits, random_tokens, relative_error
from transformers import AutoModelForCausalLM

import latentize
from latentize.errors import FormatError, OptionError

SIZES = {"kv_lora_rank": 32, "qk_rope_head_dim": 32}
OPTIONS: dict[str, Any] = {**SMALL, "dtype": "float32"}


@pytest.fixture(scope="module")
def models(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One conversion, plain and for caches."""
    folder, found = tmp_path_factory.mktemp("cache-for"), {}
    for name, cache in (("plain", None), ("fp8", "fp8"), ("q4_0", "q4_0")):
        found[name] = folder / name
        source_folder = source("llama", 2, head_dim=32)
        report = latentize.convert(source_folder, found[name], data=(text,), cache_for=cache, **OPTIONS, **SIZES)
        assert report.get("cache_for") == cache and report["format"] == "deepseek_v3"
    return found


@torch.no_grad()
def rows(folder: Path, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What transformers caches: latents and roped keys of every layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache = model(tokens, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("name", ["fp8", "q4_0"])
def test_the_model_is_the_same(models: dict[str, Path], name: str) -> None:
    tokens = random_tokens()
    assert relative_error(logits(models[name], tokens), logits(models["plain"], tokens)) < 1e-4
    assert latentize.verify(models[name])["ok"]


def test_fp8_without_a_scale_holds_rows_that_it_would_have_lost(models: dict[str, Path]) -> None:
    tokens = random_tokens()

    def error(x: torch.Tensor) -> float:
        back = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        return float((back - x).norm() / x.norm())

    for halves in rows(models["fp8"], tokens):
        for half in halves:
            assert error(half) < 0.05 and float(half.abs().max()) < 448
    # Roped keys are as small as weights want them to be, unless they are told otherwise.
    assert max(error(k_rope) for _, k_rope in rows(models["plain"], tokens)) > 0.5


def test_roped_keys_of_the_size_that_they_have(models: dict[str, Path]) -> None:
    """llama.cpp's scales are in half precision."""
    config = json.loads((models["q4_0"] / "config.json").read_text())
    assert all(entry[0] == 0 for entry in config["mla_scale_exponents"])
    assert all(
        float(half.square().mean().sqrt()) > 1e-3 for pair in rows(models["q4_0"], random_tokens()) for half in pair
    )


def test_a_cache_of_ours_loses_less(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """On the bundled model, so that something is left to lose."""
    model = Path(__file__).parents[2] / "models" / "tiny-llama-gqa"
    sizes = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "fast": True, "evaluation_tokens": 512, "tokens": 8192}
    lost = {}
    for cache in (None, "int4"):
        out = tmp_path / str(cache)
        latentize.convert(model, out, cache_for=cache, **sizes)
        whole, rounded = (latentize.evaluate(out, model, tokens=1024, cache=c)["kl"] for c in ("auto", "int4"))
        lost[cache] = rounded - whole
    assert 0 < lost["int4"] < 0.75 * lost[None], lost


def test_sizes_are_whole_blocks(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    model = source("llama", 2, head_dim=32)
    with pytest.raises(OptionError, match="whole blocks of 32") as caught:
        latentize.convert(model, tmp_path / "out", kv_lora_rank=40, qk_rope_head_dim=32, cache_for="q8_0", data=(text,))
    assert caught.value.code == "LZ303" and not (tmp_path / "out").exists()
    report = latentize.convert(model, tmp_path / "out", keep="75%", cache_for="q8_0", data=(text,), **OPTIONS)
    assert report["kv_lora_rank"] % 32 == report["qk_rope_head_dim"] % 32 == 0
    with pytest.raises(OptionError, match=r"no split .*blocks of 32"):
        latentize.convert(model, tmp_path / "few", keep="25%", cache_for="q8_0", data=(text,))


def test_what_llama_cpp_cannot_hold(source: Callable[..., Path], text: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(FormatError, match="soft-capped") as caught:
        latentize.convert(
            source("gemma2", 2, head_dim=32), tmp_path / "out", keep="75%", cache_for="q4_0", data=(text,)
        )
    assert caught.value.where == "--cache-for q4_0"
    done = call_cli(capsys, "convert", source("llama", 2), tmp_path / "out", "--cache-for", "q3_k")
    assert done.returncode == 2 and "--cache-for" in done.stderr
