"""Who attends to cached rows in decode: the Triton kernels, or their twin in PyTorch.

``auto`` takes the kernels on CUDA tensors where triton is installed, for whatever they can do (:func:`refusal`) and
have done right once on that device (``kernels.trial``). ``triton`` takes them wherever they run, Triton's interpreter
on a CPU included, and lets their errors through. ``torch`` never does.

B batch, H query heads, T new tokens, S cached rows, r kv_lora_rank, P roped keys, R values of all roped keys.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from latentize.errors import OptionError
from latentize.runtime.codecs import FLOATS
from latentize.runtime.kernels.launch import (
    LARGEST_FLOAT32_RANK,
    LARGEST_RANK,
    LARGEST_ROPE,
    absorbed_decode,
    coded_decode,
)
from latentize.runtime.kernels.storage import KINDS
from latentize.runtime.kernels.trial import works
from latentize.runtime.rows import CachedRows

__all__ = ["NAMES", "TORCH", "Backend", "Name", "refusal"]

Name = Literal["auto", "torch", "triton"]
NAMES: tuple[Name, ...] = get_args(Name)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which is settled when triton is imported."""
    if not _has_triton():
        return False
    from latentize.runtime.kernels import latent_decode

    return type(latent_decode.attend_splits).__name__ == "InterpretedFunction"


@dataclass
class Backend:
    """Of one accelerated model.

    Attributes:
        name: What was asked for.
        used: How many calls went to the kernels (``"triton"``), and how many did not, by reason (``"torch: …"``).
    """

    name: Name
    used: Counter[str] = field(default_factory=Counter)

    @classmethod
    def named(cls, name: str, device: torch.device) -> Backend:
        """The backend of that name, for a model that is there.

        Raises:
            OptionError: an unknown name, or kernels that cannot run there.
        """
        if name not in NAMES:
            raise OptionError(f"no backend '{name}'", where="accelerate", fix=f"there are {', '.join(NAMES)}")
        if name == "triton" and not _has_triton():
            raise OptionError("triton is not installed", where="accelerate", fix="pip install 'latentize[triton]'")
        if name == "triton" and device.type != "cuda" and not _interprets():
            fix = "move the model to a GPU first, or set TRITON_INTERPRET=1 to debug kernels"
            raise OptionError(f"Triton kernels do not run on '{device}'", where="accelerate", fix=fix)
        return cls(name)  # type: ignore[arg-type]

    def attend(
        self,
        q_BHTr: Tensor,
        q_rope_BHTR: Tensor,
        rows: CachedRows,
        scale: float,
        mask_BhTS: Tensor | None,
        *,
        scales_values: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Sums of latents ``[B, H, T, r]`` and log-sum-exps ``[B, H, T]`` by the kernels; ``None`` is the twin's turn.

        Args:
            q_BHTr, q_rope_BHTR: Absorbed queries, in the basis that latents are stored in, and roped ones.
            rows: What they attend to.
            scale: Factor on the logits.
            mask_BhTS: Of all tokens, not of the rows that a window leaves; ``None`` is causal.
            scales_values: Whether factors of rows are on what is summed, too; no kernel knows of that.
        """
        why = self._declines(q_BHTr, q_rope_BHTR, rows, mask_BhTS)
        if why is None and scales_values:
            why = "values have factors"
        made = None
        if why is None:
            parts, lengths_B, options = rows.storage(q_rope_BHTR)
            options |= {"mask_BTS": None if mask_BhTS is None else mask_BhTS[:, 0]}
            call = (q_BHTr, q_rope_BHTR, parts, lengths_B, scale)
            unknown = {half.kind for part in parts for half in (part.latent, part.rope)} - set(KINDS)
            if unknown:
                why = f"rows in {', '.join(sorted(unknown))}"
            elif self.name == "triton" or works(*call[:3], **options):
                decode = coded_decode if "means" in options else absorbed_decode
                made = decode(*call, **options)
            else:
                why = "the kernel failed its trial on this device"
        if not torch.compiler.is_compiling():
            self.used["triton" if why is None else f"torch: {why}"] += 1
        return made

    def _declines(self, q: Tensor, q_rope: Tensor, rows: CachedRows, mask: Tensor | None) -> str | None:
        if self.name == "torch":
            return "asked for"
        if not _has_triton():
            return "triton is not installed"
        if q.device.type != "cuda" and (self.name == "auto" or not _interprets()):
            return f"tensors on '{q.device.type}'"
        return refusal(q, q_rope, rows, mask)


TORCH = Backend("torch")


def refusal(q_BHTr: Tensor, q_rope_BHTR: Tensor, rows: CachedRows, mask_BhTS: Tensor | None) -> str | None:
    """Why the kernels cannot do this, wherever it is; ``None`` if they can."""
    dtype = rows.stored_dtype
    if rows.unread is not None:
        return rows.unread
    if q_BHTr.requires_grad:
        return "gradients are asked for"
    if q_BHTr.dtype not in FLOATS or dtype not in FLOATS:
        return f"queries in {q_BHTr.dtype}, rows in {dtype}"
    largest = LARGEST_FLOAT32_RANK if q_BHTr.dtype == torch.float32 else LARGEST_RANK
    # Roped components in codes are read a few at a time.
    too_wide = q_rope_BHTR.shape[-1] > LARGEST_ROPE and not rows.coded
    if q_BHTr.shape[-1] > largest or too_wide:
        return f"a rank beyond {largest} in {q_BHTr.dtype}, or roped keys beyond {LARGEST_ROPE}"
    if mask_BhTS is None:
        return None
    if mask_BhTS.dtype != torch.bool:
        return "a mask that is added"
    if mask_BhTS.shape[1:] != (1, q_BHTr.shape[2], rows.columns) or mask_BhTS.shape[0] not in (1, len(q_BHTr)):
        return "a mask of another shape, or of its own for each head"
    return None
