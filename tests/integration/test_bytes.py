"""``--bytes``: values get as many bits as they are worth, in every family, and caches hold what was promised."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import SMALL, call_cli, random_tokens, relative_error
from tests.killing import contents

import latentize
from latentize import LatentCache
from latentize.api import compare
from latentize.checkpoint import Journal
from latentize.conversion import effort
from latentize.errors import OptionError
from latentize.training.polish import Polish

OPTIONS: dict[str, Any] = {**SMALL, "bytes": "30%", "bytes_context": 256}
MODELS = (
    ("llama", 2),
    ("llama", 4),
    ("llama", 1),
    ("qwen2", 2),
    ("qwen3", 2),
    ("gemma3_text", 2),
    ("smollm3", 2),
    ("stablelm", 2),
    ("olmo2", 2),
)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def through_a_cache(model: Any, tokens: torch.Tensor, cache: Any, stops: tuple[int, ...]) -> torch.Tensor:
    made = []
    for start, stop in zip((0, *stops), stops, strict=False):
        made.append(model(input_ids=tokens[:, start:stop], past_key_values=cache).logits)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize(("family", "kv_heads"), MODELS)
def test_a_cache_of_codes_is_the_model_that_was_measured(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, kv_heads: int
) -> None:
    report = latentize.convert(source(family, kv_heads), tmp_path / "out", data=(text,), **OPTIONS)
    assert report["format"] == "native"
    assert report["kl"] > 1e-5, "something is rounded"
    assert 0.24 < report["bytes"] <= 0.30 + 1e-9
    assert latentize.verify(tmp_path / "out")["ok"]
    model, tokens = loaded(tmp_path / "out"), random_tokens(batch=2, length=24)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
    stops = (15, 16, 17, 21, 22, 23, 24)
    # Sums in another order may move a value from one code to the next.
    for each in (model, latentize.accelerate(model)):
        cached = through_a_cache(each, tokens, LatentCache(model.config), stops)
        assert relative_error(cached, whole) < 0.05
        assert float((cached - whole).abs().mean() / whole.abs().mean()) < 1e-3


def test_bytes_are_kept(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "bytes_context": 2048}
    report = latentize.convert(source(), tmp_path / "out", data=(text,), **options)
    model = latentize.accelerate(loaded(tmp_path / "out").to(torch.bfloat16))
    cache = LatentCache(model.config)
    with torch.no_grad():
        model(input_ids=random_tokens(batch=1, length=2048), past_key_values=cache)
    of_source = 2 * report["source_cache_values_per_token_layer"] * 2048 * model.config.num_hidden_layers
    assert cache.nbytes / of_source == pytest.approx(report["bytes"], rel=0.02)
    layers = report["layers"]
    assert sum(layer["row_bytes"] for layer in layers) / len(layers) == report["row_bytes_per_token_layer"]


def test_rank_and_bits_together(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    report = latentize.convert(source(), tmp_path / "out", data=(text,), **{**OPTIONS, "keep": "60%", "bytes": "20%"})
    assert report["keep"] <= 0.6
    assert report["bytes"] <= 0.2 + 1e-9
    tokens, model = random_tokens(batch=1, length=20), loaded(tmp_path / "out")
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
    cached = through_a_cache(latentize.accelerate(model), tokens, LatentCache(model.config), (12, 13, 20))
    assert float((cached - whole).abs().mean() / whole.abs().mean()) < 1e-3


def test_compare_counts_the_bytes_of_codes(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    report = latentize.convert(source(), tmp_path / "out", data=(text,), **OPTIONS)
    found = compare(source(), [str(tmp_path / "out")], cache=("int8",), data=(text,), tokens=1024, sequence_length=256)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["out"]["cache_share"] == pytest.approx(report["bytes"], rel=1e-6)
    assert rows["out"]["kl"] > 1e-5, "rounded"
    assert rows["out, int8"]["cache_share"] > 0.5
    assert rows["out, int8"]["kl"] < rows["out"]["kl"], "a format that is named takes the codes' place"


def test_more_bytes_lose_less(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    found = [
        latentize.convert(source(), tmp_path / share, data=(text,), **{**OPTIONS, "bytes": share})["kl"]
        for share in ("15%", "30%", "45%")
    ]
    assert found[0] > 1.5 * found[1] > 1.5 * 1.5 * found[2]


def test_interrupted_and_resumed(
    source: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of the steps that look at all layers together. A few steps of the polish show it as well as many."""
    monkeypatch.setattr(effort, "Polish", functools.partial(Polish, steps=24))
    options = {**OPTIONS, "fast": False, "self_generated": 0, "tokens": 2048}
    whole, out, keep = tmp_path / "whole" / "out", tmp_path / "again" / "out", Journal.keep
    latentize.convert(source(), whole, data=(text,), **options)
    for number, step in enumerate(("coding", "polish")):

        def interrupt(self: Journal, name: str, *args: Any, step: str = step) -> None:
            keep(self, name, *args)
            if name == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "keep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                latentize.convert(source(), out, data=(text,), resume=number > 0, **options)
    latentize.convert(source(), out, data=(text,), resume=True, **options)
    assert contents(out) == contents(whole)


def test_refused(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    for options, words in (
        ({"method": "transmla", "bytes": "20%"}, "only the calibrated method"),
        ({"format": "deepseek_v3", "bytes": "20%"}, "one width"),
        ({"bytes": "1%"}, "too few"),
    ):
        with pytest.raises(OptionError, match=words):
            latentize.convert(source(), tmp_path / "out", data=(text,), **{**OPTIONS, **options})


def test_the_command(source: Callable[..., Path], text: str, tmp_path: Path, capsys: Any) -> None:
    small = ("--tokens", 2048, "--sequence-length", 64, "--dtype", "float32")
    done = call_cli(
        capsys, "convert", source(), tmp_path / "out", "--bytes", "25%", "--data", text, "--fast", "--json", *small
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] <= 0.25
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [entry["row_code"]["exact_tokens"] for entry in config["latent_layers"]] == [4, 4]
    assert [entry["row_code"]["newest_tokens"] for entry in config["latent_layers"]] == [4, 4]
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert ">32 + 32</text>" in page, "all roped keys count"
    assert "Where bits went" in page and "bytes of a cached token and layer" in page
    assert "bytes of a cached token and layer" in card
    assert "0.0% of the KV cache saved" not in page.replace("</b>", " ")
