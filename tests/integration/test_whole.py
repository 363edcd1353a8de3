"""Multimodal models in the native format: what sees is carried along byte by byte, and sees what it saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.common import FP32, SMALL, logits, random_tokens, relative_error
from tests.integration.test_heal import QUICK
from tests.integration.test_towers import TOWERS, exact, saved
from tests.quantised import dequantised, quantised

import latentize
from latentize.errors import CheckpointError, OptionError
from latentize.runtime.cache import LatentCache

_IMAGE, _START, _END = 5, 6, 7
_QWEN = {"image_token_id": _IMAGE, "vision_start_token_id": _START, "vision_end_token_id": _END, "video_token_id": 8}
# What the config of the whole says beside; how many tokens an image of 16 by 16 is.
SEEING: dict[str, tuple[dict[str, Any], int]] = {
    "gemma3": ({"image_token_id": _IMAGE, "mm_tokens_per_image": 4}, 4),
    "gemma4": ({"image_token_id": _IMAGE, "video_token_id": 8, "audio_token_id": 9}, 4),
    "llama4": ({"image_token_index": _IMAGE}, 4),
    "llava": ({"image_token_id": _IMAGE, "vision_feature_layer": -1}, 16),
    "mistral3": ({"image_token_id": _IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1}, 4),
    "qwen3_5": (_QWEN, 4),
    "qwen3_5_moe": (_QWEN, 4),
    "qwen3_vl": (_QWEN, 4),
}


def source_of(folder: Path, kind: str) -> tuple[Path, Any]:
    return saved(folder, kind, tied=False, **SEEING[kind.partition(",")[0]][0])


def seen(kind: str, model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Text with an image in it, as the processor of such a model makes it."""
    kind, generator = kind.partition(",")[0], torch.Generator().manual_seed(seed)
    image: list[int] = [_IMAGE] * SEEING[kind][1]
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    if kind.startswith("qwen"):
        twice = model.config.vision_config.temporal_patch_size
        pixels, image = torch.randn(16, 3 * twice * 4 * 4, generator=generator), [_START, *image, _END]
    if kind == "gemma4":
        pixels = torch.rand(1, 16, 3 * 4 * 4, generator=generator)
    tokens = torch.tensor([[20, 21, 22, *image, 30, 31, 32, 33]])
    more: dict[str, Any] = {
        "gemma3": {"token_type_ids": (tokens == _IMAGE).long()},
        "gemma4": {
            "image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)[None],
            "mm_token_type_ids": (tokens == _IMAGE).int(),
        },
        "llama4": {},
        "llava": {},
        "mistral3": {"image_sizes": torch.tensor([[16, 16]])},
    }.get(kind, {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (tokens == _IMAGE).int()})
    return {"input_ids": tokens, "pixel_values": pixels, **more}


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_the_whole_sees_what_its_source_sees(kind: str, text: str, tmp_path: Path) -> None:
    source, model = source_of(tmp_path / "source", kind)
    (source / "preprocessor_config.json").write_text('{"size": 16}')
    options = {"method": exact(kind), "keep": "100%", "format": "native", "data": (text,), **SMALL}
    latentize.convert(source, tmp_path / "out", **options)
    made, given = loaded(tmp_path / "out"), seen(kind, model)
    expected = model(**given).logits
    assert relative_error(made(**given).logits, expected) <= FP32
    assert relative_error(model(**seen(kind, model, 1)).logits, expected) > 1e-3, "the image counts"
    greedy: dict[str, Any] = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}
    assert torch.equal(made.generate(**given, **greedy), model.generate(**given, **greedy))
    latents = LatentCache(made.config)
    assert torch.equal(made.generate(**given, **greedy, past_key_values=latents), model.generate(**given, **greedy))
    faster = latentize.accelerate(made)
    assert torch.equal(faster.generate(**given, **greedy), model.generate(**given, **greedy))
    whole, carried = tensors(source), tensors(tmp_path / "out")
    rest = {name.removeprefix("carried.") for name in carried if name.startswith("carried.")}
    assert rest == {name for name in whole if "language_model" not in name and "lm_head" not in name}
    assert all(torch.equal(carried[f"carried.{name}"], whole[name]) for name in rest)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 16}'


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"keep": "50%", "format": "native"}) for kind in ("gemma3", "gemma4", "llava", "qwen3_vl")),
        *((kind, {"bytes": "25%"}) for kind in ("gemma3", "llava", "qwen3_vl")),
    ],
    ids=lambda c: c if isinstance(c, str) else "-".join(c),
)
@torch.no_grad()
def test_token_by_token_it_says_what_it_says_at_once(
    kind: str, options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    source, model = source_of(tmp_path / "source", kind)
    latentize.convert(source, tmp_path / "out", data=(text,), **options, **SMALL)
    made, given = loaded(tmp_path / "out"), seen(kind, model)
    length = given["input_ids"].shape[1]
    greedy: dict[str, Any] = {"do_sample": False, "min_new_tokens": 9, "max_new_tokens": 9}
    # An image that is not there cannot be read again.
    greedy |= {"suppress_tokens": [_IMAGE, _START, _END, 8], "return_dict_in_generate": True, "output_logits": True}
    written = made.generate(**given, **greedy)
    further = {name: torch.cat([t, t.new_zeros(1, 9)], dim=1) for name, t in given.items() if "type_ids" in name}
    at_once = made(**{**given, **further, "input_ids": written.sequences}).logits[0, length - 1 : -1]
    assert relative_error(torch.cat(written.logits), at_once) <= FP32


def test_healing_carries_it_along(text: str, tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", "llava")
    latentize.convert(source, tmp_path / "out", keep="50%", format="native", data=(text,), **SMALL)
    latentize.heal(tmp_path / "out", tmp_path / "healed", source, data=(text,), **QUICK)
    before, after = tensors(tmp_path / "out"), tensors(tmp_path / "healed")
    rest = [name for name in before if name.startswith("carried.")]
    assert rest
    assert all(torch.equal(before[name], after[name]) for name in rest)
    loaded(tmp_path / "healed")


def test_what_is_quantised_beside_the_language_model_is_left_out(text: str, tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", "llava")
    path = source / "model.safetensors"
    stored = load_file(path)
    name = next(n for n in stored if n.startswith("vision_tower") and n.endswith("weight"))
    save_file({**stored, name: stored[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    report = latentize.convert(source, tmp_path / "out", keep="50%", format="native", data=(text,), **SMALL)
    assert any("is quantised, and left out" in note for note in report["notes"])
    with pytest.raises(CheckpointError, match="nothing that sees"):
        loaded(tmp_path / "out")


def test_a_model_of_text_cannot_be_asked_to_see(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    latentize.convert(source(), tmp_path / "out", keep="50%", format="native", data=(text,), **SMALL)
    with pytest.raises(CheckpointError, match="LZ123"):
        loaded(tmp_path / "out")


def test_it_is_not_saved_from_memory(text: str, tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", "llava")
    latentize.convert(source, tmp_path / "out", keep="50%", format="native", data=(text,), **SMALL)
    with pytest.raises(OptionError, match="not saved from memory"):
        loaded(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert "vision_config" in json.loads((tmp_path / "out" / "config.json").read_text())["whole_config"]


def test_weights_that_see_and_are_missing(text: str, tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", "llava")
    latentize.convert(source, tmp_path / "out", keep="50%", format="native", data=(text,), **SMALL)
    (path,) = [path for path in (tmp_path / "out").glob("*.safetensors") if "carried" in str(load_file(path).keys())]
    stored = load_file(path)
    lost = next(name for name in stored if name.startswith("carried."))
    save_file({name: t for name, t in stored.items() if name != lost}, path, {"format": "pt"})
    for index in (tmp_path / "out").glob("*.index.json"):
        entries = json.loads(index.read_text())
        del entries["weight_map"][lost]
        index.write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match="missing keys"):
        loaded(tmp_path / "out")


def test_the_language_model_saved_alone_does_not_say_that_it_sees(text: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, _ = source_of(tmp_path / "source", "llava")
    latentize.convert(source, tmp_path / "out", keep="50%", format="native", data=(text,), **SMALL)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="LZ123"):
        loaded(tmp_path / "saved")


@torch.no_grad()
def test_text_alone_is_that_of_the_language_model(text: str, tmp_path: Path) -> None:
    source, _ = source_of(tmp_path / "source", "qwen3_vl")
    latentize.convert(source, tmp_path / "out", keep="50%", format="native", data=(text,), **SMALL)
    tokens = random_tokens()
    assert relative_error(loaded(tmp_path / "out")(input_ids=tokens).logits, logits(tmp_path / "out", tokens)) <= FP32


def test_a_language_model_that_is_quantised(text: str, tmp_path: Path) -> None:
    """As published: the language model is quantised, what sees is not."""
    source, model = source_of(tmp_path / "source", "qwen3_vl")
    restored = quantised(source, tmp_path / "made", "fp8, blocks")
    dequantised(source, tmp_path / "plain", restored)
    options = {"method": "mha2mla", "keep": "100%", "format": "native", "data": (text,), **SMALL}
    given, found = seen("qwen3_vl", model), []
    for folder in ("made", "plain"):
        latentize.convert(tmp_path / folder, tmp_path / f"{folder}-out", **options)
        assert any(name.startswith("carried.") for name in tensors(tmp_path / f"{folder}-out"))
        with torch.no_grad():
            found.append(loaded(tmp_path / f"{folder}-out")(**given).logits)
    assert torch.equal(*found)
