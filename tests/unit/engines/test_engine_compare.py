"""What counts as agreement of an engine with the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.common import random_tokens
from tests.models import pico_model

from latentize.engines.compare import Agreement, Reference, _problems, compare, reference
from latentize.engines.run import Answers, engine_python
from latentize.errors import EngineError


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(pico_model(), random_tokens(3, 12), 5)


def answers(expected: Reference, **changes: Any) -> Answers:
    logits = [row.float().numpy() + 3.0 for row in expected.logprobs_PTV]  # a constant is nothing to logits
    return Answers(
        **{"logits_TV": logits, "greedy": expected.greedy, "tokens": None, "versions": {}, "settings": {}, **changes}
    )


def test_the_reference_is_what_generate_does(expected: Reference) -> None:
    model, prompts = pico_model(), expected.prompts_PT
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    model.generation_config.eos_token_id = None
    generated = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert generated[:, 12:].tolist() == expected.greedy
    assert torch.equal(expected.steps_PSV.argmax(-1), generated[:, 12:])


def test_agreement(expected: Reference) -> None:
    found = compare(expected, answers(expected))
    assert found.kl <= 1e-12 and found.largest_logprob_error <= 1e-5
    assert (found.top1_agreement, found.greedy_identical, found.greedy_margin) == (1.0, 3, 0.0)
    nll = -expected.logprobs_PTV[:, :-1].gather(2, expected.prompts_PT[:, 1:, None])
    assert found.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-6)
    assert found.reference_perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-12)


def test_positions_that_were_not_asked_for(expected: Reference) -> None:
    logits = answers(expected).logits_TV
    for rows in logits:
        rows[-1] = np.nan
    found = compare(expected, answers(expected, logits_TV=logits))
    whole = compare(expected, answers(expected))
    assert found == replace(whole, kl=found.kl, largest_logprob_error=found.largest_logprob_error)
    assert found.kl <= 1e-12 and found.largest_logprob_error <= 1e-5


def test_kl_is_the_divergence(expected: Reference) -> None:
    other = pico_model(seed=1)(input_ids=expected.prompts_PT).logits.detach()
    found = compare(expected, answers(expected, logits_TV=list(other.numpy())))
    direct = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), expected.logprobs_PTV, log_target=True, reduction="sum"
    )
    assert found.kl == pytest.approx(float(direct) / 36, rel=1e-6)
    assert found.top1_agreement < 0.5


def test_a_greedy_token_that_is_another(expected: Reference) -> None:
    other = [list(tokens) for tokens in expected.greedy]
    row = expected.steps_PSV[1, 3]
    other[1][3] = int(row.topk(2).indices[1])
    other[1][4] = 0  # what comes after a departure is no matter
    found = compare(expected, answers(expected, greedy=other))
    assert found.greedy_identical == 2
    assert found.greedy_margin == pytest.approx(float(row.topk(2).values.diff().abs()))


FINE = Agreement(1e-9, 1e-6, 1.0, 10, 0.0, 5.0, 5.0)
RESULT = {"type": "float32", "kl_limit": 1e-6, "texts": 3, "texts_cut_alike": 3}


@pytest.mark.parametrize(
    ("found", "result", "words"),
    [
        ({}, {}, None),
        ({"kl": 2e-6}, {}, "KL"),
        ({"kl": math.nan}, {}, "KL"),
        ({"largest_logprob_error": 2e-4}, {}, "log-probabilities"),
        ({"largest_logprob_error": 2e-4}, {"type": "f16"}, None),
        ({"greedy_margin": 1e-3}, {}, "greedy"),
        ({"greedy_margin": 1e-6}, {}, None),
        ({}, {"texts_cut_alike": 2}, "1 of 3 texts"),
        ({}, {"texts_cut_alike": None}, None),
    ],
)
def test_what_is_a_problem(found: dict[str, Any], result: dict[str, Any], words: str | None) -> None:
    problems = _problems(replace(FINE, **found), {**RESULT, **result})
    assert (problems == []) if words is None else (len(problems) == 1 and words in problems[0])


def test_an_environment_that_is_not_finished(tmp_path: Path) -> None:
    """What an interrupted `make engines` leaves is not taken for an engine."""
    with pytest.raises(EngineError, match="no environment"):
        engine_python("vllm", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert engine_python("vllm", tmp_path) == tmp_path / "bin" / "python"
    (tmp_path / ".unfinished").touch()
    with pytest.raises(EngineError, match="not finished"):
        engine_python("vllm", tmp_path)
