"""What the rest of latentize knows of a checkpoint: a config, and tensors by name, read one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from latentize.errors import CheckpointError

__all__ = ["DEQUANTISE", "Checkpoint", "filled", "is_finite", "opened"]

_CHECKED_AT_ONCE = 1 << 22
DEQUANTISE = "convert from an unquantised checkpoint (bf16, fp16 or fp32)"
SAVE_AGAIN = "load the model with transformers, and save it with save_pretrained"
# How the last parts of names tell what quantised the weights. Scales of one value come with several.
_QUANTISED = {
    "GPTQ or AWQ": ("qweight", "qzeros", "g_idx"),
    "bitsandbytes": ("SCB", "weight_format", "absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    "compressed-tensors": ("weight_packed", "weight_shape", "weight_zero_point", "weight_global_scale"),
    "fp8": ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale", "k_scale", "v_scale"),
    "HQQ": ("W_q",),
    "quanto": ("_data", "_scale", "_shift", "_packed"),
    "ModelOpt": ("weight_scale_2", "pre_quant_scale"),
    "torchao": ("_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_scale_and_zero"),
    "AQLM": ("codes", "codebooks"),
    "EETQ": ("weight_scales",),
}
_QUANTISED_BY = {ending: kind for kind, endings in _QUANTISED.items() for ending in endings}


def is_finite(tensor: Any) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""

    def fine(part: Any) -> bool:
        # A sum is finite only if all terms are; the exact test is for sums that overflow.
        return math.isfinite(float(part.float().sum())) or bool(part.isfinite().all())

    # In parts: a sum in float32 makes a float32 copy of what it sums.
    return all(fine(part) for part in tensor.reshape(-1).split(_CHECKED_AT_ONCE))


def opened(path: Path) -> BufferedReader:
    """A file of weights that was there when the checkpoint was opened.

    Raises:
        CheckpointError: it is no longer there.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"the file can no longer be read: {error.strerror}", code="LZ103", where=str(path), fix="put it back"
        ) from error


def filled(path: Path, count: int, wanted: int) -> None:
    """Raise unless as many bytes were read as the header promised."""
    if count != wanted:
        raise CheckpointError(
            "the file has become shorter", code="LZ103", where=str(path), fix="download the file again"
        )


class Checkpoint(ABC):
    """A model on disk. Tensors have the names and shapes that transformers saves them with.

    Attributes:
        path: The folder, or the GGUF file; what :func:`latentize.checkpoint.opening.pretrained` takes.
        config: The entries of ``config.json``.
        config_path: The file that they come from.
        quantization: What the weights were quantised to, where they are read dequantised; else ``None``.
        left_out: What of a larger model is not read, in words; else empty.
        whole: The entries of that larger model's ``config.json``, where :meth:`carried` has the rest of it.
    """

    path: Path
    config: dict[str, Any]
    config_path: Path
    quantization: dict[str, Any] | None = None
    left_out: str = ""
    whole: Mapping[str, Any] | None = None

    @property
    def notes(self) -> list[str]:
        """What a report has to say of what is read, in words."""
        said = self.left_out, self.quantization_note if self.quantization is not None else ""
        return [note for note in said if note]

    @property
    def quantization_note(self) -> str:
        """What that means for numbers that are measured, in words."""
        assert self.quantization is not None
        kind = self.quantization["file_type"]
        return f"the source is a GGUF file, mostly {kind}: losses are counted from its dequantised weights"

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Weight files, in order."""

    @abstractmethod
    def names(self) -> Iterator[str]:
        """Of all tensors, in the order of the files."""

    @abstractmethod
    def __contains__(self, name: str) -> bool: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> str:
        """Precision that a tensor is read in, by PyTorch's name."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a tensor, as it is read."""

    @abstractmethod
    def where(self, name: str) -> str:
        """File and tensor, for a message."""

    def rename(self, names: Mapping[str, str | None]) -> None:
        """Call tensors what transformers calls them. Those of a GGUF file are called so already.

        Args:
            names: What it is for every tensor that is stored under another name, or ``None`` for one that the model
                has no use for.
        """
        assert not names

    def stored_as(self, name: str) -> str:
        """What the files call a tensor."""
        return name

    def ahead(self, names: Iterable[str]) -> None:  # noqa: B027 (of most there is nothing to do)
        """Told which tensors will be asked for next; of files on a disk nothing is gained by it."""

    def carried(self) -> Iterator[tuple[str, Any]]:
        """Tensors of a larger model that are no part of this one, as they are stored; their names begin with
        ``towers.CARRIED``."""
        yield from ()

    def packed(self, name: str) -> dict[str, Any]:
        """A quantised weight as it is stored, by the names of its parts, where an output may hold it so; else nothing.

        Args:
            name: Of the weight.
        """
        return {}

    def check_stored(self, expected: Iterable[str] = ()) -> None:
        """Refuse weights that are quantised, or in a precision that is not read.

        Args:
            expected: Names that are no sign of it.

        Raises:
            CheckpointError: they are.
        """
        known = set(expected)
        for name in self.names():
            last = name.rpartition(".")[2]
            kind = _QUANTISED_BY.get(last) or ("bitsandbytes" if last.startswith("bitsandbytes__") else "")
            if kind and name not in known:
                raise CheckpointError(
                    f"the weights are quantised ({kind})", code="LZ204", where=self.where(name), fix=DEQUANTISE
                )
            self.dtype(name)

    @abstractmethod
    def load(self, name: str) -> Any:
        """One tensor.

        Raises:
            CheckpointError: there is no such tensor, or it holds NaN or infinity.
        """

    @abstractmethod
    def load_rows(self, name: str, rows: Sequence[int]) -> Any:
        """Some rows of a matrix, in the order asked for; the others are not read.

        Raises:
            CheckpointError: as :meth:`load`, for these rows.
        """

    def count(self, prefix: str) -> int:
        """Layers, told by the names of their tensors.

        Args:
            prefix: Of a layer's tensors, with ``{layer}`` for its number.
        """
        before, after = prefix.split("{layer}")
        rest = (name.removeprefix(before).split(after, 1)[0] for name in self.names() if name.startswith(before))
        return 1 + max((int(number) for number in rest if number.isdecimal() and len(number) < 9), default=-1)

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]], *, ignore: Iterable[str] = ()) -> None:
        """Compare names and shapes with what the family's table promises.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape.
        """
        skipped = set(ignore)
        for name, shape in expected.items():
            if name not in self:
                odd = (n for n in self.names() if n not in expected and n not in skipped)
                raise self.missing(name, instead=next(odd, ""))
            if self.shape(name) != shape:
                raise CheckpointError(
                    f"the tensor is {list(self.shape(name))}, {self.config_path.name} implies {list(shape)}",
                    code="LZ109",
                    where=self.where(name),
                )
        for name in self.names():
            if name not in expected and name not in skipped:
                raise CheckpointError(
                    "a tensor that the architecture does not have", code="LZ111", where=self.where(name)
                )

    def missing(self, name: str, *, instead: str = "") -> CheckpointError:
        """The error that there is no such tensor.

        Args:
            name: Of the tensor.
            instead: One that should not be there, if there is one: names may be those of another program.
        """
        fix = "are all files of the model there?"
        if instead:
            fix += f" if its tensors are named otherwise ({instead}), {SAVE_AGAIN}"
        return CheckpointError("a tensor is missing", code="LZ111", where=f"{self.path}, tensor {name}", fix=fix)

    def checked(self, name: str, tensor: Any) -> Any:
        """The tensor.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError("the tensor holds NaN or infinity", code="LZ108", where=self.where(name))
        return tensor
