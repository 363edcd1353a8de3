"""Questions whose answer lies far back in a text, in the manner of RULER (Hsieh et al., arXiv 2404.06654).

A puzzle plants some pieces in held-out text, ends in a question, and has one answer. Pieces are tokenised each by
itself, and the answer is the same tokens in the text and after the question: so it is defined for any tokenizer.

    needle    one value under one name, amid text
    needles   four such, one is asked for
    tracking  two values, each given on from name to name; the last name of one is asked for
    copy      a row of words that begins again
    recall    eight pairs of words in one place, one is asked for (Arora et al., arXiv 2312.04927)

L tokens of a context, the answer included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from latentize.errors import DataError

__all__ = ["PUZZLES", "Piece", "Puzzle", "placed"]

Encode = Callable[[str], list[int]]

_WORDS = (  # noqa: SIM905 (a list would be a page long)
    "amber anchor apple arrow autumn badger bamboo basket beacon berry birch blanket bridge bronze butter candle "
    "canyon carpet castle cedar cherry cinder circle clover cobalt copper coral cotton cricket crystal dagger "
    "desert dragon ember falcon feather fern forest garden ginger glacier granite hammer harbor hazel helmet "
    "honey island ivory jacket jasmine jungle kettle ladder lantern lemon linen marble meadow mirror needle "
    "nickel oasis olive onyx orchid oyster paddle paper pebble pepper pillow planet plum pocket prairie quartz "
    "rabbit raven ribbon river saddle salmon shadow silver spider spruce summer sunset thunder timber tulip "
    "tunnel turtle valley velvet violet walnut willow winter"
).split()
_NEEDLES, _HOPS, _PAIRS = 4, 2, 8
_COPIED, _CUE = 12, 4


@dataclass(frozen=True)
class Piece:
    """Something that is planted.

    Attributes:
        tokens: What.
        place: ``depth``: where the answer is asked to lie; ``before`` or ``after`` that; or ``anywhere``.
        key: Whether the answer cannot be known without it.
    """

    tokens: list[int]
    place: str = "depth"
    key: bool = True


@dataclass(frozen=True)
class Puzzle:
    """What is planted, in order where places allow it, what is asked, and the tokens that answer it."""

    pieces: tuple[Piece, ...]
    question: list[int]
    answer: list[int]


def _number(draw: Random) -> str:
    return f" {draw.randrange(10_000, 100_000)}"


def _names(draw: Random, count: int) -> list[str]:
    words = draw.sample(_WORDS, 2 * count)
    return [f"{first}_{second}" for first, second in zip(words[::2], words[1::2], strict=True)]


def _assigned(encode: Encode, name: str, value: list[int]) -> list[int]:
    return [*encode(f"\n{name} ="), *value, *encode("\n")]


def _needles(draw: Random, encode: Encode, count: int) -> Puzzle:
    names, values = _names(draw, count), [encode(_number(draw)) for _ in range(count)]
    pieces = [
        Piece(_assigned(encode, name, value), "anywhere" if n else "depth", key=n == 0)
        for n, (name, value) in enumerate(zip(names, values, strict=True))
    ]
    return Puzzle(tuple(pieces), encode(f"\n{names[0]} ="), values[0])


def _needle(draw: Random, encode: Encode) -> Puzzle:
    return _needles(draw, encode, 1)


def _several(draw: Random, encode: Encode) -> Puzzle:
    return _needles(draw, encode, _NEEDLES)


def _tracking(draw: Random, encode: Encode) -> Puzzle:
    names, value, other = _names(draw, 2 * (_HOPS + 1)), encode(_number(draw)), encode(_number(draw))
    # The chain that is asked for, and one like it, so that to repeat the number in the text is not enough.
    mine, another = names[: _HOPS + 1], names[_HOPS + 1 :]
    roots = [
        Piece(_assigned(encode, mine[0], value)),
        Piece(_assigned(encode, another[0], other), draw.choice(["before", "after"]), key=False),
    ]
    hops = [
        Piece(_assigned(encode, name, encode(f" {before}")), "after", key=False)
        for pairs in zip(pairwise(mine), pairwise(another), strict=True)
        for before, name in pairs
    ]
    return Puzzle((*roots, *hops), encode(f"\nassert {mine[-1]} =="), value)


def _copy(draw: Random, encode: Encode) -> Puzzle:
    words = draw.sample(_WORDS, _COPIED)
    cue, rest = encode("\n# " + " ".join(words[:_CUE])), encode(" " + " ".join(words[_CUE:]))
    return Puzzle((Piece([*cue, *rest, *encode("\n")]),), cue, rest)


def _recall(draw: Random, encode: Encode) -> Puzzle:
    words = draw.sample(_WORDS, 2 * _PAIRS)
    pairs = [(encode(f"\n{a}:"), encode(f" {b}")) for a, b in zip(words[::2], words[1::2], strict=True)]
    asked = draw.randrange(_PAIRS)
    pieces = tuple(Piece([*a, *b], key=n == asked) for n, (a, b) in enumerate(pairs))
    return Puzzle(pieces, *pairs[asked])


PUZZLES: dict[str, Callable[[Random, Encode], Puzzle]] = {
    "needle": _needle,
    "needles": _several,
    "tracking": _tracking,
    "copy": _copy,
    "recall": _recall,
}


def placed(puzzle: Puzzle, text: Sequence[int], depth: float, draw: Random) -> tuple[list[int], list[int]]:
    """The puzzle in a text, and the same without what its answer depends on.

    Args:
        puzzle: What to plant.
        text: ``L`` tokens; some at its end give way, and stand for what is left out.
        depth: Of the answer, 0 at the beginning and 1 right before the question.
        draw: Decides on the other places.

    Returns:
        Two contexts of ``L`` tokens, that differ in the key pieces only, and end in question and answer.

    Raises:
        DataError: the text is too short.
    """
    ending = [*puzzle.question, *puzzle.answer]
    planted = sum(len(piece.tokens) for piece in puzzle.pieces)
    room = len(text) - planted - len(ending)
    if room < 1:
        raise DataError(
            f"a context of {len(text)} tokens has no room for a question of {planted + len(ending)}",
            where="--lengths",
            fix="give longer ones",
        )
    at = round(depth * room)
    later = sorted(draw.randint(at, room) for piece in puzzle.pieces if piece.place == "after")
    places = {
        "depth": lambda: at,
        "before": lambda: draw.randint(0, at),
        "after": lambda: later.pop(0),
        "anywhere": lambda: draw.randint(0, room),
    }
    ordered = sorted(((places[p.place](), n, p) for n, p in enumerate(puzzle.pieces)), key=lambda entry: entry[:2])
    spare, whole, without, done = list(text[room:]), [], [], 0
    for place, _, piece in ordered:
        before, done = text[done:place], place
        size = len(piece.tokens)
        instead, spare = (spare[:size], spare[size:]) if piece.key else (piece.tokens, spare)
        whole += [*before, *piece.tokens]
        without += [*before, *instead]
    rest = [*text[done:room], *ending]
    return whole + rest, without + rest
