"""The gradient of the divergence is right, whatever the chunks; polish does nothing where there is nothing to gain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, random_tokens, relative_error
from torch.nn import functional as F

from latentize.conversion.draft import observe
from latentize.families.opening import open_source
from latentize.methods.closed_form import convert_layer
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.modeling.source import SourceModel
from latentize.text.tokens import Passages, spread_positions
from latentize.training.polish import Polish, divergence, polish
from latentize.training.refine import expand_heads


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_the_divergence_and_its_gradient_against_autograd(at_once: int) -> None:
    table, hidden, reference = torch.randn(11, 6), torch.randn(7, 6), torch.randn(7, 6)
    value, gradient = divergence(hidden, reference, lambda h: h @ table.T, at_once=at_once)
    leaf = hidden.clone().requires_grad_(True)
    log_q, log_p = (leaf @ table.T).log_softmax(-1), (reference @ table.T).log_softmax(-1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (by_hidden,) = torch.autograd.grad(expected, leaf)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert relative_error(gradient, by_hidden) <= FP32


def test_nothing_diverges_from_itself() -> None:
    table, hidden = torch.randn(11, 6), torch.randn(7, 6)
    value, gradient = divergence(hidden, hidden.clone(), lambda h: h @ table.T, at_once=4)
    assert abs(value) <= 1e-6
    assert float(gradient.abs().max()) <= 1e-6


@pytest.fixture
def polishing(source: Callable[..., Path]) -> Callable[..., list[tuple[int, str]]]:
    """Polish a picomodel's layers and tell the steps that were taken."""

    def run(keep_all: bool, **changes: Any) -> list[tuple[int, str]]:
        checkpoint, spec = open_source(source("llama", 1))
        model, tokens = SourceModel(checkpoint, spec), random_tokens(16, 24)
        text = Passages(tokens, spread_positions(16, 24, 200))
        rank, rope = (16, 16) if keep_all else (8, 4)
        setting = Setting("transmla", rank, rope, freqfold=1 if keep_all else 4)
        weights, hidden = [], model.embed(text)
        for layer in model.layers():
            seen = observe(layer, hidden, needs(setting, spec.attention))
            weights.append(expand_heads(convert_layer(layer.weights, spec.attention, seen.stats, setting)))
        told: list[tuple[int, str]] = []
        how = Polish(tokens=48, **{"steps": 20, "looks": 10, **changes})
        with torch.no_grad():
            polish(
                model, weights, text, hidden.hidden_NTD, text[:4], how, lambda *seen: told.append((seen[1], seen[3]))
            )
        return told

    return run


def test_polish_takes_all_its_steps(polishing: Callable[..., list[tuple[int, str]]]) -> None:
    """Even where the first are too large and gain nothing: later ones are smaller."""
    assert [done for done, _ in polishing(False)] == list(range(1, 21))
    assert [done for done, _ in polishing(False, rate=30.0)] == list(range(1, 21))


def test_what_is_exact_is_not_polished(polishing: Callable[..., list[tuple[int, str]]]) -> None:
    assert polishing(True) == []


def test_a_step_in_parts_is_the_same_step(polishing: Callable[..., list[tuple[int, str]]]) -> None:
    """Two sequences at once, or one after the other."""
    whole, parts, other = (
        [float(told.split()[1].strip(",")) for _, told in polishing(False, steps=5, looks=5, **how)]
        for how in ({"at_once": 48}, {"at_once": 1}, {"seed": 1})
    )
    assert parts == pytest.approx(whole, rel=1e-3)
    assert other != pytest.approx(whole, rel=1e-2)
