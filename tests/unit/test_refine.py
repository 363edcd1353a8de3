"""Refinement goes downhill, is reproducible, and starts from what it is given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.common import FP32, relative_error
from tests.unit.layers import attention_spec, inputs, random_attention, stats_of

from latentize.attention.grouped import grouped_attention
from latentize.convert.methods import Setting, convert_layer
from latentize.convert.refine import Refinement, batches, expand_heads, refine, trainable

HOW = Refinement(steps=30, batch=4)


@pytest.fixture
def job():
    """A layer at a third of its cache, its inputs, and what its attention should add."""
    spec = attention_spec(2)
    w, x = random_attention(spec, biases=True), inputs(batch=12, length=24)
    start = convert_layer(w, spec, stats_of(w, x), Setting("transmla", 14, 8, freqfold=2))
    return start, x.float(), grouped_attention(x, w, spec).float()


def error(w, x, target) -> float:
    return float((w.to(torch.float32).expanded(x) - target).square().mean() / target.var())


def test_the_error_shrinks(job) -> None:
    start, x, target = job
    before, after = error(start, x, target), error(refine(start, x, target, HOW), x, target)
    assert after < 0.7 * before


def test_no_steps_change_nothing(job) -> None:
    start, x, target = job
    same = refine(start, x, target, replace(HOW, steps=0))
    for name, tensor in trainable(start).items():
        assert torch.equal(getattr(same, name), tensor.float()), name
        assert not getattr(same, name).requires_grad


def test_the_same_seed_gives_the_same_weights(job) -> None:
    start, x, target = job
    one, same, other = (refine(start, x, target, replace(HOW, steps=4, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one.kv_a_rD, same.kv_a_rD)
    assert not torch.equal(one.kv_a_rD, other.kv_a_rD)


def test_frequencies_are_not_trained(job) -> None:
    start, x, target = job
    refined = refine(start, x, target, replace(HOW, steps=3))
    assert "frequencies_PF" not in trainable(start)
    assert torch.equal(refined.frequencies_PF, start.frequencies_PF.float())
    assert refined.spec == start.spec


def test_heads_that_shared_projections_compute_the_same_apart(job) -> None:
    start, x, _ = job
    apart = expand_heads(start.to(torch.float32))
    assert apart.spec.up_heads == apart.spec.num_heads == 4
    assert apart.spec.cache_values == start.spec.cache_values
    assert relative_error(apart.expanded(x), start.to(torch.float32).expanded(x)) <= FP32


def test_the_rate_warms_up_and_decays() -> None:
    how = Refinement(steps=20, warmup=5)
    factors = [how.factor(step) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.1


def test_batches_visit_every_sequence_once_a_round() -> None:
    stream = batches(6, 2, seed=0)
    first, second = ([next(stream) for _ in range(3)] for _ in range(2))
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == list(range(6))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert len(next(batches(3, 8, seed=0))) == 3
