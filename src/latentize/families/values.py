"""Values of ``config.json``, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from latentize.errors import ConfigError

__all__ = ["positive_number", "value_of", "whole_number"]


def value_of(key: Any, config: Mapping[str, Any]) -> Any:
    """Of an entry by its name; what is no name stands for itself."""
    return config.get(key) if isinstance(key, str) else key


def whole_number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Of an entry.

    Raises:
        ConfigError: it is none, or not positive.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"'{key}' should be a positive whole number, is {value!r}", where="config.json")
    return value


def positive_number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Of an entry.

    Raises:
        ConfigError: it is none, or not positive.
    """
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"'{key}' should be a positive number, is {value!r}", where=f"config.json, {key}")
    return float(value)
