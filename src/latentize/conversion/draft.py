"""A converted model in the making: what a layer of the source does, and what it becomes.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentize.attention.latent import LatentWeights
from latentize.checkpoint import Journal
from latentize.conversion.kept import Made, cached
from latentize.methods.closed_form import Conversion, conversion
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats, Needed, gather
from latentize.modeling.attention import LatentAttention
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.precision import Use
from latentize.processes import ALONE, Team
from latentize.training.refine import Refined, Refinement, expand_heads, refine
from latentize.training.relative import stream_error, token_energy

__all__ = [
    "DISTANCE_TOKENS",
    "START_TOKENS",
    "Draft",
    "DraftedLayer",
    "Observed",
    "alone",
    "is_exact",
    "naming_layer",
    "observe",
    "refined_layer",
]

# Tokens that attended distances are gathered on; they settle early, and cost more than everything else.
DISTANCE_TOKENS = 16_384
# Tokens that statistics are gathered on where their closed form is only a start, or exact in any case.
START_TOKENS = 32_768
# Tokens that tell whether a layer is exact, and the relative error of a token that float32 may leave of what is.
EXACT_TOKENS, _ROUNDING = 2048, 1e-10


@dataclass
class Observed:
    """One layer of the source, as the calibration text saw it.

    Attributes:
        stats: Statistics of the attention's inputs.
        residual_NTD: The residual stream after the attention, of as many sequences as were asked for.
    """

    stats: CalibrationStats
    residual_NTD: Tensor | None = None


class DraftedLayer(NamedTuple):
    """A converted layer.

    Attributes:
        closed: In closed form.
        refined: The weights after refinement; the same where nothing is refined.
        summary: What refinement did, for people.
    """

    closed: Conversion
    refined: LatentWeights
    summary: str = ""


@contextmanager
def naming_layer(index: int) -> Iterator[None]:
    """Say in which layer arithmetic has left the range of numbers.

    Raises:
        ArithmeticError: it has.
    """
    try:
        yield
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ArithmeticError(f"layer {index}: {error}") from error


def observe(
    layer: SourceLayer, text: Stream, needed: Needed, *, residual: int = 0, exact: bool = False, team: Team = ALONE
) -> Observed:
    """Advance the source's calibration stream through a layer that will be converted.

    Args:
        layer: The layer.
        text: Hidden states that enter it; in place.
        needed: Which statistics to gather.
        residual: Of how many sequences, the first ones, the residual stream after the attention is kept.
        exact: Whether the closed form is, whatever its statistics are.
        team: Processes that each have a share of the text; statistics are those of all of it.
    """
    assert layer.weights is not None and layer.spec is not None
    kept = torch.empty_like(text.hidden_NTD[:residual]) if residual else None
    jumps, reach = team.most(float(text.jumps())) > 0, int(team.most(text.reach))
    total: CalibrationStats | None = None
    # What is refined does not need the last digits of where it starts, nor does what is exact.
    rough = exact or residual > 0
    for rows, x_BTD, after_BTD in layer.stream(text, use=Use.LEARNT if rough else Use.STATISTICS):
        count = 0 if total is None else team.size * total.tokens
        if count < START_TOKENS or not rough:
            wanted = replace(needed, distances=needed.distances and count < DISTANCE_TOKENS)
            part = gather(x_BTD, layer.weights, layer.spec, wanted, text.positions_NT[rows] if jumps else None, reach)
            total = part if total is None else total + part
        if kept is not None and rows.start < residual:
            kept[rows] = after_BTD[: residual - rows.start]
    assert total is not None
    return Observed(total.over(team), kept)


def is_exact(layer: SourceLayer, text: Stream, w: LatentWeights, team: Team = ALONE) -> bool:
    """Whether a layer makes of a text what the source's makes of it, but for the rounding of float32.

    Errors that were measured on text in bfloat16 do not tell: what is exact has up to 4e-5 there.

    Args:
        layer: The source's.
        text: What enters it; a little of it is looked at.
        w: Its attention, converted.
        team: Processes that each have a text.
    """
    sample = text[: max(1, EXACT_TOKENS // text.length)]
    made, own = sample.clone(), sample.clone()
    layer.run(made, LatentAttention.from_weights(w.to(torch.float32)))
    layer.run(own)
    return stream_error(made, own, team) < _ROUNDING


def refined_layer(
    layer: SourceLayer,
    text: Stream,
    observed: Observed,
    start: LatentWeights,
    how: Refinement,
    inherited: float = 0.0,
    team: Team = ALONE,
) -> Refined:
    """A layer, refined on a text.

    Args:
        layer: The source's.
        text: The calibration text as it enters the layer: what the converted layers before it have made.
        observed: What the source's layer does with the same text, the residual stream too.
        start: The closed form.
        how: Steps and rates.
        inherited: Relative error of the text as it enters the layer.
        team: Processes that each have a share of the text; ``how`` is each one's share.
    """
    hidden_NTD, residual_NTD = text.hidden_NTD, observed.residual_NTD
    assert residual_NTD is not None
    return refine(
        expand_heads(start),
        lambda rows: layer.normalise(hidden_NTD[rows]),
        residual_NTD - hidden_NTD,
        token_energy(residual_NTD, hidden_NTD),
        how,
        inherited=inherited,
        positions_NT=text.positions_NT,
        autocast=layer.precision.narrow(Use.LEARNT),
        added=layer.added,
        factor=layer.added_factor,
        team=team,
    )


def alone(layer: SourceLayer, text: Stream, observed: Observed, setting: Setting, how: Refinement) -> Refined:
    """A layer converted with a setting, in a model that is otherwise the source's.

    Args:
        layer: The source's.
        text: The calibration text as it enters the layer in the source.
        observed: What the layer does with it, the residual stream too.
        setting: What to try.
        how: Steps and rates; no steps for the closed form.

    Returns:
        What became of it. An error that is not a number is infinite: what overflows is worse than all that does not.
    """
    assert layer.weights is not None and layer.spec is not None
    with naming_layer(layer.index):
        closed = conversion(layer.weights, layer.spec, observed.stats, setting)
        found = refined_layer(layer, text, observed, closed.weights, how)
    return found._replace(after=found.after if found.after == found.after else math.inf)


class Draft:
    """A converted model in the making.

    Args:
        refinement: How they are refined, or ``None``.
        text: The calibration text as it enters the first layer; copied.
        team: Processes that each have a share of the text; ``refinement`` is each one's share.
    """

    def __init__(self, refinement: Refinement | None, text: Stream, team: Team = ALONE) -> None:
        self.refinement, self._team = refinement, team
        self.text = text.clone()
        # Whether all layers so far make what the source's make: steps would only follow rounding.
        self._exact = True

    def convert(
        self,
        layer: SourceLayer,
        observed: Observed,
        setting: Setting,
        journal: Journal | None = None,
        inherited: float = 0.0,
    ) -> DraftedLayer:
        """The layer in closed form, and refined.

        Args:
            layer: The source's.
            observed: What it does with the calibration text.
            setting: What it becomes.
            journal: Has what is refined from before an interruption, and keeps it.
            inherited: Relative error of the text as it enters the layer.
        """
        assert layer.weights is not None and layer.spec is not None
        with naming_layer(layer.index):
            closed = conversion(layer.weights, layer.spec, observed.stats, setting)
        if self.refinement is None:
            return DraftedLayer(closed, closed.weights)
        self._exact = self._exact and is_exact(layer, self.text, closed.weights, self._team)
        how = replace(self.refinement, steps=0) if self._exact else self.refinement

        def make() -> Made:
            found = refined_layer(layer, self.text, observed, closed.weights, how, inherited, self._team)
            return [found.weights], f"error {found.before:.4f} → {found.after:.4f}"

        with naming_layer(layer.index):
            place = str(self.text.hidden_NTD.device)
            (refined,), summary = cached(journal, f"layer {layer.index}", make, self._team, place)
        return DraftedLayer(closed, refined, summary)

    def advance(self, layer: SourceLayer, attention: nn.Module | None) -> None:
        """Take the calibration text through the converted layer, or one that stays."""
        # It is learnt from in bfloat16 anyway; and how large latents get needs no last digits.
        layer.run(self.text, attention, use=Use.LEARNT)

    def latent_rms(self, layer: SourceLayer, w: LatentWeights) -> tuple[float, float]:
        """Largest and mean root mean square of a token's latent.

        Raises:
            ArithmeticError: they are not finite.
        """
        down_rD = w.kv_a_rD.float()
        parts = (layer.normalise(h_TD) @ down_rD.T for h_TD in self.text.hidden_NTD)
        squares = torch.cat([c_Tr.square().mean(-1) for c_Tr in parts])
        if not bool(squares.isfinite().all()):
            raise ArithmeticError(f"layer {layer.index}: a latent that is not finite")
        largest, mean = self._team.most(float(squares.max())), self._team.mean(float(squares.mean()))
        return largest**0.5, mean**0.5
