"""A family that somebody else adds: a model class of theirs, and one table."""

from __future__ import annotations

import json
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from tests.common import FP32, SMALL, logits, random_tokens, relative_error, text_file
from tests.models import byte_tokenizer, pico_config, randomize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import latentize
from latentize.errors import ConfigError, UnsupportedModelError
from latentize.families import table


class SlopeConfig(LlamaConfig):
    """Llama with factors on its embeddings and its softmax, under names of its own."""

    model_type = "slope"
    input_gain: float = 3.0
    softmax_gain: float = 0.15


class SlopeForCausalLM(LlamaForCausalLM):
    config_class = SlopeConfig

    def __init__(self, config: SlopeConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.scaling = config.softmax_gain

    def forward(self, input_ids: Tensor | None = None, **options: Any) -> Any:
        gained = self.config.input_gain * self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=gained, **options)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    AutoConfig.register("slope", SlopeConfig, exist_ok=True)
    AutoModelForCausalLM.register(SlopeConfig, SlopeForCausalLM, exist_ok=True)
    monkeypatch.setattr(table, "_REGISTERED", {})


@pytest.fixture
def entries() -> dict[str, Any]:
    llama = json.loads((resources.files("latentize.families") / "tables" / "llama.json").read_text())
    return {
        **llama,
        "model_type": "slope",
        "architectures": ["SlopeForCausalLM"],
        "attention": {**llama["attention"], "softmax_scale": "softmax_gain"},
        "multipliers": {"embedding": "input_gain"},
    }


@pytest.fixture
def slope(tmp_path: Path) -> Path:
    fields = {k: v for k, v in pico_config("llama").to_dict().items() if k not in ("model_type", "architectures")}
    model = SlopeForCausalLM(SlopeConfig(**fields))
    randomize(model)
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_made_up_family(slope: Path, tmp_path: Path, entries: dict[str, Any]) -> None:
    """Unknown; then, with its table, converted without loss, and to a quarter in both formats."""
    options = {"data": (text_file(tmp_path),), **SMALL}
    with pytest.raises(UnsupportedModelError, match="slope"):
        latentize.convert(slope, tmp_path / "early", keep="25%", **options)
    (tmp_path / "slope.json").write_text(json.dumps(entries))
    latentize.register_family(tmp_path / "slope.json")
    whole = {"method": "mha2mla", "keep": "100%", "format": "native"}
    latentize.convert(slope, tmp_path / "whole", **whole, **options)
    tokens = random_tokens()
    assert relative_error(logits(tmp_path / "whole", tokens), logits(slope, tokens)) <= FP32
    for name in ("native", "deepseek_v3"):
        report = latentize.convert(slope, tmp_path / name, keep="25%", format=name, **options)
        heldout = {"tokens": SMALL["evaluation_tokens"], "sequence_length": 64, "split": "heldout"}
        measured = latentize.evaluate(tmp_path / name, slope, data=options["data"], **heldout)
        assert measured["kl"] == pytest.approx(report["kl"], rel=0.02), "the files are what the converter ran"


def test_a_family_of_an_installed_package(
    slope: Path, entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class EntryPoint:
        def load(self) -> Any:
            return lambda: entries

    original = metadata.entry_points
    found = lambda **options: [EntryPoint()] if options.get("group") == table.PLUGINS else original(**options)  # noqa: E731
    monkeypatch.setattr(metadata, "entry_points", found)
    table._installed.cache_clear()
    try:
        assert "slope" in latentize.families.families()
    finally:
        table._installed.cache_clear()


@pytest.mark.parametrize(("change", "words"), [({"multiplier": {}}, "multiplier"), ({"layer_prefix": None}, "lacks")])
def test_a_faulty_table(entries: dict[str, Any], change: dict[str, Any], words: str) -> None:
    faulty = {k: v for k, v in {**entries, **change}.items() if v is not None}
    with pytest.raises(ConfigError, match=words):
        latentize.register_family(faulty)


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(ConfigError, match="not a family table"):
        latentize.register_family(tmp_path / "table.json")
