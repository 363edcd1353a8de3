"""Long-context probes: what is planted, what counts as an answer, and that all of it comes again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from tests.models import byte_tokenizer, pico
from torch import Tensor

from latentize.errors import DataError, OptionError
from latentize.evaluation.predict import Predict
from latentize.evaluation.probes import DEPTHS, Answer, Example, answers, examples, probe, summary
from latentize.evaluation.puzzles import PUZZLES, Piece, Puzzle, placed

VOCAB = 257


@pytest.fixture(scope="module")
def asked(text: str) -> list[Example]:
    return examples(byte_tokenizer(), (text,), lengths=(320, 448), samples=2)


def words(example: Example, *, without: bool = False) -> str:
    return byte_tokenizer().decode(example.without if without else example.tokens)


def oracle(asked: list[Example], *, knows: bool = True) -> Predict:
    """One that has seen the whole contexts, and says what comes next in them; of others it has no idea."""
    seen = {tuple(example.tokens) for example in asked}

    def predict(tokens_BT: Tensor, count: int) -> Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, VOCAB)
        for row, tokens in enumerate(tokens_BT.tolist()):
            if tuple(tokens) in seen:
                for at, token in enumerate(tokens[1:]):
                    logits_BTV[row, at, token] = 50.0 if knows else -50.0
        return logits_BTV[:, -count:]

    return predict


def induction(tokens_BT: Tensor, count: int) -> Tensor:
    """One that looks for the longest earlier stretch like what it has just read, and says what came after that."""
    logits_BkV = torch.zeros(len(tokens_BT), count, VOCAB)
    for row, tokens in enumerate(tokens_BT.tolist()):
        for k in range(count):
            end = len(tokens) - count + k
            alike = []
            for earlier in range(end):
                size = 0
                while size <= earlier and tokens[earlier - size] == tokens[end - size]:
                    size += 1
                alike.append(size)
            logits_BkV[row, k, tokens[alike.index(max(alike)) + 1]] = 20.0
    return logits_BkV


def found(predict: Predict, asked: list[Example]) -> list[Answer]:
    return [answer for example in asked for answer in answers(predict, [example])]


def test_the_right_answer_scores_one_and_gains_what_was_not_known(asked: list[Example]) -> None:
    for answer in found(oracle(asked), asked):
        assert answer.score == 1
        assert answer.gain == pytest.approx(math.log(VOCAB), rel=1e-5), "from one of all tokens to certainty"
        assert answer.control < 0.5


def test_wrong_answers_score_nothing_and_lose(asked: list[Example]) -> None:
    assert all(a.score == 0 and a.gain < -1 for a in found(oracle(asked, knows=False), asked))


def test_examples_of_one_batch_are_scored_as_each_alone(asked: list[Example]) -> None:
    """Answers of several lengths end where their contexts do."""
    batch = [example for example in asked if example.length == 320 and example.depth == 0.5]
    assert len({len(example.answer) for example in batch}) > 1
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCAB, VOCAB, generator=generator)

    def predict(tokens_BT: Tensor, count: int) -> Tensor:
        return table[tokens_BT][:, -count:]

    for together, alone in zip(answers(predict, batch), found(predict, batch), strict=True):
        assert vars(together) == pytest.approx(vars(alone), abs=1e-6)
        assert alone.gain == pytest.approx(0, abs=1e-6), "what looks one token back cannot tell the texts apart"


def test_copying_what_followed_before_answers_all_but_tracking(asked: list[Example]) -> None:
    told = {row["probe"]: row for row in summary(asked, found(induction, asked), None)["rows"] if row["length"] == 320}
    for name in ("needle", "needles", "copy", "recall"):
        assert told[name]["score"] == 1, name
        assert told[name]["control"] < 0.6, name
        assert told[name]["gain"] > 5, name
    assert told["tracking"]["score"] < 1


def test_contexts_are_as_long_as_they_should_be_and_end_in_the_answer(asked: list[Example]) -> None:
    assert len(asked) == 2 * len(PUZZLES) * len(DEPTHS) * 2
    assert {(e.probe, e.length, e.depth) for e in asked} == {
        (name, length, depth) for name in PUZZLES for length in (320, 448) for depth in DEPTHS
    }
    for example in asked:
        assert len(example.tokens) == len(example.without) == example.length
        assert example.tokens[-len(example.answer) :] == example.without[-len(example.answer) :] == example.answer
        answer = byte_tokenizer().decode(example.answer)
        assert words(example).count(answer) == 2, "in the text, and after the question"
        assert words(example, without=True).count(answer) == 1, example.probe


def test_the_answer_lies_where_it_is_asked_to(asked: list[Example]) -> None:
    for example in asked:
        answer = byte_tokenizer().decode(example.answer)
        if example.probe == "needle":
            at = words(example).index(answer) / example.length
            assert abs(at - example.depth) < 0.25
    by_depth = [
        words(e).index(byte_tokenizer().decode(e.answer)) for e in asked if (e.probe, e.length) == ("copy", 448)
    ]
    assert max(by_depth[:2]) < min(by_depth[2:4]) and max(by_depth[2:4]) < min(by_depth[4:])


def test_a_chain_is_in_order(asked: list[Example]) -> None:
    for example in asked:
        if example.probe == "tracking":
            text, value = words(example), byte_tokenizer().decode(example.answer)
            name = text.rsplit("assert ", 1)[1].split(" ==")[0]
            for _ in range(2):  # hops
                before = text.split(f"\n{name} = ")[1].split("\n")[0]
                assert text.index(f"\n{before} =") < text.index(f"\n{name} =")
                name = before
            assert f"\n{name} ={value}\n" in text


def test_only_what_the_answer_depends_on_is_left_out() -> None:
    puzzle = Puzzle((Piece([1, 2]), Piece([3], "anywhere", key=False)), [4], [5])
    tokens, without = placed(puzzle, range(10, 22), 0.5, Random(0))
    assert [t for t in tokens if t < 10 and t not in (3,)] == [1, 2, 4, 5]
    assert [t for t in without if t < 10] == [3, 4, 5]
    # Seven tokens of text; the next two stand for what is missing.
    assert [t for t in tokens if t >= 10] == list(range(10, 17))
    assert sorted(t for t in without if t >= 10) == list(range(10, 19))
    assert tokens.index(1) - (3 in tokens[: tokens.index(1)]) == 4 == round(0.5 * 7)


def test_a_context_that_is_too_short_is_refused() -> None:
    with pytest.raises(DataError, match="no room") as caught:
        placed(Puzzle((Piece([1, 2]),), [4], [5]), range(4), 0.5, Random(0))
    assert caught.value.where == "--lengths"


def test_the_same_seed_asks_the_same(text: str) -> None:
    ask: Callable[[int], list[Example]] = lambda seed: examples(  # noqa: E731
        byte_tokenizer(), (text,), lengths=(320,), samples=1, seed=seed
    )
    assert ask(0) == ask(0)
    assert all(a.answer != b.answer for a, b in zip(ask(0), ask(1), strict=True))


def test_means_and_errors() -> None:
    asked = [Example("needle", 64, depth, [], [], []) for depth in (0.1, 0.1, 0.9, 0.9)]
    ours = [Answer(0.5, 0, 1.0), Answer(1.0, 0, 2.0), Answer(0.0, 0, 6.0), Answer(0.0, 0, 9.0)]
    theirs = [Answer(1.0, 0, 1.5), Answer(1.0, 0, 2.5), Answer(1.0, 0, 6.5), Answer(1.0, 0, 9.5)]
    told = summary(asked, ours, theirs)
    (row,), (near, far) = told["rows"], told["cells"]
    assert (row["examples"], row["score"], row["gain"]) == (4, 0.375, 4.5)
    # Variances of 1/2 and 9/2 of two each; that of near and far is not among them.
    assert near["gain_error"] == pytest.approx((0.5 / 2) ** 0.5)
    assert far["gain_error"] == pytest.approx((4.5 / 2) ** 0.5)
    assert row["gain_error"] == pytest.approx(((0.5 / 2 + 4.5 / 2) / 4) ** 0.5)
    assert (row["gain_lost"], row["gain_lost_error"]) == (0.5, 0)
    assert (near["depth"], near["gain"], far["depth"], far["gain"]) == (0.1, 1.5, 0.9, 7.5)
    alone = summary(asked[:3], ours[:3], None)
    assert alone["cells"][1]["gain_error"] is None, "of a single one"
    assert alone["rows"][0]["gain_error"] is None
    assert alone["rows"][0]["reference_gain"] is alone["rows"][0]["gain_lost"] is None


def test_a_picomodel_answers_the_same_twice(tmp_path: Path, text: str) -> None:
    model = pico(tmp_path, max_position_embeddings=320)
    options = {"data": (text,), "lengths": [280, 320], "samples": 1}
    first = probe(model, model, **options)
    assert first == probe(model, model, **options)
    assert first["lengths"] == [280, 320]
    for row in first["rows"]:
        assert row["gain"] == row["reference_gain"] and row["gain_lost"] == 0
        assert 0 <= row["score"] <= 1
    assert any(row["gain"] != 0 for row in first["rows"])
    assert probe(model, data=(text,), samples=1)["lengths"] == [320], "what the model was made for"
    with pytest.raises(OptionError, match="was made for 320"):
        probe(model, data=(text,), lengths=[512])
