"""Quantised weights are read as the libraries that wrote them dequantise them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.common import FP32, SMALL, random_tokens, relative_error, text_file
from tests.models import pico
from tests.quantised import FORMATS, dequantised, quantised
from torch import Tensor
from transformers import AutoModelForCausalLM

import latentize
from latentize.checkpoint import open_checkpoint
from latentize.checkpoint.dequantise import bitsandbytes_4bit, bitsandbytes_8bit, fp8, unpacked
from latentize.checkpoint.scheme import Scheme
from latentize.checkpoint.schemes import SCHEMES
from latentize.errors import CheckpointError, ConfigError, LatentizeError
from latentize.families.opening import open_source
from latentize.modeling.load import load_model

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico(tmp_path_factory.mktemp("source"))


def mxfp4_experts(folder: Path) -> dict[str, Tensor]:
    """A gpt-oss picomodel with experts as they are published; what these are then, as transformers has it."""
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    tensors = load_file(folder / "model.safetensors")
    generator, expected = torch.Generator().manual_seed(0), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = _convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    entries = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entries}))
    return expected


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Bit by bit what transformers makes of them; and a conversion runs with them."""
    folder = pico(tmp_path, "gpt_oss", stored=torch.bfloat16)
    expected = mxfp4_experts(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization is not None and checkpoint.quantization["file_type"] == "MXFP4"
    assert checkpoint.quantization["tensors"]["quantised"] == len(expected) == 4
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.load(name), tensor), name
    report = latentize.convert(folder, tmp_path / "out", keep="50%", data=(text_file(tmp_path),), **SMALL)
    assert any("MXFP4" in note for note in report["notes"])
    written, stored = (load_file(place / "model.safetensors") for place in (tmp_path / "out", folder))
    for name in expected:
        # They stay as they are, and are dequantised by whoever loads them.
        assert f"source.{name}" not in written
        for part in ("blocks", "scales"):
            assert torch.equal(written[f"source.{name}_{part}"], stored[f"{name}_{part}"])
    made = load_model(tmp_path / "out")
    for name, tensor in expected.items():
        assert torch.equal(made.get_parameter(f"source.{name}"), tensor)
    tokens = random_tokens()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative_error(stock(tokens).logits, made(tokens).logits) <= FP32
    assert latentize.verify(tmp_path / "out")["ok"]
    # All else is what the dequantised folder gives.
    plain = tmp_path / "plain"
    dequantised(folder, plain, {name: checkpoint.load(name).bfloat16() for name in checkpoint.names()})
    (plain / "config.json").write_text(json.dumps(checkpoint.config))
    options = {"keep": "50%", "data": (text_file(tmp_path),), **SMALL}
    latentize.convert(plain, tmp_path / "plain-out", **options)
    of_plain = load_file(tmp_path / "plain-out" / "model.safetensors")
    for name, tensor in of_plain.items():
        own = written.get(name)
        experts = expected.get(name.removeprefix("source."))
        assert torch.equal(tensor, own) if own is not None else torch.equal(tensor.float(), experts), name


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_is_what_was_quantised(name: str, source: Path, tmp_path: Path) -> None:
    expected = quantised(source, tmp_path / "made", name)
    checkpoint, spec = open_source(tmp_path / "made")
    assert sorted(checkpoint.names()) == sorted(expected)
    assert "quantization_config" not in checkpoint.config
    for tensor, value in expected.items():
        made = checkpoint.load(tensor)
        assert checkpoint.shape(tensor) == tuple(value.shape) == tuple(made.shape)
        assert str(made.dtype) == f"torch.{checkpoint.dtype(tensor)}"
        assert made.numel() * made.element_size() == checkpoint.size(tensor)
        assert torch.equal(made.float(), value.float()), tensor
    rows = [5, 0, 5]
    tensor = spec.layer_prefix(1) + "self_attn.q_proj.weight"
    assert torch.equal(checkpoint.load_rows(tensor, rows), expected[tensor][rows])
    found = checkpoint.quantization
    assert found is not None and found["tensors"]["quantised"] == 14
    assert (
        name.partition(",")[0].lower() in found["file_type"].lower()
        and found["file_type"] in checkpoint.quantization_note
    )


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(("fp8, b", "fp8, one", "compressed"))])
def test_as_transformers_dequantises_them(name: str, source: Path, tmp_path: Path) -> None:
    """Where it does without a GPU."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    quantised(source, tmp_path / "made", name)
    entries = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    kind: Any = CompressedTensorsConfig if name.startswith("compressed") else FineGrainedFP8Config
    known = {"weight_block_size", "activation_scheme"} & entries.keys() if kind is FineGrainedFP8Config else ()
    options = {key: entries[key] for key in known}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", quantization_config=kind(dequantize=True, **options), dtype=torch.float32
    )
    checkpoint, theirs = open_checkpoint(tmp_path / "made"), model.state_dict()
    for tensor in checkpoint.names():
        assert torch.equal(checkpoint.load(tensor).float(), theirs[tensor]), tensor


@pytest.mark.parametrize(
    "name", ["fp8, blocks", "GPTQ, 4 bits", "compressed-tensors, int4", "ModelOpt, NVFP4", "torchao, int8"]
)
def test_the_model_runs_on_what_is_read(name: str, source: Path, tmp_path: Path) -> None:
    expected = quantised(source, tmp_path / "made", name)
    model = load_model(tmp_path / "made")
    for tensor, value in model.state_dict().items():
        if tensor in expected:
            assert torch.equal(value, expected[tensor].float()), tensor


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "fp4-nested", "int8"])
def test_against_files_of_bitsandbytes(name: str) -> None:
    """Made by its version 0.50.2 of one random matrix, on a CPU: ``quantize_4bit`` of bfloat16 in blocks of 64, and
    ``int8_vectorwise_quant`` of float16; beside each what it dequantises it to."""
    stored = load_file(DATA / "bitsandbytes.safetensors")
    parts = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
    expected = parts.pop("expected")
    if name == "int8":
        made = bitsandbytes_8bit(parts["weight"], parts["SCB"])
    else:
        short = {key.removeprefix("weight.").partition(".bitsandbytes__")[0]: t for key, t in parts.items()}
        made = bitsandbytes_4bit(short)
    assert made.dtype == torch.float32 and torch.equal(made, expected.float())


def made_by(library: str) -> dict[str, tuple[Scheme, dict[str, Tensor]]]:
    """Of a file of ours: each of its weights, as what is read of it, and its parts, ``expected`` among them."""
    path = DATA / f"{library}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    scheme, weights = SCHEMES[library]({"quant_algo": "FP8"}, str(path), metadata), {}
    for name, tensor in load_file(path).items():
        module, _, last = name.rpartition(".")
        part = last if last == "expected" else (scheme.split(name) or ("", last))[1]
        weights.setdefault(module, (scheme, {}))[1][part] = tensor
    return weights


LIBRARIES = {
    "torchao": "int8 int8-groups int4 int3-asym fp8 fp8-one mxfp8 mxfp8-tiles mxfp4 nvfp4 nvfp4-plain",
    "modelopt": "fp8 fp8-rows fp8-blocks mxfp8 nvfp4",
}


@pytest.mark.parametrize(
    ("library", "name"), [(key, name) for key, names in LIBRARIES.items() for name in names.split()]
)
def test_against_files_of_libraries(library: str, name: str) -> None:
    """Made by torchao 0.18.0 and ModelOpt 0.47.0 of a random matrix in bfloat16, 96 columns, and what they dequantise
    it to: ModelOpt in float32."""
    scheme, parts = made_by(library)[name]
    expected = parts.pop("expected")
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    assert scheme.shape(shapes, parts.__getitem__, f"{name}.weight") == tuple(expected.shape)
    # As they are read.
    parts = {part: t.view(torch.uint8) if t.dtype == torch.float8_e8m0fnu else t for part, t in parts.items()}
    assert torch.equal(scheme.restored(parts, f"{name}.weight"), expected.float())


def test_a_scale_of_inputs_is_in_the_weight() -> None:
    """y = W (s x)."""
    scheme, parts = made_by("modelopt")["nvfp4"]
    expected, s = parts.pop("expected"), torch.rand(96)
    assert torch.equal(scheme.restored({**parts, "pre_quant_scale": s}, "nvfp4.weight"), expected * s)


def test_blocks_of_which_the_last_are_smaller() -> None:
    scheme = SCHEMES["modelopt"]({"quant_algo": "FP8_PB_WO"}, "here", {})
    w, scale = torch.randn(300, 260).to(torch.float8_e4m3fn), torch.rand(3, 1, 3, 1)
    made = scheme.restored({"weight": w, "weight_scale": scale}, "here.weight")
    for row, column in ((0, 0), (127, 128), (128, 127), (299, 259)):
        assert made[row, column] == w[row, column].float() * scale[row // 128, 0, column // 128, 0]


@pytest.mark.parametrize(
    ("name", "file", "told"),
    [
        ("GPTQ, 4 bits", "quantize_config.json", {"bits": 4, "group_size": 16, "desc_act": True, "sym": False}),
        ("AWQ", "quant_config.json", {"w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"}),
        ("ModelOpt, NVFP4", "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}),
    ],
)
def test_a_file_beside_the_config(name: str, file: str, told: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """What older files have, and others than transformers'."""
    folder = tmp_path / "made"
    expected = quantised(source, folder, name)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(told))
    if name.startswith("GPTQ"):
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit-16g.safetensors")
    checkpoint = open_source(folder)[0]
    for tensor, value in expected.items():
        assert torch.equal(checkpoint.load(tensor).float(), value.float()), tensor
    state = load_model(folder).state_dict()
    assert all(torch.equal(value, expected[tensor].float()) for tensor, value in state.items() if tensor in expected)


def test_such_a_file_beside_weights_that_are_not_quantised(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "made")
    (tmp_path / "made" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}))
    assert open_checkpoint(tmp_path / "made").quantization is None


def test_last_blocks_may_be_smaller() -> None:
    w, scale = torch.randn(40, 24).to(torch.float8_e4m3fn), torch.rand(3, 2)
    made = fp8(w, scale, (16, 16))
    for row, column in ((0, 0), (15, 16), (16, 15), (39, 23)):
        assert made[row, column] == w[row, column].float() * scale[row // 16, column // 16]
    exponents = torch.randint(120, 130, (3, 2), dtype=torch.uint8)
    assert torch.equal(fp8(w, exponents, (16, 16)), fp8(w, 2.0 ** (exponents.float() - 127), (16, 16)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_integers_across_words(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (3, 64))
    rows = [int("".join(f"{value:0{bits}b}" for value in reversed(row)), 2) for row in values.tolist()]
    packed = [[(row >> at) & 0xFFFFFFFF for at in range(0, 64 * bits, 32)] for row in rows]
    signed = torch.tensor(packed).to(torch.uint32).view(torch.int32)
    assert torch.equal(unpacked(signed, bits), values.int())


def changed(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("AWQ", {"version": "gemv"}, "version 'gemv'"),
        ("GPTQ, 4 bits", {"bits": 5}, "GPTQ, 5 bits"),
        ("GPTQ, 4 bits", {"checkpoint_format": "marlin"}, "marlin"),
        ("GPTQ, 4 bits", {"quant_method": "quip"}, "quantised"),
        ("ModelOpt, NVFP4", {"quant_algo": "W4A16_AWQ"}, "ModelOpt, W4A16_AWQ"),
        (
            "ModelOpt, NVFP4",
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4_SVD"}}},
            "ModelOpt, NVFP4_SVD",
        ),
        ("compressed-tensors, int4", {"format": "mxfp6-pack-quantized"}, "mxfp6"),
        ("compressed-tensors, int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    name: str, entries: dict[str, Any], said: str, source: Path, tmp_path: Path
) -> None:
    quantised(source, tmp_path / "made", name)
    changed(tmp_path / "made", **entries)
    with pytest.raises(LatentizeError, match=said) as refused:
        open_source(tmp_path / "made")
    assert refused.value.code == "LZ204"


@pytest.mark.parametrize(("name", "part"), [("GPTQ, 4 bits", "qzeros"), ("AWQ", "scales"), ("fp8, blocks", "weight")])
def test_a_part_that_is_missing(name: str, part: str, source: Path, tmp_path: Path) -> None:
    quantised(source, tmp_path / "made", name)
    file, tensor = tmp_path / "made" / "model.safetensors", "model.layers.0.self_attn.q_proj"
    stored = load_file(file)
    del stored[f"{tensor}.{part}"]
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is missing") as refused:
        open_source(tmp_path / "made")[0].load(f"{tensor}.weight")
    assert tensor in str(refused.value)


def test_entries_that_make_no_sense(source: Path, tmp_path: Path) -> None:
    quantised(source, tmp_path / "made", "GPTQ, 4 bits")
    changed(tmp_path / "made", bits="four")
    with pytest.raises(ConfigError, match="'bits' should be a whole number"):
        open_source(tmp_path / "made")
