"""Near misses, confidence and position, against loops that one can read."""

from __future__ import annotations

import math

import pytest
import torch
from tests.common import STREAM, relative_error
from torch import Tensor

from latentize.evaluation.detail import Evaluation
from latentize.evaluation.losses import compare_logits, compare_streams


def batch(sequences: int = 3, length: int = 37, vocab: int = 23, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that are sure of something, a reference near them, and targets that the reference often hits."""
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(sequences, length, vocab, generator=generator)
    logits = reference + torch.randn(sequences, length, vocab, generator=generator)
    guesses = torch.randint(vocab, (sequences, length), generator=generator)
    hit = torch.rand(sequences, length, generator=generator) < 0.6
    return logits, reference, torch.where(hit, reference.argmax(-1), guesses)


def by_hand(logits: Tensor, reference: Tensor, targets: Tensor) -> list[dict[str, float]]:
    """Every prediction by itself, in the order of the tensors."""
    found = []
    for row, expected, answers in zip(logits, reference, targets, strict=True):
        for at, answer in enumerate(answers.tolist()):
            p, r = row[at].double().softmax(0), expected[at].double().softmax(0)
            ranked = sorted(range(len(p)), key=lambda token: -float(p[token]))
            found.append(
                {
                    "context": at + 1,
                    "loss": -math.log(p[answer]),
                    "reference_loss": -math.log(r[answer]),
                    "kl": sum(float(a * (a / b).log()) for a, b in zip(r, p, strict=True)),
                    "near": int(r.argmax()) in ranked[:5],
                    "sure": float(p.max()),
                    "right": int(p.argmax()) == answer,
                    "reference_sure": float(r.max()),
                    "reference_right": int(r.argmax()) == answer,
                }
            )
    return found


def naive_error(found: list[dict[str, float]], prefix: str = "") -> float:
    """Fifteen bins, one after the other."""
    total = 0.0
    for n in range(15):
        inside = [f for f in found if n / 15 < f[prefix + "sure"] <= (n + 1) / 15]
        if inside:
            sure = sum(f[prefix + "sure"] for f in inside) / len(inside)
            right = sum(f[prefix + "right"] for f in inside) / len(inside)
            total += len(inside) / len(found) * abs(right - sure)
    return total


def test_each_number_is_what_a_loop_finds() -> None:
    logits, reference, targets = batch()
    found, told = by_hand(logits, reference, targets), Evaluation.of(logits, reference, targets).describe()
    assert told["tokens"] == len(found) == 3 * 37
    assert told["top5_agreement"] == sum(f["near"] for f in found) / len(found)
    assert told["top1_agreement"] < told["top5_agreement"] < 1
    assert told["calibration_error"] == pytest.approx(naive_error(found), rel=STREAM)
    assert told["reference_calibration_error"] == pytest.approx(naive_error(found, "reference_"), rel=STREAM)
    assert told["calibration_error"] != pytest.approx(told["reference_calibration_error"], rel=1e-3)
    assert told["excess_loss"] == pytest.approx(
        sum(f["loss"] - f["reference_loss"] for f in found) / len(found), rel=STREAM
    )
    assert [(e["from"], e["to"]) for e in told["by_position"]] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 37)]
    for entry in told["by_position"]:
        inside = [f for f in found if entry["from"] <= f["context"] <= entry["to"]]
        assert entry["tokens"] == len(inside)
        for key in ("loss", "reference_loss", "kl"):
            assert entry[key] == pytest.approx(sum(f[key] for f in inside) / len(inside), rel=STREAM), key
    assert sum(e["tokens"] for e in told["by_position"]) == told["tokens"]


def test_batches_add_up() -> None:
    logits, reference, targets = batch(sequences=5)
    whole = Evaluation.of(logits, reference, targets)
    parts = Evaluation.empty(compared=True)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        parts = parts + Evaluation.of(logits[rows], reference[rows], targets[rows])
    assert parts.quality.tokens == whole.quality.tokens and parts.near == whole.near
    assert parts.positions.longest == 37
    pairs = [(parts.positions.sums_k4, whole.positions.sums_k4), (parts.confidence.sums_c3, whole.confidence.sums_c3)]
    assert all(relative_error(a, b) < STREAM for a, b in pairs)
    assert parts.quality.nll == pytest.approx(whole.quality.nll, rel=STREAM)


def test_quality_is_that_of_a_conversion() -> None:
    logits, reference, targets = batch()
    flat = compare_logits(logits.flatten(0, 1), reference.flatten(0, 1), targets.flatten())
    assert Evaluation.of(logits, reference, targets).quality == flat


def test_streams_are_compared_as_their_logits_are() -> None:
    """Several at once, whatever the number of logits at a time."""
    table, reference, tokens = torch.randn(13, 6), torch.randn(3, 5, 6), torch.randint(13, (3, 5))
    streams = [reference + 0.1 * torch.randn(3, 5, 6) for _ in range(2)]
    targets = tokens[:, 1:].flatten()
    for logit_bytes in (1, 4 * 13 * 4, 1 << 20):
        options = {"vocab_size": 13, "logit_bytes": logit_bytes}
        found = compare_streams(streams, reference, tokens, lambda x: x @ table.T, **options)
        for quality, stream in zip(found, streams, strict=True):
            logits = [(x[:, :-1].flatten(0, 1) @ table.T) for x in (stream, reference)]
            expected = compare_logits(*logits, targets)
            assert quality.describe() == pytest.approx(expected.describe(), rel=1e-5)


def test_a_model_that_is_exactly_as_sure_as_it_is_right() -> None:
    """Ten predictions at 0.7, of which seven are right; then none."""
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(1, 10, 3)
    right = torch.tensor([[0] * 7 + [1] * 3])
    assert Evaluation.of(logits, None, right).describe()["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert Evaluation.of(logits, None, right * 0 + 2).describe()["calibration_error"] == pytest.approx(0.7, rel=1e-5)


def test_certainty_has_a_bin() -> None:
    sure = torch.tensor([200.0, 0.0]).expand(1, 4, 2)
    assert Evaluation.of(sure, None, torch.zeros(1, 4, dtype=torch.long)).describe()["calibration_error"] == 0


def test_without_a_reference_nothing_is_made_up() -> None:
    logits, _, targets = batch()
    told = Evaluation.of(logits, None, targets).describe()
    for key in ("kl", "reference_perplexity", "top1_agreement", "top5_agreement", "reference_calibration_error"):
        assert told[key] is None
    assert "excess_loss" not in told
    assert all(e["kl"] is None and e["reference_loss"] is None and e["loss"] > 0 for e in told["by_position"])


def test_fewer_tokens_than_five() -> None:
    logits, reference, targets = batch(vocab=3)
    assert Evaluation.of(logits, reference, targets).describe()["top5_agreement"] == 1
