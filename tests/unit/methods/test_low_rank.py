"""Each factorisation is the best of its rank in its own sense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.common import FP64, relative_error
from tests.unit.layers import D, attention_spec, inputs, random_attention, stats_of
from torch import Tensor

from latentize.methods.care import whitened_svd
from latentize.methods.low_rank import Factors
from latentize.methods.mha2mla import joint_svd, split_svd
from latentize.methods.statistics import CalibrationStats
from latentize.methods.transmla import balanced_pca, key_balance

C, E = 10, 14


@pytest.fixture
def k_CD() -> Tensor:
    return 3 * torch.randn(C, D, dtype=torch.float64)


@pytest.fixture
def v_ED() -> Tensor:
    return torch.randn(E, D, dtype=torch.float64)


@pytest.fixture
def stats() -> CalibrationStats:
    return stats_of(random_attention(attention_spec()))


def product(factors: Factors) -> Tensor:
    return torch.cat([factors.k_up_Cr, factors.v_up_Er]) @ factors.down_rD


def tail(w: Tensor, rank: int) -> float:
    """Squared error of the best approximation of that rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(w)[rank:].square().sum())


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_joint_svd_is_the_nearest_matrix(k_CD: Tensor, v_ED: Tensor, rank: int) -> None:
    factors, w = joint_svd(k_CD, v_ED, rank), torch.cat([k_CD, v_ED])
    assert factors.down_rD.shape == (rank, D)
    error = float((w - product(factors)).square().sum())
    assert error == pytest.approx(tail(w, rank), rel=FP64)


def test_joint_svd_scales_the_up_side(k_CD: Tensor, v_ED: Tensor) -> None:
    """``down = V_rᵀ`` is orthonormal, as the paper has it."""
    down = joint_svd(k_CD, v_ED, 7).down_rD
    assert relative_error(down @ down.T, torch.eye(7, dtype=torch.float64)) <= FP64


@pytest.mark.parametrize(("rank", "k_rank"), [(2, 1), (7, 3), (12, 6), (22, 10)])
def test_split_svd_is_nearest_for_keys_and_values_apart(k_CD: Tensor, v_ED: Tensor, rank: int, k_rank: int) -> None:
    """Keys get half of the latent, but never more than they have; the rest goes to values."""
    factors = split_svd(k_CD, v_ED, rank)
    assert factors.down_rD.shape == (rank, D)
    k_error = float((k_CD - factors.k_up_Cr @ factors.down_rD).square().sum())
    v_error = float((v_ED - factors.v_up_Er @ factors.down_rD).square().sum())
    assert k_error == pytest.approx(tail(k_CD, k_rank), rel=FP64, abs=FP64)
    assert v_error == pytest.approx(tail(v_ED, rank - k_rank), rel=FP64, abs=FP64)
    assert not factors.k_up_Cr[:, k_rank:].any(), "keys read their own part of the latent only"
    assert not factors.v_up_Er[:, :k_rank].any(), "and so do values"


def test_split_svd_without_keys_is_for_values_alone(v_ED: Tensor) -> None:
    factors = split_svd(torch.empty(0, D, dtype=torch.float64), v_ED, 5)
    assert factors.k_up_Cr.shape == (0, 5)
    assert float((v_ED - product(factors)).square().sum()) == pytest.approx(tail(v_ED, 5), rel=FP64)


def test_key_balance_against_a_loop_over_tokens(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats) -> None:
    """The mean over components of each one's norm over the tokens, keys over values."""

    def mean_norm(w: Tensor) -> float:
        tokens = [w @ x for x in inputs().flatten(0, 1)]
        norms = [sum(float(y[i]) ** 2 for y in tokens) ** 0.5 for i in range(len(w))]
        return sum(norms) / len(norms)

    assert key_balance(k_CD, v_ED, stats) == pytest.approx(mean_norm(k_CD) / mean_norm(v_ED), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 6, 19])
def test_balanced_pca_is_the_pca_of_sampled_outputs(
    k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, rank: int
) -> None:
    factors, rho = balanced_pca(k_CD, v_ED, stats, rank), key_balance(k_CD, v_ED, stats)
    x_nD = inputs().flatten(0, 1)

    def outputs(k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([x_nD @ k.T / rho, x_nD @ v.T], dim=1)

    kept = outputs(factors.k_up_Cr @ factors.down_rD, factors.v_up_Er @ factors.down_rD)
    error = float((outputs(k_CD, v_ED) - kept).square().sum())
    assert error == pytest.approx(tail(outputs(k_CD, v_ED), rank), rel=1e-8)


def test_balance_protects_the_weaker_side(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats) -> None:
    """A hundred times larger keys leave the error of the values as it was."""
    x_nD, errors = inputs().flatten(0, 1), []
    for scale in (1.0, 100.0):
        factors = balanced_pca(scale * k_CD, v_ED, stats, 8)
        errors.append(float((x_nD @ (v_ED - factors.v_up_Er @ factors.down_rD).T).square().sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-8)


def expected_error(w: Tensor, approximation: Tensor, second_DD: Tensor) -> float:
    """``E‖(W - W') x‖²``."""
    gap = w - approximation
    return float((gap @ second_DD @ gap.T).trace())


@pytest.mark.parametrize("rank", [1, 6, 19])
def test_whitened_svd_is_best_on_the_inputs(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, rank: int) -> None:
    w, second = torch.cat([k_CD, v_ED]), stats.second_moment_DD
    whitened = expected_error(w, product(whitened_svd(k_CD, v_ED, stats, rank, damping=0.0)), second)
    x_nD = inputs().flatten(0, 1)
    assert whitened == pytest.approx(tail(x_nD @ w.T, rank) / len(x_nD), rel=1e-6)
    plain = expected_error(w, product(joint_svd(k_CD, v_ED, rank)), second)
    assert whitened < 0.9 * plain


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_whitened_svd_is_best_under_the_damped_moment(
    k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, damping: float
) -> None:
    """Damping is a fraction of the mean diagonal of ``C``."""
    w, second = torch.cat([k_CD, v_ED]), stats.second_moment_DD
    damped = second + damping * second.trace() / D * torch.eye(D, dtype=torch.float64)
    got = expected_error(w, product(whitened_svd(k_CD, v_ED, stats, 6, damping=damping)), damped)
    best = torch.linalg.eigvalsh(w @ damped @ w.T).flip(0)[6:].sum()
    assert got == pytest.approx(float(best), rel=FP64)


def test_whitened_svd_with_fewer_tokens_than_dimensions(k_CD: Tensor, v_ED: Tensor) -> None:
    """A singular moment is no obstacle, not even undamped."""
    few = stats_of(random_attention(attention_spec()), inputs(batch=1, length=8))
    approximation = product(whitened_svd(k_CD, v_ED, few, 8, damping=0.0))
    w, x_nD = torch.cat([k_CD, v_ED]), inputs(batch=1, length=8)[0]
    assert relative_error(x_nD @ approximation.T, x_nD @ w.T) <= 1e-4


METHODS: dict[str, Callable[[Tensor, Tensor, CalibrationStats, int], Factors]] = {
    "joint": lambda k, v, _, rank: joint_svd(k, v, rank),
    "split": lambda k, v, _, rank: split_svd(k, v, rank),
    "pca": balanced_pca,
    "whitened": whitened_svd,
}


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_exact(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, method: str) -> None:
    factors = METHODS[method](k_CD, v_ED, stats, C + E)
    assert factors.down_rD.shape == (C + E, D)
    assert relative_error(product(factors), torch.cat([k_CD, v_ED])) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_no_keys_to_compress(v_ED: Tensor, stats: CalibrationStats, method: str) -> None:
    """Where the whole head keeps RoPE, the latent is for values."""
    factors = METHODS[method](torch.empty(0, D, dtype=torch.float64), v_ED, stats, E)
    assert factors.k_up_Cr.shape == (0, E)
    assert relative_error(product(factors), v_ED) <= 1e-9
