"""Folders with quantised weights, made of a tiny model in the formats that people publish, and what each weight is
then, worked out value by value from the integers that were packed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(r"_proj\.weight$")
Parts = dict[str, Tensor]
# What becomes of a weight: its tensors by the last part of their names, and what they stand for.
Quantise = Callable[[Tensor], tuple[Parts, Tensor]]
GROUP = 16


def words(rows: Sequence[Sequence[int]], bits: int) -> Tensor:
    """Integers as words of 32 bits, bit by bit."""
    made = []
    for row in rows:
        stream = [(value >> bit) & 1 for value in row for bit in range(bits)]
        packed = [sum(bit << k for k, bit in enumerate(stream[at : at + 32])) for at in range(0, len(stream), 32)]
        made.append([word - (1 << 32) if word >> 31 else word for word in packed])
    return torch.tensor(made, dtype=torch.int32)


def fp8_blocks(w: Tensor) -> tuple[Parts, Tensor]:
    """DeepSeek's: a scale for each block of 32 rows and 16 columns."""
    codes, expected = torch.empty_like(w, dtype=torch.float8_e4m3fn), torch.empty_like(w)
    scales = torch.empty(len(w) // 32, w.shape[1] // 16)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            here = (slice(32 * row, 32 * row + 32), slice(16 * column, 16 * column + 16))
            scale = w[here].abs().max() / 448
            codes[here], scales[row, column] = (w[here] / scale).to(torch.float8_e4m3fn), scale
            expected[here] = codes[here].float() * scale
    return {"weight": codes, "weight_scale_inv": scales}, expected


def fp8_tensor(w: Tensor) -> tuple[Parts, Tensor]:
    """One scale for all, and one for what goes in."""
    scale = w.abs().max() / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.5)}
    return parts, codes.float() * scale


def fp8_rows(w: Tensor) -> tuple[Parts, Tensor]:
    """FBGEMM's: one scale for each row."""
    scale = w.abs().amax(1, keepdim=True) / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _grouped(w: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers ``[o, i]``, zero points and scales ``[g, o]`` in half precision."""
    count, most = int(groups.max()) + 1, (1 << bits) - 1
    scales = torch.empty(count, len(w), dtype=torch.float16)
    zeros, codes = torch.empty(count, len(w), dtype=torch.int32), torch.empty_like(w, dtype=torch.int32)
    for group in range(count):
        part = w[:, groups == group]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        scales[group] = ((high - low) / most).half()
        zeros[group] = (-low / scales[group]).round().clamp(1, most).int()
        step, zero = scales[group].float()[:, None], zeros[group][:, None]
        codes[:, groups == group] = ((part / step).round().int() + zero).clamp(0, most)
    return codes, zeros, scales


def gptq(bits: int, *, ordered: bool = True, older: bool = True) -> Quantise:
    """AutoGPTQ's; ``older`` files have zero points that are one less."""

    def quantise(w: Tensor) -> tuple[Parts, Tensor]:
        inputs = w.shape[1]
        groups = torch.arange(inputs) // GROUP
        if not ordered:
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        codes, zeros, scales = _grouped(w, bits, groups)
        parts = {"qweight": words(codes.tolist(), bits).T.contiguous(), "scales": scales}
        parts |= {"qzeros": words((zeros - int(older)).tolist(), bits), "g_idx": groups.int()}
        expected = scales[groups].T * (codes - zeros[groups].T)
        return parts, expected.float()

    return quantise


def awq(w: Tensor) -> tuple[Parts, Tensor]:
    """AutoAWQ's: eight neighbours in a word, the even ones first."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    groups = torch.arange(w.shape[1]) // GROUP
    codes, zeros, scales = _grouped(w, 4, groups)

    def packed(rows: Tensor) -> Tensor:
        return words(rows.unflatten(1, (-1, 8))[..., order].flatten(1).tolist(), 4)

    parts = {"qweight": packed(codes.T), "qzeros": packed(zeros), "scales": scales}
    return parts, ((codes - zeros[groups].T) * scales[groups].T).float()


def nf4(w: Tensor) -> tuple[Parts, Tensor]:
    """bitsandbytes': blocks of 64 values, whatever row they are of."""
    code = torch.linspace(-1, 1, 16) ** 3
    flat, absmax, expected = w.flatten(), [], []
    nibbles: list[int] = []
    for start in range(0, len(flat), 64):
        part = flat[start : start + 64]
        absmax.append(part.abs().max())
        nearest = (part[:, None] / absmax[-1] - code).abs().argmin(1)
        nibbles += nearest.tolist()
        expected.append((code[nearest] * absmax[-1]).bfloat16())
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
    packed = torch.tensor([high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True)])
    parts = {
        "weight": packed.to(torch.uint8)[:, None],
        "weight.absmax": torch.stack(absmax),
        "weight.quant_map": code,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return parts, torch.cat(expected).view_as(w).float()


def int8(w: Tensor) -> tuple[Parts, Tensor]:
    """bitsandbytes'."""
    largest = w.abs().amax(1)
    codes = (w / largest[:, None] * 127).round().to(torch.int8)
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes * largest[:, None] * 7.874015718698502e-3


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4(w: Tensor) -> tuple[Parts, Tensor]:
    """ModelOpt's: four bits in groups of 16, a scale for each, one for all."""
    double = w.abs().max() / (6 * 448)
    groups = w.unflatten(1, (-1, 16))
    scale = (groups.abs().amax(-1) / 6 / double).to(torch.float8_e4m3fn)
    factor = (scale.float() * double)[..., None]
    codes = (groups.abs() / factor.clamp_min(1e-12)).unsqueeze(-1).sub(torch.tensor(FP4)).abs().argmin(-1)
    codes = (codes + 8 * (groups < 0)).flatten(1)
    expected = (torch.tensor(FP4 + tuple(-x for x in FP4))[codes].unflatten(1, (-1, 16)) * factor).flatten(1)
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": double,
        "input_scale": torch.tensor(0.1),
    }, expected


def modelopt_fp8(w: Tensor) -> tuple[Parts, Tensor]:
    parts, expected = fp8_tensor(w)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"], "k_scale": torch.ones(())}, expected


def torchao(w: Tensor) -> tuple[Parts, Tensor]:
    """int8, a scale for each row, rounded to bfloat16 at the end."""
    scale = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scale).round().to(torch.int8)
    return {"_weight_qdata": codes, "_weight_scale": scale}, (codes.float() * scale).bfloat16().float()


def torchao_metadata(names: Sequence[str]) -> dict[str, str]:
    """What it says of each tensor in the files' metadata."""
    held = {"act_quant_kwargs": None, "block_size": [1, 1], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    int8 = {"_type": "Int8Tensor", "_data": held, "_tensor_data_names": ["qdata", "scale"]}
    told = {name: json.dumps(int8 if LINEAR.search(name) else {"_type": "Tensor"}) for name in names}
    return {**told, "tensor_names": json.dumps(list(names)), "format": "pt"}


def compressed(name: str, **weights: Any) -> tuple[dict[str, Any], Quantise]:
    """What llm-compressor writes, by the package itself."""
    scheme = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "format": name}
    entries = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": scheme}}
    entries |= {"quantization_status": "compressed", "ignore": ["lm_head"]}

    def quantise(w: Tensor) -> tuple[Parts, Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        made, by = QuantizationScheme.model_validate(scheme), BaseCompressor.get_value_from_registry(name)
        most = {"float": 448 if weights["num_bits"] == 8 else 6, "int": 2 ** (weights["num_bits"] - 1) - 1}
        size = {"group": weights.get("group_size"), "tensor_group": weights.get("group_size")}
        columns = size.get(weights["strategy"]) or w.shape[1]
        scale = w.unflatten(1, (-1, columns)).abs().amax(-1) / most[weights["type"]]
        if name.startswith("mx"):
            # A power of two.
            scale = torch.exp2(scale.log2().ceil())
        state = {"weight": w.bfloat16(), "weight_scale": scale.bfloat16()}
        if weights["strategy"] == "tensor_group":
            state["weight_global_scale"] = (448 * 6 / w.abs().max()).reshape(1).float()
            state["weight_scale"] = (scale * state["weight_global_scale"]).float()
        if not weights.get("symmetric", True):
            state["weight_zero_point"] = torch.full_like(scale, 1, dtype=torch.int8)
        parts = by.compress(state, made)
        parts = {key: t.contiguous() for key, t in parts.items() if isinstance(t, Tensor)}
        return parts, by.decompress(dict(parts), made)["weight"].float()

    return entries, quantise


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "group_size": GROUP, "sym": False}
BNB = {"quant_method": "bitsandbytes"}
FORMATS: dict[str, tuple[dict[str, Any], Quantise]] = {
    "fp8, blocks": ({**FP8, "weight_block_size": [32, 16]}, fp8_blocks),
    "fp8, one scale": ({**FP8, "activation_scheme": "static"}, fp8_tensor),
    "fp8, FBGEMM": ({"quant_method": "fbgemm_fp8"}, fp8_rows),
    "GPTQ, 4 bits": ({**GPTQ, "bits": 4, "desc_act": True}, gptq(4, ordered=False)),
    "GPTQ, 3 bits": ({**GPTQ, "bits": 3}, gptq(3)),
    "GPTQ, 8 bits, v2": ({**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, gptq(8, older=False)),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "bitsandbytes, nf4": ({**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4),
    "bitsandbytes, int8": ({**BNB, "load_in_8bit": True}, int8),
    "ModelOpt, fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, modelopt_fp8),
    "ModelOpt, NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, nvfp4),
    "torchao, int8": ({"quant_method": "torchao", "quant_type": {"default": {}}}, torchao),
    "compressed-tensors, fp8": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed-tensors, int8": compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "compressed-tensors, int4": compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    "compressed-tensors, int4 with zeros": compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    ),
    "compressed-tensors, MXFP4": compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32
    ),
    "compressed-tensors, MXFP8": compressed(
        "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32
    ),
    "compressed-tensors, NVFP4": compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    ),
}


def quantised(source: Path, out: Path, name: str) -> dict[str, Tensor]:
    """A folder in a format of ``FORMATS``, made of another; returns the model's tensors as they are then."""
    entries, quantise = FORMATS[name]
    shutil.copytree(source, out)
    stored, expected = {}, {}
    for tensor, value in load_file(source / "model.safetensors").items():
        if LINEAR.search(tensor):
            parts, expected[tensor] = quantise(value.float())
            module = tensor.removesuffix(".weight")
            stored |= {f"{module}.{last}": part.contiguous() for last, part in parts.items()}
        else:
            stored[tensor] = expected[tensor] = value
    metadata = torchao_metadata(list(expected)) if entries["quant_method"] == "torchao" else {"format": "pt"}
    save_file(stored, out / "model.safetensors", metadata=metadata)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": entries}))
    return expected


def dequantised(source: Path, out: Path, tensors: dict[str, Tensor]) -> None:
    """A folder with these tensors, the rest as in another."""
    shutil.copytree(source, out)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"}
    )
