"""Packages that share their name with the function they are for: ``latentize.convert`` is both."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["call_as"]


def call_as(module_name: str, home: str, function: str) -> None:
    """Let the module be called, meaning ``home.function``; the function is imported at the first call.

    Importing a subpackage binds its name in the parent, which would hide a function of that name.
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(home), function)(*args, **kwargs)

    sys.modules[module_name].__class__ = CallableModule
