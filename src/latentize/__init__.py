"""Turn the attention of an existing transformer into multi-head latent attention (MLA).

    latentize.convert("path/to/model", "out", keep="25%")
    latentize.evaluate("out", "path/to/model")

Importing this makes the native format known to transformers; torch is imported when something needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentize.modeling.registration import install as _install

if TYPE_CHECKING:
    from latentize.api import convert, evaluate, export, heal, verify
    from latentize.families import register_family
    from latentize.recipe import Recipe
    from latentize.runtime.accelerate import accelerate, decelerate, is_accelerated
    from latentize.runtime.cache import LatentCache

__version__ = "0.1.0"
__all__ = [
    "LatentCache",
    "Recipe",
    "__version__",
    "accelerate",
    "convert",
    "decelerate",
    "evaluate",
    "export",
    "heal",
    "is_accelerated",
    "register_family",
    "verify",
]

_HOMES = {
    "LatentCache": "latentize.runtime.cache",
    "accelerate": "latentize.runtime.accelerate",
    "decelerate": "latentize.runtime.accelerate",
    "is_accelerated": "latentize.runtime.accelerate",
    "convert": "latentize.api",
    "evaluate": "latentize.api",
    "export": "latentize.api",
    "heal": "latentize.api",
    "register_family": "latentize.families",
    "verify": "latentize.api",
    "Recipe": "latentize.recipe",
}

_install()


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'latentize' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
