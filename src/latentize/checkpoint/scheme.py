"""A way to quantise weights, as far as reading them asks: which tensors make a weight, its shape, what restores it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, ClassVar

from latentize.checkpoint.base import DEQUANTISE
from latentize.errors import CheckpointError, ConfigError

__all__ = ["Scheme", "Shapes"]

Shapes = Mapping[str, tuple[int, ...]]


class Scheme(ABC):
    """A way to quantise weights.

    Args:
        entries: Of ``quantization_config``.
        where: They stand, for messages.
        metadata: Of the files that hold the weights.

    Attributes:
        marks: Last parts of names that only quantised weights have.
        parts: Further ones that belong to them.
        stays: Whether transformers loads such weights of any model on any machine, so that an output may have them.
    """

    marks: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]] = ()
    stays: ClassVar[bool] = False

    def __init__(self, entries: Mapping[str, Any], where: str, metadata: Mapping[str, Any]) -> None:
        self.entries, self.where, self.metadata = entries, where, metadata

    def split(self, name: str) -> tuple[str, str] | None:
        """Which weight a stored tensor may be a part of, and which part; ``None`` for what is none."""
        lasts = {"weight", *self.marks, *self.parts}
        found = [last for last in lasts if name.endswith("." + last)]
        if not found:
            return None
        part = max(found, key=len)
        return name.removesuffix(part) + "weight", part

    @abstractmethod
    def kind(self) -> str:
        """What weights were quantised to, for people."""

    @abstractmethod
    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        """Of a weight, of the shapes of its parts; ``load`` gives a part."""

    @abstractmethod
    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
        """A weight, of its parts."""

    def by(self) -> str:
        """What dequantises."""
        return f"latentize {version('latentize')}"

    def entry(self, name: str, default: int) -> int:
        """A whole number.

        Raises:
            ConfigError: it is none.
        """
        value = self.entries.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"'{name}' should be a whole number, is {value!r}", where=self.where)
        return value

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"the weights are quantised ({what})", code="LZ204", where=self.where, fix=DEQUANTISE)
