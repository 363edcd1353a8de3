"""Which layers of a model rotate, and which are of another kind and stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentize.errors import ConfigError, UnsupportedModelError
from latentize.families.model import CHUNKED, FULL, SLIDING
from latentize.families.table import Table
from latentize.families.values import whole_number

__all__ = ["layer_kinds", "unrotated_layers"]


def unrotated_layers(table: Table, config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Layers without RoPE, where others have it.

    Raises:
        ConfigError: the list has not an entry for each layer.
    """
    rule = table.attention.get("unrotated")
    if rule is None:
        return frozenset()
    if rule == "all":
        return frozenset(range(layers))
    if "with" in rule:
        return frozenset(range(layers) if config.get(rule["with"]) is not None else ())
    listed, interval = config.get(rule["list"]), config.get(rule["every"])
    if listed is None:
        listed = [(layer + 1) % interval if interval else 1 for layer in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers:
        raise ConfigError(f"'{rule['list']}' should say 1 or 0 for each of {layers} layers", where="config.json")
    return frozenset(layer for layer, rotated in enumerate(listed) if not rotated)


def layer_kinds(
    table: Table,
    config: Mapping[str, Any],
    stated: Mapping[str, Any],
    layers: int,
    window: int | None,
    unrotated: frozenset[int],
) -> tuple[str, ...]:
    """What each layer is, as the config says, or as transformers assumes where it does not.

    Raises:
        ConfigError: the list has not an entry for each layer.
        UnsupportedModelError: a kind that is not known to stay right untouched, or none that could be converted.
    """
    if "layer_types" in stated and "layer_types" not in config and stated["layer_types"] is not None:
        config = {**config, "layer_types": stated["layer_types"]}
    listed = config.get("layer_types")
    if listed is not None and (not isinstance(listed, list) or len(listed) != layers):
        raise ConfigError(f"'layer_types' should have one entry for each of {layers} layers", where="config.json")
    kinds = [str(kind) for kind in listed] if listed else [FULL] * layers
    rules, narrow = dict(table.layer_kinds), CHUNKED if table.attention.get("chunk") else SLIDING
    if window is not None:
        rules.setdefault(narrow, "all")
    else:
        rules.pop(SLIDING, None)
    for kind, rule in rules.items() if not listed else ():
        for layer in range(layers):
            if _is_of_kind(rule, config, layer, unrotated):
                kinds[layer] = kind
    if table.attention.get("ends_full"):
        kinds[-1] = FULL
    _require_kinds(table, kinds, window, unrotated, narrow)
    return tuple(kinds)


def _require_kinds(
    table: Table, kinds: Sequence[str], window: int | None, unrotated: frozenset[int], narrow: str
) -> None:
    """That some layers can be converted, and the others stay right untouched."""
    for kind in kinds:
        if kind not in (FULL, narrow if window is not None else FULL) and kind not in table.kept_tensors:
            raise UnsupportedModelError(
                f"'{table.model_type}' with layers of '{kind}' cannot be converted",
                code="LZ205",
                where="config.json, layer_types",
            )
    if narrow == CHUNKED and any(kind == FULL and layer not in unrotated for layer, kind in enumerate(kinds)):
        raise UnsupportedModelError(
            f"'{table.model_type}' with RoPE in layers of full attention cannot be converted",
            code="LZ205",
            where="config.json, layer_types and no_rope_layers",
        )
    if FULL not in kinds:
        seen = f"an active sliding window of {window} tokens in every layer" if window else "no layer of full attention"
        raise UnsupportedModelError(
            f"'{table.model_type}' with {seen} cannot be converted",
            code="LZ205",
            where=f"config.json, {table.attention.get('sliding_window') or 'layer_types'}",
            fix="if the window was never meant to be active, set it to null",
        )


def _is_of_kind(rule: Any, config: Mapping[str, Any], layer: int, unrotated: frozenset[int]) -> bool:
    if rule in ("unrotated", "rotated"):
        return (layer in unrotated) == (rule == "unrotated")
    if rule == "all":
        return True
    if "from" in rule:
        return layer >= whole_number(config, rule["from"])
    every = rule["except_every"]
    return (layer + 1) % (whole_number(config, every) if isinstance(every, str) else every) != 0
