"""What quantised weights stand for, format by format.

Each function takes the tensors of one weight, by the last part of their names, and returns the matrix that the library
that made them computes with, rounded as there, in float32.

o rows of a weight (outputs), i columns (inputs), g groups of inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "gptq", "mxfp4", "nvfp4", "torchao", "unpacked"]

# Where AWQ puts every value of a word of eight (``awq/utils/packing_utils.py``).
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# 1 / 127, as bitsandbytes has it.
_BYTE = 7.874015718698502e-3
# Rows and bytes that are worked on at once: integers take several times the room of what they make.
_ROWS, _BYTES = 1024, 1 << 22


def fp8(weight_oi: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """``[o, i]``: DeepSeek-V3 (arXiv 2412.19437, section 3.3), as transformers' ``Fp8Dequantize``.

    Args:
        weight_oi: ``float8_e4m3fn`` or ``e5m2``; of others integers.
        scale: One for all, for each row ``[o, 1]`` or ``[o]``, or for each block ``[o / b, i / c]``, the last ones
            of which may be smaller; bytes are exponents of two, 127 more than they are.
        block: ``(b, c)``; from the number of scales by default.
    """
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    (rows, columns), values_oi = weight_oi.shape, weight_oi.float()
    if scale.numel() == 1:
        return values_oi.mul_(scale.reshape(()))
    if scale.ndim == 1 or scale.shape[1] == 1:
        return values_oi.mul_(scale.view(-1, 1)) if len(scale) == rows else _by_rows(values_oi, scale, block)
    by_column = block[1] if block is not None else -(-columns // scale.shape[1])
    return _by_rows(values_oi, scale.repeat_interleave(by_column, dim=1)[:, :columns], block)


def _by_rows(values_oi: Tensor, scale_ni: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Each row times the scales of its block of rows."""
    size = block[0] if block is not None else -(-len(values_oi) // len(scale_ni))
    for rows_bi, own_i in zip(values_oi.split(size), scale_ni, strict=True):
        rows_bi.mul_(own_i)
    return values_oi


def _fp4(bytes_ob: Tensor) -> Tensor:
    """``[…, 2 b]``: two values a byte, the first in the low half: a sign, two bits of exponent, one of mantissa (OCP
    Microscaling Formats 1.0, section 5.3.3)."""
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    halves_ob2 = torch.stack([bytes_ob & 15, bytes_ob >> 4], dim=-1)
    return torch.cat([sizes, -sizes])[halves_ob2.int()].flatten(-2)


def nvfp4(weight_ob: Tensor, scale_og: Tensor, scale: Tensor | float) -> Tensor:
    """``[…, o, 2 b]``: NVIDIA's four bits, in groups of 16, as its Model Optimizer stores them.

    Args:
        weight_ob: Two values a byte.
        scale_og: Of each group, ``float8_e4m3fn``.
        scale: Of all groups.
    """
    values_ogn = _fp4(weight_ob).unflatten(-1, (scale_og.shape[-1], -1))
    return (values_ogn * (scale_og.float() * scale)[..., None]).flatten(-2)


def mxfp4(blocks_eogb: Tensor, scales_eog: Tensor) -> Tensor:
    """``[e, i, o]``: experts of gpt-oss (OCP Microscaling Formats 1.0, section 5), as transformers has them.

    Args:
        blocks_eogb: Two values a byte.
        scales_eog: Exponents of two, 127 more than they are.
    """
    made = []
    for blocks_ogb, scales_og in zip(blocks_eogb, scales_eog, strict=True):
        made.append(torch.ldexp(_fp4(blocks_ogb), scales_og.int()[..., None] - 127).flatten(-2).T)
    return torch.stack(made)


def unpacked(words_nm: Tensor, bits: int) -> Tensor:
    """Integers of so many bits that lie one after the other in words of 32, lowest bits first, ``[n, 32 m / bits]``
    int32."""
    at = torch.arange(32 * words_nm.shape[1] // bits, device=words_nm.device) * bits
    word, shift = at // 32, at % 32
    made = torch.empty(len(words_nm), len(at), dtype=torch.int32, device=words_nm.device)
    for part_nm, out in zip(words_nm.split(_ROWS), made.split(_ROWS), strict=True):
        wide_nm = part_nm.long() & 0xFFFFFFFF
        # What goes on in the next word; of the last one nothing does.
        next_nm = torch.nn.functional.pad(wide_nm, (0, 1))[:, word + 1]
        out.copy_(((wide_nm[:, word] | next_nm << 32) >> shift) & (1 << bits) - 1)
    return made


def gptq(parts: Mapping[str, Tensor], bits: int, group_size: int, *, shifted: bool) -> Tensor:
    """``[o, i]``, rounded to the precision of the scales: GPTQ (arXiv 2210.17323), as AutoGPTQ and GPTQModel store it.

    Args:
        parts: ``qweight [i · bits / 32, o]``, ``qzeros [g, o · bits / 32]``, ``scales [g, o]`` and maybe ``g_idx [i]``.
        bits: Of a value.
        group_size: Inputs of a group, where there is no ``g_idx``; -1 is all.
        shifted: Whether zero points are one less than they are.
    """
    scale_go = parts["scales"]
    zero_go = unpacked(parts["qzeros"], bits)[:, : scale_go.shape[1]] + int(shifted)
    inputs = len(parts["qweight"]) * 32 // bits
    size = inputs if group_size < 1 else group_size
    group_i = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // size
    made_oi = torch.empty(scale_go.shape[1], inputs)
    # Output by output: what they are made of is several times as large.
    for start in range(0, len(made_oi), _ROWS):
        own = slice(start, start + _ROWS)
        weight_oi = unpacked(parts["qweight"][:, own].T, bits)
        made_oi[own] = scale_go[:, own].T[:, group_i] * (weight_oi - zero_go[:, own].T[:, group_i])
    return made_oi


def awq(parts: Mapping[str, Tensor], bits: int, group_size: int) -> Tensor:
    """``[o, i]``, rounded to the precision of the scales: AWQ (arXiv 2306.00978), as AutoAWQ's ``gemm`` version stores
    it.

    Args:
        parts: ``qweight [i, o · bits / 32]``, ``qzeros [g, o · bits / 32]`` and ``scales [g, o]``.
        bits: Of a value.
        group_size: Inputs of a group; -1 is all.
    """

    def integers(words: Tensor) -> Tensor:
        return unpacked(words, bits).unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1)

    words_im, scale_go, zero_go = parts["qweight"], parts["scales"], integers(parts["qzeros"])
    size = len(words_im) if group_size < 1 else group_size
    made_oi = torch.empty(scale_go.shape[1], len(words_im))
    for group, (scale_o, zero_o) in enumerate(zip(scale_go, zero_go, strict=True)):
        own = slice(group * size, (group + 1) * size)
        made_oi[:, own] = ((integers(words_im[own]) - zero_o) * scale_o).T
    return made_oi


def bitsandbytes_4bit(parts: Mapping[str, Tensor]) -> Tensor:
    """``[o, i]``, rounded to the precision that was quantised: QLoRA's NF4 and FP4 (arXiv 2305.14314), as bitsandbytes
    stores it.

    Args:
        parts: ``weight`` (two values a byte, the first in the high bits), ``absmax``, ``quant_map``, ``quant_state``
            (JSON), and where ``absmax`` is quantised, too, ``nested_absmax`` and ``nested_quant_map``.
    """
    state: dict[str, Any] = json.loads(bytes(parts["quant_state"].tolist()))
    absmax, shape, size = parts["absmax"], state["shape"], state["blocksize"]
    if "nested_absmax" in parts:
        nested = parts["nested_quant_map"][absmax.long()]
        _by_blocks(nested, parts["nested_absmax"], state["nested_blocksize"])
        absmax = nested + state["nested_offset"]
    byte_m, table = parts["weight"].reshape(-1).view(torch.uint8), parts["quant_map"].float()
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
    made_n = torch.empty(len(byte_m), 2)
    for part_m, out in zip(byte_m.split(_BYTES), made_n.split(_BYTES), strict=True):
        out.copy_(pairs.index_select(0, part_m.int()))
    values_n = made_n.view(-1)[: math.prod(shape)]
    _by_blocks(values_n, absmax, size)
    return values_n.to(getattr(torch, state["dtype"])).float().view(shape)


def _by_blocks(values_n: Tensor, factors: Tensor, size: int) -> None:
    """Multiply each value by the factor of its block; the last block may be smaller."""
    whole = len(values_n) // size
    values_n[: whole * size].view(whole, size).mul_(factors[:whole].float()[:, None])
    if whole * size < len(values_n):
        values_n[whole * size :].mul_(factors[whole].float())


def bitsandbytes_8bit(weight_oi: Tensor, largest_o: Tensor) -> Tensor:
    """``[o, i]``: LLM.int8() (arXiv 2208.07339, equation 4), as bitsandbytes stores it.

    Args:
        weight_oi: int8.
        largest_o: The largest value of each row, ``SCB``.
    """
    return weight_oi * largest_o.view(-1, 1) * _BYTE


def torchao(parts: Mapping[str, Tensor], told: Mapping[str, Any], *, packed: bool) -> Tensor:
    """``[o, i]``, rounded to the precision that was quantised: a tensor of torchao, as version 0.18 dequantises it.

    Args:
        parts: ``qdata``, ``scale`` and, by kind, ``zero_point``, ``per_tensor_scale`` and ``act_pre_scale``.
        told: What its class holds beside tensors.
        packed: Whether two values are a byte.
    """
    values, scale = parts["qdata"], parts["scale"]
    precision = getattr(torch, (told.get("dtype") or told["orig_dtype"])["_data"])
    if told.get("is_swizzled_scales"):
        scale = _rows_of_tiles(scale, len(values), values.shape[1] * (2 if packed else 1) // told["block_size"])
    if packed:
        scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale
        made = nvfp4(values, scale, parts.get("per_tensor_scale", 1.0))
    elif values.is_floating_point():
        made = fp8(values, scale, None)
    else:
        groups = values.to(precision).unflatten(1, (scale.shape[1], -1))
        if "zero_point" in parts:
            groups = groups - parts["zero_point"].to(precision)[..., None]
        made = (groups * scale[..., None]).flatten(1)
    made = made.to(precision).float()
    return made * parts["act_pre_scale"].float() if "act_pre_scale" in parts else made


def _rows_of_tiles(scale: Tensor, rows: int, columns: int) -> Tensor:
    """``[rows, columns]`` of scales that lie in tiles of 128 rows and 4 columns, as tensor cores read them (cuBLAS,
    layout of block scaling factors)."""
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = scale.reshape(down, across, 32, 4, 4).transpose(2, 3)
    return tiles.permute(0, 2, 3, 1, 4).reshape(128 * down, 4 * across)[:rows, :columns]
