"""How the tensors of a GGUF file are stored, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentize.checkpoint import Checkpoint
from latentize.errors import FormatError, OptionError
from latentize.formats.half import FP16_ROUNDING, lost_in_fp16

__all__ = ["BLOCK", "TYPES", "GgufTensor", "check_range", "ggml_type", "gguf_module", "rounded", "stored"]

# --type → (GGML's type of matrices, GGUF's file type).
TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "q8_0": ("Q8_0", 7), "bf16": ("BF16", 32)}
BLOCK = 32  # values of a Q8_0 block, which share one step in fp16
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# By how much the error of a block may grow because fp16 holds its step badly.
_STEP_ROUNDING = 1.1


def gguf_module() -> Any:
    """The ``gguf`` package.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise OptionError(
            "the gguf package is not installed", where="--to gguf", fix="pip install 'latentize[gguf]'"
        ) from None
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: In the file.
        source: Its tensor in the folder, or the first of those that it is made of.
        shape: As numpy has it; GGUF counts dimensions from the other end.
        of: The tensor, from the one in the folder.
        stacked: All of them, where there are several: experts.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    of: Callable[[Tensor], Tensor]
    stacked: tuple[str, ...] = ()

    def load(self, checkpoint: Checkpoint) -> Tensor:
        """As it will be stored, but for its type."""
        if not self.stacked:
            return self.of(checkpoint.load(self.source))
        # Room for all of them once.
        found = None
        for number, name in enumerate(self.stacked):
            tensor = self.of(checkpoint.load(name))
            found = tensor.new_empty(self.shape) if found is None else found
            found[number] = tensor
        assert found is not None
        return found


def ggml_type(tensor: GgufTensor, kind: str) -> str:
    """GGML's type of a tensor in a file of some ``--type``.

    Norms are F32. Rows that blocks do not divide are F16, as in llama.cpp's converter. The down-projection carries the
    factor that makes the latent's norm linear: in fp16 its weights, or the steps of its Q8_0 blocks, would be
    subnormal, and llama.cpp would round what it is multiplied with to fp16 as well. It is small, and stays in F32.
    """
    wanted = TYPES[kind][0]
    # llama.cpp's converter leaves routers as they are, too.
    if len(tensor.shape) == 1 or tensor.name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if tensor.name.endswith("attn_kv_a_mqa.weight") and wanted in ("F16", "Q8_0"):
        return "F32"
    return "F16" if wanted == "Q8_0" and tensor.shape[-1] % BLOCK else wanted


def rounded(t: Tensor, of: str) -> Tensor:
    """``t`` in float32, as it is read back from a file where its type is ``of``."""
    if of == "Q8_0":
        gguf = gguf_module()
        q8 = gguf.GGMLQuantizationType.Q8_0
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(t.float().numpy(), q8), q8))
    return t.to(_DTYPES[of]).float()


def stored(t: Tensor, of: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor, as GGUF's writer wants them."""
    if of == "Q8_0":
        gguf = gguf_module()
        return gguf.quants.quantize(t.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    if of == "BF16":
        return t.bfloat16().contiguous().view(torch.uint8).numpy()
    return t.to(_DTYPES[of]).contiguous().numpy()


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def _lost_to_steps(t: Tensor) -> tuple[float, float]:
    """Root mean square error of Q8_0, and what it would be if the steps of its blocks were exact."""
    blocks = t.float().unflatten(-1, (-1, BLOCK))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    exact = (blocks / step).round() * step
    return _rms(rounded(t, "Q8_0") - t.float()), _rms(exact - blocks)


def check_range(t: Tensor, tensor: GgufTensor, of: str, kind: str) -> int:
    """Refuse a type whose fp16 numbers damage a tensor.

    Some weights of any matrix are subnormal in fp16, or zero; what counts is whether the matrix consists of them. One
    of normal numbers loses at most 2⁻¹¹ of its root mean square, whatever the numbers are.

    Returns:
        How many weights fp16 holds as subnormal or loses, if it is fp16 that they are stored in.

    Raises:
        FormatError: the tensor loses more than that; or the steps of Q8_0 blocks make its error a tenth larger.
    """
    if of not in ("F16", "Q8_0"):
        return 0
    if of == "F16":
        share = lost_in_fp16(t)
        bad = not share <= FP16_ROUNDING  # an infinite loss, too
    else:
        lost, unavoidable = _lost_to_steps(t)
        bad, share = not lost <= _STEP_ROUNDING * unavoidable, lost / _rms(t)
    if bad:
        raise FormatError(
            f"the weights are outside of fp16's normal range: {share:.1%} of them would be lost",
            where=f"--type {kind}, tensor {tensor.source}",
            fix="export as bf16 or f32",
        )
    small = (t != 0) & (t.float().abs() < torch.finfo(torch.float16).tiny)
    return int(small.sum()) if of == "F16" else 0
