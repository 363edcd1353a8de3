"""Tensors that are there beside those of the model, or under other names: read as transformers reads them, or refused
with what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.common import SMALL, logits, random_tokens, text_file
from tests.models import ONLY_MHA, pico, pico_model

import latentize
from latentize.errors import CheckpointError
from latentize.families import families, model_spec
from latentize.families.opening import open_source
from latentize.planning.inspection import inspect

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
Q, LLAMA_Q = "self_attn.q_proj", "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder, made = tmp_path_factory.mktemp("stored"), {}

    def get(family: str = "llama", **config: Any) -> Path:
        key = f"{family}-{len(config)}"
        if key not in made:
            made[key] = pico(folder, family, 4 if family in ONLY_MHA else 2, name=key, **config)
        return made[key]

    return get


def changed(source: Path, folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, folder)
    stored = load_file(str(folder / WEIGHTS))
    stored = change(stored) or stored
    save_file({name: t.contiguous() for name, t in stored.items()}, str(folder / WEIGHTS), metadata={"format": "pt"})
    return folder


def adding(**tensors: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda stored: stored.update({name.replace("__", "."): t for name, t in tensors.items()})


def as_transformers_reads_it(folder: Path) -> Tensors:
    """The state of the model that transformers makes of a folder, all of which it has found there."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return model.state_dict()


def same(folder: Path) -> None:
    """What we read is what transformers reads, where that is not fused."""
    checkpoint, spec = open_source(folder)
    assert set(checkpoint.names()) - {spec.module("head") + ".weight"} <= set(spec.tensor_shapes())
    theirs = as_transformers_reads_it(folder)
    compared = [name for name in checkpoint.names() if name in theirs]
    assert len(compared) > 10
    assert all(torch.equal(checkpoint.load(name), theirs[name].to(checkpoint.load(name).dtype)) for name in compared)


MASK = torch.ones(1, 1, 8, 8).tril()
BUFFERS: dict[str, tuple[str, Tensors]] = {
    "mask, bool": ("gpt_neox", {"gpt_neox.layers.0.attention.bias": MASK.bool()}),
    "mask, uint8": ("gpt_neox", {"gpt_neox.layers.1.attention.bias": MASK.byte()}),
    "mask, float": ("gpt_neox", {"gpt_neox.layers.1.attention.bias": MASK.half()}),
    "masked bias": ("gpt_neox", {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}),
    "masks of GPT-2": (
        "gpt2",
        {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)},
    ),
    "RoPE of GPT-NeoX": ("gpt_neox", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}),
    "RoPE of a layer": ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    "RoPE of the model": ("qwen2", {"model.rotary_emb.inv_freq": torch.ones(8).bfloat16()}),
    "RoPE in float64": ("mistral", {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8).double()}),
    "cosines": ("llama", {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 9, 16)}),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_what_is_derived_is_left_out(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    family, buffers = BUFFERS[kind]
    folder = changed(saved(family), tmp_path / "odd", lambda stored: stored.update(buffers))
    same(folder)
    assert not set(buffers) & set(open_source(folder)[0].names())
    assert inspect(str(folder))["parameters"] == inspect(str(saved(family)))["parameters"]


def test_a_mask_of_another_family_is_one_too_many(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(saved(), tmp_path / "odd", adding(model__layers__0__attention__bias=MASK))
    with pytest.raises(CheckpointError, match=r"attention\.bias") as caught:
        open_source(folder)
    assert caught.value.code == "LZ111"


def test_layers_that_predict_several_tokens_are_left_out(saved: Callable[..., Path], tmp_path: Path) -> None:
    extra = {
        "model__layers__2__eh_proj__weight": torch.ones(64, 128),
        "model__layers__2__enorm__weight": torch.ones(64),
    }
    folder = changed(saved("glm4_moe"), tmp_path / "more", adding(**extra))
    checkpoint, spec = open_source(folder)
    assert spec.layers == 2 and checkpoint.count(spec.table.layer_prefix) == 2
    with pytest.raises(CheckpointError, match="3"):
        open_source(changed(saved(), tmp_path / "odd", adding(**extra)))


def test_what_is_ignored_is_what_transformers_ignores() -> None:
    for family, table in families().items():
        theirs = type(pico_model(family, 4))._keys_to_ignore_on_load_unexpected or []
        if table.further_layers:
            # They name the numbers of the layers that published models have beyond their own.
            theirs = [pattern for pattern in theirs if not re.fullmatch(r"model\\\.layers\\\.\d+\.\*", pattern)]
        # Another constant beside the first, in files of old versions; it warns of it.
        theirs = [*theirs, *(["attn.masked_bias"] if family == "gpt2" else [])]
        assert [pattern.rstrip("$").replace("\\", "") for pattern in table.ignored_tensors] == list(theirs), family


def without_body(stored: Tensors) -> Tensors:
    """As ``AutoModel`` saves it."""
    return {name.partition(".")[2]: t for name, t in stored.items() if name.startswith(("model.", "gpt_neox."))}


RENAMED: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], Tensors | None]]] = {
    "base model": ("llama", {"tie_word_embeddings": True}, without_body),
    "base model of another family": ("qwen3", {"tie_word_embeddings": True}, without_body),
    "half of it": (
        "llama",
        {},
        lambda stored: {n.removeprefix("model.") if "layers.0" in n else n: t for n, t in stored.items()},
    ),
    "head in the body": (
        "llama",
        {},
        lambda stored: {"model." * (n == "lm_head.weight") + n: t for n, t in stored.items()},
    ),
    "GPT-NeoX without its body's name, with its head": (
        "gpt_neox",
        {},
        lambda stored: {n.removeprefix("gpt_neox."): t for n, t in stored.items()},
    ),
    "GPT-2 as it was published": (
        "gpt2",
        {},
        lambda stored: {n.removeprefix("transformer."): t for n, t in stored.items()},
    ),
    "experts where transformers has them": (
        "mixtral",
        {},
        lambda stored: {n.replace("block_sparse_moe", "mlp"): t for n, t in stored.items()},
    ),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_names_that_transformers_reads(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    family, config, change = RENAMED[kind]
    folder = changed(saved(family, **config), tmp_path / "odd", change)
    same(folder)
    checkpoint, spec = open_source(folder)
    original, _ = open_source(saved(family, **config))
    assert set(checkpoint.names()) == set(original.names())
    assert all(torch.equal(checkpoint.load(name), original.load(name)) for name in spec.tensor_shapes())


def convert_alike(whole: Path, folder: Path, tmp_path: Path) -> None:
    """What becomes of two folders is the same, bit by bit."""
    text = text_file(tmp_path)
    for source, out in ((whole, "a"), (folder, "b")):
        latentize.convert(source, tmp_path / out, keep=0.5, data=(text,), **{**SMALL, "tokens": 1024})
    first, second = (load_file(str(tmp_path / out / WEIGHTS)) for out in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def in_one(stored: Tensors) -> Tensors:
    """Experts of a layer in one tensor, as some models are published."""
    found = {n: t for n, t in stored.items() if ".experts." not in n}
    for layer in {n.split(".experts.")[0] for n in stored if ".experts." in n}:
        own = {n: t for n, t in stored.items() if n.startswith(f"{layer}.experts.")}
        count = len({n.split(".experts.")[1].split(".")[0] for n in own})
        gate, up, down = (
            [own[f"{layer}.experts.{expert}.{part}_proj.weight"] for expert in range(count)]
            for part in ("gate", "up", "down")
        )
        found[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        found[f"{layer}.experts.down_proj"] = torch.stack(down)
    return found


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_moe"])
def test_experts_in_one_tensor(family: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    whole = saved(family)
    folder = changed(whole, tmp_path / "odd", in_one)
    assert torch.equal(logits(folder, random_tokens()), logits(whole, random_tokens())), "transformers reads it"
    convert_alike(whole, folder, tmp_path)


@pytest.mark.parametrize("kind", ["base model", "experts where transformers has them"])
def test_they_convert_to_the_same(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    family, config, change = RENAMED[kind]
    whole = saved(family, **config)
    folder = changed(whole, tmp_path / "odd", change)
    convert_alike(whole, folder, tmp_path)


def test_old_masks_convert(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(saved("gpt_neox"), tmp_path / "odd", lambda s: s.update(BUFFERS["mask, uint8"][1]))
    report = latentize.convert(
        folder, tmp_path / "out", keep=0.5, data=(text_file(tmp_path),), **{**SMALL, "tokens": 1024}
    )
    assert report["format"] == "native"


def test_a_tensor_under_both_names_is_one_too_many(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(saved(), tmp_path / "odd", lambda s: s.update({"norm.weight": s["model.norm.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"tensor norm\.weight") as caught:
        open_source(folder)
    assert caught.value.code == "LZ111"


def test_messages_name_what_is_in_the_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    """A renamed tensor is found by the name that it is stored under."""

    def broken(stored: Tensors) -> Tensors:
        stored[LLAMA_Q + ".weight"][0, 0] = torch.nan
        return without_body(stored)

    folder = changed(saved(tie_word_embeddings=True), tmp_path / "odd", broken)
    checkpoint, _ = open_source(folder)
    with pytest.raises(CheckpointError, match=r"tensor layers\.0.*\(model\.layers\.0") as caught:
        checkpoint.load(LLAMA_Q + ".weight")
    assert caught.value.code == "LZ108"


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda stored: {name.replace("model.", prefix): t for name, t in stored.items()}


def unstacked(stored: Tensors) -> Tensors:
    return {name.replace("self_attn.q_proj", "attention.wq"): t for name, t in stored.items()}


FOREIGN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another prefix": (prefixed("transformer."), "save_pretrained"),
    "a compiled model": (prefixed("_orig_mod.model."), "save_pretrained"),
    "a wrapped model": (prefixed("module.model."), "save_pretrained"),
    "other projections": (unstacked, "save_pretrained"),
    "gamma of a norm": (
        lambda stored: {n.replace("input_layernorm.weight", "input_layernorm.gamma"): t for n, t in stored.items()},
        "save_pretrained",
    ),
    "base model without a head": (without_body, "AutoModelForCausalLM"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_names_are_refused_with_what_to_do(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    change, fix = FOREIGN[kind]
    folder = changed(saved(), tmp_path / "odd", change)
    for read in (open_source, inspect):
        with pytest.raises(CheckpointError) as caught:
            read(str(folder))
        assert caught.value.code == "LZ111"
        assert fix in caught.value.fix


def quantised(*names: str, dtype: torch.dtype = torch.int32) -> Callable[[Tensors], None]:
    """Each projection of the queries as these tensors, instead of a weight."""

    def change(stored: Tensors) -> None:
        for name in [n for n in stored if n.endswith(Q + ".weight")]:
            weight = stored.pop(name)
            for part in names:
                kind = dtype if part == names[0] else torch.float16
                stored[f"{name.removesuffix('.weight')}.{part}"] = weight[:, :8].to(kind)

    return change


# What is left of a method in a folder that does not tell of it.
QUANTISED: dict[str, Callable[[Tensors], None]] = {
    "GPTQ": quantised("qweight", "qzeros", "scales", "g_idx"),
    "AWQ": quantised("qweight", "qzeros", "scales"),
    "bitsandbytes": quantised("weight", "SCB", dtype=torch.int8),
    "bitsandbytes, 4 bits": quantised(
        "weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", dtype=torch.uint8
    ),
    "compressed-tensors": quantised("weight_packed", "weight_scale", "weight_shape"),
    "HQQ": quantised("W_q", "scale", "zero", dtype=torch.uint8),
    "fp8, blocks": quantised("weight", "weight_scale_inv", dtype=torch.float8_e4m3fn),
    "fp8": quantised("weight", "weight_scale", "input_scale", dtype=torch.float8_e5m2),
    "quanto": quantised("weight._data", "weight._scale", dtype=torch.int8),
    "ModelOpt": quantised("weight", "weight_scale", "weight_scale_2", dtype=torch.uint8),
    "torchao": quantised("_weight_qdata", "_weight_scale", dtype=torch.int8),
    "int8 alone": quantised("weight", dtype=torch.int8),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_is_quantised_is_called_so(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(saved(), tmp_path / "odd", QUANTISED[kind])
    for read in (open_source, inspect):
        with pytest.raises(CheckpointError) as caught:
            read(str(folder))
        assert caught.value.code == "LZ204", str(caught.value)
        assert LLAMA_Q in caught.value.where
        assert "unquantised" in caught.value.fix


@pytest.mark.parametrize("kind", ["GPTQ", "AWQ", "HQQ", "quanto", "compressed-tensors", "torchao"])
def test_the_method_is_named(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=kind):
        open_source(changed(saved(), tmp_path / "odd", QUANTISED[kind]))


def test_no_table_has_names_that_look_quantised(saved: Callable[..., Path]) -> None:
    for family in families():
        config = json.loads((saved(family) / "config.json").read_text())
        open_source(saved(family))[0].check_stored()
        assert model_spec(config).layers == 2


def test_half_a_byte_is_counted(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Sizes of precisions that are not read are checked, too."""
    folder = changed(saved(), tmp_path / "odd", quantised("weight", dtype=torch.int8))
    path = folder / WEIGHTS
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[LLAMA_Q + ".weight"]["dtype"] = "F4"
    for shape, code in (([64, 16], "LZ204"), ([64, 8], "LZ105")):
        header[LLAMA_Q + ".weight"]["shape"] = shape
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        with pytest.raises(CheckpointError) as caught:
            open_source(folder)
        assert caught.value.code == code
