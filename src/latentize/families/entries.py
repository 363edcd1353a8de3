"""``config.json`` as transformers reads it.

A config class of transformers has fields of fixed types, with defaults; entries that are none of its fields it ignores,
but for a few that older versions wrote. Which of two entries wins is decided there, not here: this module says the same
without transformers, so that shapes can be planned where it is not installed. A conversion holds both readings against
each other (:mod:`latentize.modeling.reading`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

from latentize.errors import ConfigError, UnsupportedModelError
from latentize.families.table import Table
from latentize.families.values import positive_number, whole_number

__all__ = ["ACTIVATIONS", "as_read", "as_stated"]

_PYTHON: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float,), "bool": (bool,), "str": (str,)}
# Entries of any family that masks and caches are made from, whether or not the family has them.
_OF_ALL = {"sliding_window": "int|None", "layer_types": "list[str]|None"}
# Activations that transformers knows.
ACTIVATIONS = frozenset(
    """
    gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh hardswish laplace
    leaky_relu linear mish prelu quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh xielu
    """.split()  # noqa: SIM905 (a list is twenty lines)
)
# RoPE that was trained for a shorter context than the config states now.
_STRETCHED = ("llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"


def as_read(table: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the architecture is made from, each what transformers takes it for.

    Args:
        table: The family.
        config: ``config.json``.

    Returns:
        All fields of the family; ``num_key_value_heads`` and ``head_dim`` as numbers, RoPE as ``rope_parameters`` of
        the layers that are converted, with ``rope_type`` and ``rope_theta``.

    Raises:
        ConfigError: an entry of another type than transformers takes.
    """
    if not table.fields:
        read = {**table.config_defaults, **table.implied, **config}
    else:
        # What the table itself names is read: a class may be another's with entries of its own.
        named = [*table.attention.values(), *table.multipliers.values(), table.logit_softcap, table.norm_eps]
        read = {name: config[name] for name in config if name in named}
        read |= {name: default for name, (_, default) in table.fields.items()}
        read |= {name: config.get(name, value) for name, value in table.implied.items()}
        read |= {name: config[name] for name in table.fields if name in config}
        read |= {name: config[other] for other, name in table.aliases.items() if other in config}
        read |= {other: read[name] for other, name in table.aliases.items() if name in read}
        for name, (types, _) in table.fields.items():
            _check(name, read[name], types)
        for name, value in read.items():
            _finite(name, value)
        for name, types in _OF_ALL.items():
            _check(name, config.get(name), types)
        for name in ("hidden_act", "hidden_activation", "activation_function"):
            if name in table.fields and name not in table.without_effect and read[name] not in ACTIVATIONS:
                raise ConfigError(f"no activation is called {read[name]!r}", where=f"config.json, {name}")
    read |= {"model_type": table.model_type, "head_dim": _head_dim(table, config, read)}
    rule = table.attention.get("kv_heads")
    if rule == "all" or (rule != "stated" and read.get("num_key_value_heads") is None):
        read["num_key_value_heads"] = read.get("num_attention_heads")
    elif read["num_key_value_heads"] is None:
        raise ConfigError(
            "'num_key_value_heads' is null, which transformers takes as it stands",
            where="config.json, num_key_value_heads",
        )
    if "global_sizes" in table.attention:
        read |= _global_sizes(table, config, read)
    # What is said of RoPE means nothing where nothing rotates.
    read["rope_parameters"] = {} if table.attention.get("unrotated") == "all" else _rope(table, config, read)
    return read


def as_stated(table: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``, with the defaults that it leaves out; transformers reads both alike."""
    aliased = {name for other, name in table.aliases.items() if other in config}
    fields = {n: default for n, (_, default) in table.fields.items() if default is not None and n not in aliased}
    return {**table.config_defaults, **fields, **table.implied, **config}


def _check(name: str, value: Any, types: str) -> None:
    allowed = types.split("|")
    if not any(_is(value, one) for one in allowed):
        known = " or ".join({"None": "null"}.get(one, one) for one in allowed)
        raise ConfigError(f"'{name}' should be of type {known}, is {value!r}", where=f"config.json, {name}")


def _finite(name: str, value: Any) -> None:
    """JSON has whole numbers of any size, and Python writes infinities into it: nothing can be computed with those."""
    number = isinstance(value, int | float)
    if number and not -sys.float_info.max <= value <= sys.float_info.max:
        raise ConfigError(f"'{name}' is no number to compute with", where=f"config.json, {name}")


def _is(value: Any, kind: str) -> bool:
    if kind == "None":
        return value is None
    if kind.startswith("list["):
        return isinstance(value, list) and all(_is(one, kind[5:-1]) for one in value)
    # Python counts a truth value among the whole numbers.
    return isinstance(value, _PYTHON[kind]) and (kind == "bool" or not isinstance(value, bool))


def _head_dim(table: Table, config: Mapping[str, Any], read: Mapping[str, Any]) -> Any:
    """Size of a head: stated, whether or not it is a field, or the heads' share of the hidden size."""
    rule = table.attention.get("head_dim", "stated")
    stated = config.get("head_dim", table.fields["head_dim"][1] if "head_dim" in table.fields else None)
    if "head_dim" in config and stated is None and rule == "stated":
        raise ConfigError(
            "'head_dim' is null, which transformers takes as it stands",
            where="config.json, head_dim",
            fix="leave it out, or state the size of a head",
        )
    if stated is None and rule == "required":
        raise ConfigError(
            "'head_dim' is missing, without which transformers cannot run this architecture",
            where="config.json, head_dim",
            fix="state the size of a head",
        )
    sizes = [read.get("hidden_size"), read.get("num_attention_heads")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        # Whoever makes use of them says so.
        return None if rule == "derived" else stated
    hidden, heads = cast("list[int]", sizes)
    if table.attention.get("heads_divide") and hidden % heads:
        raise ConfigError(
            f"the hidden size {hidden} is not a multiple of {heads} heads, as it has to be in this architecture",
            code="LZ121",
            where="config.json, num_attention_heads",
        )
    derived = rule == "derived" or stated is None or (rule == "true" and stated == 0)
    found = hidden // heads if derived else stated
    if table.attention.get("heads_fill") and isinstance(found, int | float) and found and found * heads != hidden:
        raise ConfigError(
            f"{heads} heads of {found} are not the hidden size {hidden}, as they are in this architecture",
            code="LZ121",
            where="config.json, head_dim",
        )
    return found


def _global_sizes(table: Table, config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the layers of full attention, and what the others have, as ``kept_…``.

    Published configs state them once, those that transformers saves layer by layer.
    """
    keys, by_layer = table.attention["global_sizes"], config.get("per_layer_config")
    stated = {name: config.get(key, table.implied.get(key)) for name, key in keys.items()}
    own = {name: value for name, value in stated.items() if value is not None}
    if by_layer is not None:
        kinds, own = config.get("layer_types") or (), None
        full = {layer for layer, kind in enumerate(kinds) if kind == "full_attention" or layer == len(kinds) - 1}
        # transformers writes numbers of layers with leading zeros.
        if isinstance(by_layer, Mapping) and {int(n) if str(n).isdecimal() else n for n in by_layer} == full:
            first, *others = by_layer.values()
            own = first if isinstance(first, Mapping) and all(other == first for other in others) else None
        if own is None or not own.keys() <= keys.keys():
            raise UnsupportedModelError(
                f"'{table.model_type}' with other sizes than one for all layers of full attention cannot be converted",
                code="LZ205",
                where="config.json, per_layer_config",
            )
    kept = {f"kept_{name}": whole_number(read, name) for name in keys}
    if kept["kept_head_dim"] % 2 or whole_number(read, "num_attention_heads") % kept["kept_num_key_value_heads"]:
        raise ConfigError(
            f"layers with {kept['kept_num_key_value_heads']} kv heads of {kept['kept_head_dim']} make no sense",
            code="LZ121",
            where="config.json, num_key_value_heads or head_dim",
        )
    return {**kept, **own}


def _rope(table: Table, config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of the layers that are converted.

    ``rope_scaling`` wins over ``rope_parameters``; in either, what is stated inside wins over ``rope_theta`` and
    ``partial_rotary_factor`` beside it.
    """
    scaling, given = config.get("rope_scaling"), config.get("rope_parameters")
    given = table.implied.get("rope_parameters") if given is None else given
    for name, entry in (("rope_scaling", scaling or None), ("rope_parameters", given)):
        if entry is not None and not isinstance(entry, Mapping):
            raise ConfigError(f"'{name}' should be an object, is {entry!r}", where=f"config.json, {name}")
    kind = table.attention.get("rope_of")
    if table.attention.get("rope_by_kind"):
        _require_kinds(config, given)
    entries = _of_kind(kind, scaling, given) if kind else dict(scaling or given or {})
    theta, partial = (table.attention.get(f"rope_{name}_key", usual) for name, usual in _KEYS.items())
    entries.setdefault("rope_theta", config.get(theta, table.implied.get(theta, 10_000.0)))
    share = config.get(partial, table.implied.get(partial))
    stated = table.attention.get("rotary_size_key")
    if share is None and stated is not None and config.get(stated) is not None:
        _check(stated, config[stated], "int|float")
        share = config[stated] / read["head_dim"]
    if share is not None and not kind:
        entries.setdefault("partial_rotary_factor", share)
    if table.attention.get("head_dim") == "derived":
        _stretch(table, entries, config.get("head_dim") or read["head_dim"], read["head_dim"])
    entries.setdefault("rope_type", entries.get("type", "default"))
    entries.pop("type", None)
    _check_rope_type(table, entries["rope_type"])
    entries["rope_type"] = table.attention.get("rope_renamed", {}).get(entries["rope_type"], entries["rope_type"])
    if entries["rope_type"] in _STRETCHED:
        beside, longest = read.get(_ORIGINAL, config.get(_ORIGINAL)), read.get("max_position_embeddings")
        if beside is not None and not kind:
            entries[_ORIGINAL] = beside
        entries.setdefault(_ORIGINAL, longest)
        if entries["rope_type"] == "yarn" and "factor" in entries and entries["factor"] is None:
            entries["factor"] = _times(longest, entries[_ORIGINAL])
        if entries["rope_type"] == "longrope" and entries.get("factor") is None:
            entries["factor"] = _times(longest, entries[_ORIGINAL])
    if table.attention.get("rope_alpha") and entries["rope_type"] == "dynamic" and entries.get("alpha"):
        _widen(entries, read["head_dim"])
    if entries["rope_type"] == "dynamic":
        entries[_ORIGINAL] = read.get("max_position_embeddings")
    if entries["rope_type"] == "default" and not table.attention.get("partial"):
        # Only families that rotate a part of each head look at it, and scalings do.
        entries.pop("partial_rotary_factor", None)
    return entries


def _require_kinds(config: Mapping[str, Any], given: Any) -> None:
    """A family of today, which transformers reads no older configs of.

    Raises:
        ConfigError: RoPE is stated otherwise than kind by kind in ``rope_parameters``.
    """
    named = (given.get(kind) for kind in ("full_attention", "sliding_attention"))
    whole = all(isinstance(one, Mapping) and {"rope_type", "rope_theta"} <= one.keys() for one in named)
    if "rope_scaling" in config or not whole:
        raise ConfigError(
            "'rope_parameters' should have type and theta of each kind of layer, and nothing else is read",
            where="config.json, rope_scaling" if whole else "config.json, rope_parameters",
        )


def _widen(entries: dict[str, Any], head_dim: int) -> None:
    """NTK-aware scaling by a fixed ``alpha`` is a larger base, whatever the config calls it.

    Raises:
        ConfigError: a base or an ``alpha`` that is no positive number.
    """
    theta, alpha = (positive_number(entries, name, 0.0) for name in ("rope_theta", "alpha"))
    # Of a head of one pair it would be infinite.
    widened = theta * alpha ** (head_dim / (head_dim - 2)) if head_dim > 2 else 0.0
    entries |= {"rope_type": "default", "rope_theta": positive_number({"alpha": widened}, "alpha", 0.0)}


def _times(longest: Any, original: Any) -> float:
    """How many times longer the context has become."""
    try:
        return float(longest / original)
    except (TypeError, ArithmeticError) as error:
        raise ConfigError(
            f"contexts of {longest!r} tokens, {original!r} before: that makes no factor",
            where="config.json, rope_scaling or rope_parameters",
        ) from error


def _stretch(table: Table, entries: dict[str, Any], stated: Any, head_dim: Any) -> None:
    """Heads are as large as they are; of them RoPE turns a share of what is stated."""
    _check("head_dim", stated, "int|float")
    share = entries.get("partial_rotary_factor", 1.0)
    if not isinstance(head_dim, int) or not isinstance(share, int | float):
        return
    try:
        entries["partial_rotary_factor"] = share * stated / head_dim
        turned, own = int(stated * share), int(head_dim * share)
    except (ArithmeticError, ValueError) as error:
        raise ConfigError(
            f"RoPE on {share} of heads of {stated}, where heads have {head_dim}, makes no sense",
            code="LZ121",
            where="config.json, head_dim or partial_rotary_factor",
        ) from error
    if table.attention.get("rotary") == "own" and turned + turned % 2 != own:
        raise ConfigError(
            f"RoPE would turn {turned} dimensions of heads that have {own} for it",
            where="config.json, head_dim",
        )


def _check_rope_type(table: Table, kind: Any) -> None:
    allowed = table.attention.get("rope_types")
    if not isinstance(kind, str) or (allowed and kind not in allowed):
        raise ConfigError(
            f"RoPE of type {kind!r} is none that '{table.model_type}' has",
            where="config.json, rope_scaling or rope_parameters",
            fix=f"it has {' and '.join(allowed)}" if allowed else "",
        )


# Where a config states RoPE beside ``rope_parameters``, and under which name.
_KEYS = {"theta": "rope_theta", "partial": "partial_rotary_factor"}


def _of_kind(kind: str, scaling: Any, given: Any) -> dict[str, Any]:
    """The entries of one kind of layer, where kinds have entries of their own."""
    inner = {"rope_type": "default"} if given is None else given.get(kind)
    if scaling is None:
        return dict(inner or {"rope_type": "default"})
    if not isinstance(inner, Mapping):
        raise ConfigError(
            f"'rope_scaling' is for layers of '{kind}', which 'rope_parameters' does not have",
            where="config.json, rope_scaling",
            fix="leave one of the two out",
        )
    if isinstance(scaling, int | float):
        raise ConfigError(f"'rope_scaling' should be an object, is {scaling!r}", where="config.json, rope_scaling")
    # What is empty may be a list.
    return {**inner, **dict(scaling)}
