"""The gradient of the divergence is right, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from tests.common import FP32, relative_error
from torch.nn import functional as F

from latentize.convert.polish import divergence


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
