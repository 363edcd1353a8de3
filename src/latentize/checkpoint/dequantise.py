"""What quantised weights stand for, format by format.

Each function takes the tensors of one weight, by the last part of their names, and returns the matrix that the library
that made them computes with, in the precision that it does.

o rows of a weight (outputs), i columns (inputs), g groups of inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "gptq", "unpacked"]

# Where AWQ puts every value of a word of eight (``awq/utils/packing_utils.py``).
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# 1 / 127, as bitsandbytes has it.
_BYTE = 7.874015718698502e-3


def fp8(weight_oi: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """``[o, i]`` float32: DeepSeek-V3 (arXiv 2412.19437, section 3.3), as transformers' ``Fp8Dequantize``.

    Args:
        weight_oi: ``float8_e4m3fn`` or ``e5m2``.
        scale: One for all, for each row ``[o, 1]`` or ``[o]``, or for each block ``[o / b, i / c]``, the last ones
            of which may be smaller; bytes are exponents of two, 127 more than they are.
        block: ``(b, c)``; from the number of scales by default.
    """
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    (rows, columns), values_oi = weight_oi.shape, weight_oi.float()
    if scale.numel() == 1:
        return values_oi * scale.reshape(())
    if scale.ndim == 1:
        return values_oi * scale[:, None]
    sizes = [-(-size // count) for size, count in zip((rows, columns), scale.shape, strict=True)]
    for axis, size in enumerate(sizes if block is None or 1 in scale.shape else block):
        scale = scale.repeat_interleave(size, dim=axis)
    return values_oi * scale[:rows, :columns]


def unpacked(words_nm: Tensor, bits: int) -> Tensor:
    """Integers of so many bits that lie one after the other in words of 32, lowest bits first, ``[n, 32 m / bits]``
    int32."""
    words_nm = words_nm.long() & 0xFFFFFFFF
    at = torch.arange(32 * words_nm.shape[1] // bits, device=words_nm.device) * bits
    word, shift = at // 32, at % 32
    # What goes on in the next word; of the last one nothing does.
    next_nm = torch.nn.functional.pad(words_nm, (0, 1))[:, word + 1]
    values = (words_nm[:, word] | next_nm << 32) >> shift
    return (values & (1 << bits) - 1).int()


def gptq(parts: Mapping[str, Tensor], bits: int, group_size: int, *, shifted: bool) -> Tensor:
    """``[o, i]`` in the precision of the scales: GPTQ (arXiv 2210.17323), as AutoGPTQ and GPTQModel store it.

    Args:
        parts: ``qweight [i · bits / 32, o]``, ``qzeros [g, o · bits / 32]``, ``scales [g, o]`` and maybe ``g_idx [i]``.
        bits: Of a value.
        group_size: Inputs of a group, where there is no ``g_idx``; -1 is all.
        shifted: Whether zero points are one less than they are.
    """
    scale_go = parts["scales"]
    weight_io = unpacked(parts["qweight"].T, bits).T
    zero_go = unpacked(parts["qzeros"], bits)[:, : scale_go.shape[1]] + int(shifted)
    inputs = len(weight_io)
    size = inputs if group_size < 1 else group_size
    group_i = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // size
    return (scale_go[group_i] * (weight_io - zero_go[group_i])).T


def awq(parts: Mapping[str, Tensor], bits: int, group_size: int) -> Tensor:
    """``[o, i]`` in the precision of the scales: AWQ (arXiv 2306.00978), as AutoAWQ's ``gemm`` version stores it.

    Args:
        parts: ``qweight [i, o · bits / 32]``, ``qzeros [g, o · bits / 32]`` and ``scales [g, o]``.
        bits: Of a value.
        group_size: Inputs of a group; -1 is all.
    """

    def integers(words: Tensor) -> Tensor:
        return unpacked(words, bits).unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1)

    weight_io, zero_go = integers(parts["qweight"]), integers(parts["qzeros"])
    size = len(weight_io) if group_size < 1 else group_size
    scale_io, zero_io = (t.repeat_interleave(size, dim=0) for t in (parts["scales"], zero_go))
    return ((weight_io - zero_io) * scale_io).T


def bitsandbytes_4bit(parts: Mapping[str, Tensor]) -> Tensor:
    """``[o, i]`` in the precision that was quantised: QLoRA's NF4 and FP4 (arXiv 2305.14314), as bitsandbytes stores
    it.

    Args:
        parts: ``weight`` (two values a byte, the first in the high bits), ``absmax``, ``quant_map``, ``quant_state``
            (JSON), and where ``absmax`` is quantised, too, ``nested_absmax`` and ``nested_quant_map``.
    """
    state: dict[str, Any] = json.loads(bytes(parts["quant_state"].tolist()))
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        nested = _by_blocks(parts["nested_quant_map"][absmax.long()], parts["nested_absmax"], state["nested_blocksize"])
        absmax = nested + state["nested_offset"]
    byte = parts["weight"].reshape(-1).view(torch.uint8).long()
    shape = state["shape"]
    count = 1
    for size in shape:
        count *= size
    values = parts["quant_map"].float()[torch.stack([byte >> 4, byte & 15], dim=1).flatten()[:count]]
    return _by_blocks(values, absmax.float(), state["blocksize"]).view(shape).to(getattr(torch, state["dtype"]))


def _by_blocks(values_n: Tensor, factors: Tensor, size: int) -> Tensor:
    """Each value times the factor of its block; the last block may be smaller."""
    return values_n * factors.float().repeat_interleave(size)[: len(values_n)]


def bitsandbytes_8bit(weight_oi: Tensor, largest_o: Tensor) -> Tensor:
    """``[o, i]`` float32: LLM.int8() (arXiv 2208.07339, equation 4), as bitsandbytes stores it.

    Args:
        weight_oi: int8.
        largest_o: The largest value of each row, ``SCB``.
    """
    return weight_oi * largest_o.view(-1, 1) * _BYTE
