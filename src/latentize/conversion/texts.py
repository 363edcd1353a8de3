"""The text of a conversion: what is learnt from, what choices are made on, what is reported."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latentize.recipe import Recipe
from latentize.text.documents import ALONE, warn
from latentize.text.drawing import Part, draw
from latentize.text.repeated import repeated
from latentize.text.restyled import restyled
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import Passages, leading_tokens

__all__ = ["Text", "draw_text", "mixed", "sequences_to_generate", "spread_over"]

# Relative to a user's text, where layers are refined: what of it is read in other styles, in what of it a passage is
# read twice, and what a small model writes itself beside it.
_RESTYLED, _REPEATED, _SELF_GENERATED = 0.25, 0.375, 0.5


@dataclass
class Text:
    """Disjoint sets of tokens, but for two that differ in little.

    Attributes:
        calibration: For statistics, and to learn from.
        selection: For choices of settings.
        polishing: For the choice of what a polish has made: the same, with passages read twice. Settings are not chosen
            by those, for what copies well before it has learnt to does not do so afterwards.
        evaluation: For the numbers that are reported.
        restyled, repeated: Tokens of the first that are the user's text in another style, and that are in sequences
            where a passage is read twice.
        notes: What the report has to say of them.
    """

    calibration: Passages
    selection: Passages
    polishing: Passages
    evaluation: Passages
    restyled: int = 0
    repeated: int = 0
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """Of all tokens and positions."""
        sets = (self.calibration, self.selection, self.polishing, self.evaluation)
        parts = (t for p in sets for t in (p.tokens_NT, p.positions_NT))
        found = hashlib.sha256()
        for part in parts:
            found.update(str(tuple(part.shape)).encode() + part.to(torch.int64).contiguous().numpy().tobytes())
        return found.hexdigest()


def draw_text(folder: Path, recipe: Recipe, context: int, *, trust_remote_code: bool = False) -> Text:
    """The text of a recipe, in the tokens of the model in ``folder``.

    What is learnt from, and what choices are made on, is spread over a context; what is reported is as it is written.

    Args:
        folder: With the tokenizer.
        recipe: Says how much.
        context: Positions that the model is made for.
        trust_remote_code: Whether code of the tokenizer may be run.

    Raises:
        DataError: the text cannot be read, or does not fill a sequence to learn from and one to report.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    length, notes = recipe.sequence_length, []
    wanted = max(1, recipe.calibration_tokens // length)
    parts = [
        Part("calibration", wanted * length + recipe.selection_tokens, recipe.seed),
        Part("heldout", recipe.held_out_tokens),
    ]
    rows, held_out = draw(tokenizer, recipe.data, parts, sequence_length=length, notes=notes)
    held = max(1, min(recipe.selection_tokens // length, len(rows) // 4)) if len(rows) > 1 else 0
    # One sequence alone has to serve for everything.
    if not held:
        notes.append(ALONE)
        warn(ALONE)
    selection, calibration = rows[: held or 1], rows[held : held + wanted]
    context, lead = spread_over(recipe, context), len(leading_tokens(tokenizer))
    some = round(_share(recipe, recipe.restyled, _RESTYLED) * len(calibration))
    styled = restyled(tokenizer, calibration, sequences=some, seed=recipe.seed)
    learnt, polishing = (
        repeated(rows, sequences=round(_share(recipe, recipe.repeated, _REPEATED) * len(rows)), lead=lead, seed=seed)
        for rows, seed in ((styled, recipe.seed), (selection, recipe.seed + 1))
    )
    return Text(
        calibration=Passages.spread(learnt, context, seed=recipe.seed),
        selection=Passages.spread(selection, context, seed=recipe.seed + 1),
        polishing=Passages.spread(polishing, context, seed=recipe.seed + 1),
        evaluation=Passages.contiguous(held_out),
        restyled=int((styled != calibration).any(1).sum()) * length,
        repeated=int((learnt != styled).any(1).sum()) * length,
        notes=notes,
    )


def _share(recipe: Recipe, asked: float | None, usual: float) -> float:
    """What is asked for; without that the usual, where layers are refined."""
    if asked is not None:
        return asked
    return usual if recipe.refines else 0.0


def sequences_to_generate(recipe: Recipe, *, large: bool) -> int:
    """How many calibration sequences the model writes itself beside the user's.

    Args:
        recipe: What is to be done.
        large: Whether the whole model should not be in memory for it without being asked to.
    """
    share = _share(recipe, recipe.self_generated, 0.0 if large else _SELF_GENERATED)
    return round(share * (recipe.calibration_tokens // recipe.sequence_length))


def spread_over(recipe: Recipe, context: int) -> int:
    """Positions that calibration sequences reach over in a model that is made for ``context``."""
    return min(context, recipe.reach)


def mixed(text: Passages, more_NT: Tensor, context: int, *, seed: int) -> Passages:
    """A text with more sequences among its own, all spread over ``context`` anew; ``seed`` draws their order."""
    tokens_NT = torch.cat([text.tokens_NT, more_NT.to(text.tokens_NT)])
    order = torch.randperm(len(tokens_NT), generator=torch.Generator().manual_seed(seed))
    return Passages.spread(tokens_NT[order], context, seed=seed)
