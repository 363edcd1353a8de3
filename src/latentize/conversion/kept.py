"""Weights that took long, kept on disk until the conversion is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentize.attention.coding import RowCode
from latentize.attention.latent import LatentWeights
from latentize.checkpoint import Journal
from latentize.processes import ALONE, Team

__all__ = ["Made", "cached"]

# Tensors of a :class:`RowCode`, in order.
_OF_A_CODE = ("latent_mix_rr", "mix_JP2", "pair_J", "mean_J2", "frequencies_F")

# Weights of some layers, and what is to be told of them.
Made = tuple[Sequence[LatentWeights], str]


def cached(
    journal: Journal | None, step: str, compute: Callable[[], Made], team: Team = ALONE, device: str = "cpu"
) -> Made:
    """What a step makes, unless the journal has it from before an interruption; bit by bit the same.

    Args:
        journal: Of the conversion, if it keeps one; of several processes the first does.
        step: What it is called there.
        compute: Makes it.
        team: Processes that all go on with what the first one has.
        device: Where they hold it.
    """
    found = None if journal is None else journal.tensors(step)
    if team.told(found is not None):
        return team.told(([], "") if found is None else _read(*found), device)
    weights, summary = team.told(compute(), device)
    if journal is None:
        return weights, summary
    tensors, numbers = {}, []
    for index, w in enumerate(weights):
        tensors |= {f"{index}.{name}": t for name, t in vars(w).items() if isinstance(t, Tensor)}
        numbers.append({name: v for name, v in vars(w).items() if isinstance(v, float)})
        if w.code is not None:
            tensors |= {f"{index}.code.{name}": getattr(w.code, name) for name in _OF_A_CODE}
            numbers[-1]["code"] = w.code.describe()
    strides = {name: t.stride() for name, t in tensors.items()}
    devices = {name: str(t.device) for name, t in tensors.items()}
    journal.keep(step, tensors, {"news": summary, "numbers": numbers, "strides": strides, "devices": devices})
    return weights, summary


def _read(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Made:
    weights = []
    for index, numbers in enumerate(facts["numbers"]):
        prefix = f"{index}."
        own = {name: t for name, t in tensors.items() if name.startswith(prefix)}
        laid = {
            name.removeprefix(prefix): _laid(t, facts["strides"][name], facts["devices"][name])
            for name, t in own.items()
        }
        if "code" in numbers:
            code = RowCode.described(numbers["code"], *(laid.pop(f"code.{name}") for name in _OF_A_CODE))
            numbers = {**numbers, "code": code}
        weights.append(LatentWeights(**laid, **numbers))
    return weights, facts["news"]


def _laid(t: Tensor, strides: Sequence[int], device: str) -> Tensor:
    """The tensor where and as it was before it was stored: a product's last bits depend on that."""
    if 0 in strides:
        return t.clone().to(device)
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=device).copy_(t)
