"""Language models inside multimodal ones: converted alone, and what they say is what the whole says of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, logits, random_tokens, relative_error
from tests.models import byte_tokenizer, pico_config, randomize

import latentize
from latentize.errors import UnsupportedModelError
from latentize.planning.reading import read_spec

_SIZES = {"hidden_size": 16, "intermediate_size": 24}
_VISION = {**_SIZES, "num_attention_heads": 2, "patch_size": 4, "image_size": 16, "num_hidden_layers": 1}
_QWEN = {**_SIZES, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 16}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
# model_type, and which: family of the language model, what its part of the config says beside, the part that sees
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}, {**_VISION, "model_type": "siglip_vision_model"}),
    "gemma4": (
        "gemma4_text",
        {"use_bidirectional_attention": "vision"},
        {
            **_VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "standardize": True,
        },
    ),
    "llama4": (
        "llama4_text",
        {},
        {
            **_VISION,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    ),
    "llava": ("llama", {}, {**_VISION, "model_type": "clip_vision_model"}),
    "mistral3": ("mistral", {}, {**_VISION, "model_type": "pixtral"}),
    "mistral3, Ministral": ("ministral3", {}, {**_VISION, "model_type": "pixtral"}),
    "qwen3_5": ("qwen3_5_text", {"rope_parameters": _MROPE}, _QWEN),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"rope_parameters": _MROPE}, _QWEN),
    "qwen3_vl": (
        "qwen3",
        {"model_type": "qwen3_vl_text", "rope_parameters": _MROPE},
        {**_QWEN, "deepstack_visual_indexes": [0]},
    ),
}


def saved(folder: Path, kind: str, *, tied: bool, **more: Any) -> tuple[Path, Any]:
    """A multimodal picomodel on disk, and in memory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    family, entries, sees = TOWERS[kind]
    kind = kind.partition(",")[0]
    text = {**pico_config(family, 2, tie_word_embeddings=tied).to_dict(), **entries}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=sees, tie_word_embeddings=tied, **more)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomize(model)
    model.eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder, model


def exact(kind: str) -> str:
    """The method that loses nothing where nothing is taken; MHA2MLA has no place for norms of values."""
    return "calibrated" if kind == "gemma4" else "mha2mla"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_the_language_model_alone_says_what_the_whole_says_of_text(
    kind: str, tied: bool, text: str, tmp_path: Path
) -> None:
    source, model = saved(tmp_path / "source", kind, tied=tied)
    tokens = random_tokens()
    expected = model(input_ids=tokens).logits
    assert relative_error(logits(source, tokens), expected) <= FP32, "what eval compares with"
    options = {"method": exact(kind), "keep": "100%", "format": "native", "data": (text,), **SMALL}
    report = latentize.convert(source, tmp_path / "out", **options)
    assert relative_error(logits(tmp_path / "out", tokens), expected) <= FP32
    assert any(f"'{kind.partition(',')[0]}' alone is converted" in note for note in report["notes"])
    spec = read_spec(str(source))
    assert spec.cache_values == report["source_cache_values_per_token_layer"]
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "vision_config" not in stored["source_config"]


def test_half_of_it(text: str, tmp_path: Path) -> None:
    source, _ = saved(tmp_path / "source", "qwen3_vl", tied=False)
    report = latentize.convert(source, tmp_path / "out", keep="50%", data=(text,), **SMALL)
    assert report["format"] == "deepseek_v3"
    measured = latentize.evaluate(
        tmp_path / "out", source, tokens=1024, sequence_length=64, data=(text,), split="heldout"
    )
    assert measured["kl"] == pytest.approx(report["kl"], rel=1e-2)


def test_other_multimodal_models_are_refused(text: str, tmp_path: Path) -> None:
    source, _ = saved(tmp_path / "source", "llava", tied=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "llava_next"}))
    with pytest.raises(UnsupportedModelError, match="multimodal"):
        latentize.convert(source, tmp_path / "out", data=(text,), **SMALL)
