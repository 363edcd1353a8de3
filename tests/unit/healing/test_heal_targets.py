"""Distillation's losses: against PyTorch's, whatever the chunks; the likeliest tokens stand for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.common import FP32, random_tokens, relative_error
from tests.models import pico_model
from torch.nn import functional as F

from latentize.errors import OptionError
from latentize.healing.recipe import Healing
from latentize.healing.targets import FullTargets, Live, TopKTargets, Written, write_top_k
from latentize.progress import silent
from latentize.text.tokens import Passages
from latentize.training.descent import Schedule


def full(tokens: int = 9, vocab: int = 13) -> tuple[FullTargets, torch.Tensor]:
    table = torch.randn(vocab, 6)
    return FullTargets(torch.randn(tokens, 6), lambda h: h @ table.T), torch.randn(tokens, vocab)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_kullback_and_leiblers(temperature: float) -> None:
    targets, logits = full()
    log_p = (targets.head(targets.final_nD) / temperature).log_softmax(-1)
    expected = F.kl_div((logits / temperature).log_softmax(-1), log_p, log_target=True, reduction="sum")
    assert float(targets.divergence(logits, temperature)) == pytest.approx(float(expected), rel=1e-5)
    parts = [t.divergence(part, temperature) for t, part in zip(targets.split(4), logits.split(4), strict=True)]
    assert float(sum(parts)) == pytest.approx(float(expected), rel=1e-5)


def top_k(targets: FullTargets, k: int) -> TopKTargets:
    best = targets.head(targets.final_nD).log_softmax(-1).topk(k)
    return TopKTargets(best.values, best.indices.to(torch.int32))


def test_all_tokens_kept_are_the_full_divergence() -> None:
    targets, logits = full()
    assert float(top_k(targets, 12).divergence(logits, 1.0)) == pytest.approx(
        float(targets.divergence(logits, 1.0)), rel=1e-3
    )


@pytest.mark.parametrize("k", [1, 3, 8])
def test_few_tokens_kept_are_a_lower_bound_with_the_same_minimum(k: int) -> None:
    targets, logits = full()
    kept = top_k(targets, k)
    assert float(kept.divergence(logits, 1.0)) <= float(targets.divergence(logits, 1.0)) + 1e-5
    own = targets.head(targets.final_nD).clone().requires_grad_(True)
    value = kept.divergence(own, 1.0)
    (gradient,) = torch.autograd.grad(value, own)
    assert abs(float(value.detach())) <= 1e-5
    assert float(gradient.abs().max()) <= 1e-5


def test_what_is_written_is_what_the_teacher_says(tmp_path: Path) -> None:
    model, tokens = pico_model(), random_tokens(batch=5, length=12)
    text = Passages.contiguous(tokens)
    write_top_k(model, text, tmp_path, k=4, temperature=2.0, batch=2, autocast=False, progress=silent)
    rows = torch.tensor([3, 1])
    found = Written(tmp_path)(rows, text[rows])
    expected = top_k_of(model, tokens[rows], 4, 2.0)
    assert found.ids_nk.tolist() == expected.ids_nk.tolist()
    assert relative_error(found.log_p_nk.float(), expected.log_p_nk) <= 1e-3


def top_k_of(model: torch.nn.Module, tokens: torch.Tensor, k: int, temperature: float) -> TopKTargets:
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    best = (logits / temperature).log_softmax(-1).topk(k)
    return TopKTargets(best.values, best.indices)


def test_a_teacher_that_was_asked_is_not_asked_again(tmp_path: Path) -> None:
    model, text, asked = pico_model(), Passages.contiguous(random_tokens()), []
    options = {"k": 2, "temperature": 1.0, "batch": 2, "autocast": False}

    def progress(what: str, done: int, total: int, detail: str = "") -> None:
        asked.append(done)

    for _ in range(2):
        write_top_k(model, text, tmp_path, progress=progress, **options)
    assert asked == [1]
    write_top_k(model, Passages(text.tokens_NT.flip(0), text.positions_NT), tmp_path, progress=progress, **options)
    assert asked == [1, 1]


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_live_teacher_predicts_as_the_model_does(family: str) -> None:
    model, tokens = pico_model(family), random_tokens()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = Live(model, hidden=True)(torch.arange(2), Passages.contiguous(tokens))
        assert relative_error(targets.head(targets.final_nD), logits) <= FP32
    assert len(targets.hidden_BTD) == 2


@pytest.mark.parametrize(("decay", "middle"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - 0.5**0.5)])
def test_shapes_of_the_decay(decay: str, middle: float) -> None:
    schedule = Schedule(steps=104, rate=1.0, warmup=4, decay=decay)  # type: ignore[arg-type]
    factors = [schedule.factor(step) for step in range(104)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[4] == pytest.approx(1.0)
    assert factors[54] == pytest.approx(middle)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.02


@pytest.mark.parametrize(
    "entries",
    [{"top_k": 8, "match_hidden": 1.0}, {"train": "lora", "optimiser": "muon"}, {"ce": 1.5}, {"epoch": 2}, {"rate": 0}],
)
def test_impossible_healings_are_refused(entries: dict) -> None:
    with pytest.raises(OptionError):
        Healing.build(**entries)


def test_steps_are_whole_and_cover_every_epoch() -> None:
    schedule = Healing(step_tokens=1024, sequence_length=256, epochs=3).schedule(10)
    assert schedule.tokens == 1024
    assert schedule.steps == 6
    assert Healing(step_tokens=1 << 20, sequence_length=256).schedule(3).sequences(256) == 3
