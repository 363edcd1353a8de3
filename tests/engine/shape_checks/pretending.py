"""A machine that pretends to be another: modules that are not installed, and what an engine says against a case."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch

Case = dict[str, Any]
Answer = dict[str, Any]
LeftOut = dict[str, dict[str, Any]]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FP8 = torch.float8_e4m3fn
COMPILED = "the conditions are in a compiled kernel"


class LaunchError(Exception):
    """All of an engine's checks are behind us."""


class _Anything(type):
    """The type of names that are not there: they can be called, subscripted and had attributes of."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _named(name))
        return getattr(cls, name)

    def __or__(cls, other: object) -> Any:
        return cls

    def __ror__(cls, other: object) -> Any:
        return cls


class _Nothing(metaclass=_Anything):
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args else self

    def __class_getitem__(cls, _: Any) -> type:
        return cls


def _named(name: str) -> type:
    return _Anything(name, (_Nothing,), {})


class _StandIn(types.ModuleType):
    """A module that is not installed; every name of it is there and does nothing."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _named(name))
        return getattr(self, name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives :class:`_StandIn` for packages that nothing else finds."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == package or name.startswith(f"{package}.") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in(*packages: str) -> None:
    sys.meta_path.append(_StandIns(*packages))


def capability(machine: str) -> tuple[int, int]:
    return divmod(int(machine.removeprefix("sm")), 10)


def refusal(check: Callable[[], Any]) -> str | None:
    """What an engine says against it, in its first line."""
    try:
        said = check()
    except LaunchError:
        return None
    except (AssertionError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return said if isinstance(said, str) else None


def row_of(case: Case) -> int:
    return case["kv_lora_rank"] + case["qk_rope_head_dim"]
