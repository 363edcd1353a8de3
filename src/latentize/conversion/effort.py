"""How much training a conversion is worth: counted work, so that models of any width take as long."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

from latentize.conversion.coding import Coding, Suiting
from latentize.conversion.footprint import graph_bytes
from latentize.conversion.pipeline import Effort
from latentize.families import ModelSpec
from latentize.methods.even import CACHES
from latentize.modeling.precision import Precision
from latentize.recipe import Recipe
from latentize.training.descent import Schedule
from latentize.training.polish import Polish
from latentize.training.refine import Refinement

__all__ = ["effort_of"]

_How = TypeVar("_How", bound=Schedule)

# Multiplications and additions of refining all layers, and of a polish, unless rounds of the text are more. Rounds are
# of the user's text. On a real model the second of refinement takes a fifth off the divergence, the third a tenth, the
# fourth a twentieth.
_FLOP = 2e13
_REFINED_ROUNDS, _POLISHED_ROUNDS, _CODED_ROUNDS = 4.0, 0.5, 1.0
# Parameters of a model up to which a polish takes whole steps; those of larger ones are smaller in proportion, for the
# more parameters learn from a step's tokens, the more of its gradient is noise. Chosen at 5 and at 135 million.
_WHOLE_STEPS = 7e6
# What a backward pass through the whole model may keep at once, unless it is a single sequence.
_GRAPH_BYTES = 3 << 28
# Rounds of refinement at most: more of them on a short text learn it by heart. A polish keeps the best that it saw.
_MOST_ROUNDS = 10


def effort_of(recipe: Recipe, spec: ModelSpec, *, large: bool) -> Effort:
    """What is done beyond the closed form. The order of the sequences follows from the seed.

    Args:
        recipe: What is to be done.
        spec: The source.
        large: Whether the model is too big to be trained as a whole without being asked to.
    """
    coding = None if recipe.bytes is None else Coding(recipe.bytes, recipe.bytes_context, recipe.seed)
    suiting = None if recipe.cache_for is None else Suiting(CACHES[recipe.cache_for], recipe.seed)
    if not recipe.refines:
        return Effort(coding=coding, suiting=suiting)
    # The whole model has to be in memory for it, and moves at every step.
    polish = not large if recipe.polish is None else recipe.polish
    length = recipe.sequence_length
    refinement = Refinement(seed=recipe.seed).suited(length)
    a = spec.attention
    attention = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim * a.hidden_size * len(spec.converted)
    most = max(1, _MOST_ROUNDS * recipe.calibration_tokens // refinement.tokens)
    refinement = _affordable(replace(refinement, steps=min(refinement.steps, most)), recipe, attention, _REFINED_ROUNDS)
    if not polish:
        return Effort(refinement, coding=coding, suiting=suiting)
    whole = sum(map(math.prod, spec.tensor_shapes().values()))
    at_once = max(1, _GRAPH_BYTES // graph_bytes(spec, Precision()))
    how = Polish(seed=recipe.seed, at_once=at_once).suited(length)
    how = replace(how, rate=how.rate * min(1.0, _WHOLE_STEPS / whole))
    # Where nothing is left out there is nothing to refine, and its time is the polish's.
    rounds = _CODED_ROUNDS if recipe.whole else _POLISHED_ROUNDS
    return Effort(None if recipe.whole else refinement, _affordable(how, recipe, whole, rounds), coding, suiting)


def _affordable(how: _How, recipe: Recipe, parameters: int, rounds: float) -> _How:
    """As many steps as their work allows, and at least so many rounds of the text.

    Args:
        how: Most steps.
        recipe: Says how much text there is.
        parameters: That each token is multiplied with.
        rounds: Of the text.
    """
    # Forward, backward, and the gradient of the weights: multiplications and additions of a token.
    a_step = 6 * how.tokens * parameters
    least = math.ceil(rounds * recipe.calibration_tokens / how.tokens)
    return replace(how, steps=min(how.steps, max(least, round(_FLOP / a_step))))
