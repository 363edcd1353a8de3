"""``import latentize`` makes the native format loadable by transformers, yet imports neither it nor torch.

transformers has no entry point for model types, so this module waits for its Auto classes to be imported and
registers right after. If they already are, it registers at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]

_AWAITED = "transformers.models.auto.modeling_auto"


_NATIVE = ("latentize.modeling.native", "latentize.modeling.whole")


def _register() -> None:
    # Each registers itself. The first, if it is what imports transformers just now, is about to, and imports the other.
    if _NATIVE[0] not in sys.modules:
        for name in _NATIVE:
            importlib.import_module(name)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module by asking the other finders, and registers once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        self._inner = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register()


def install() -> None:
    """Register now or later, once."""
    if _AWAITED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
