"""Lower the rank of every layer of a model that has latent attention: statistics, closed form, refinement.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latentize.checkpoint import Journal
from latentize.conversion.measured import CLOSED, Converted, MadeLayer, write_and_measure
from latentize.families.model import FULL
from latentize.formats.base import FormatWriter
from latentize.formats.layer import ConvertedLayer
from latentize.methods.lower_rank import LatentMoments, Lowered, lower
from latentize.modeling.latent_source import ATTENTION, LatentSource, LatentSourceLayer
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.precision import Use
from latentize.progress import Progress, silent
from latentize.text.tokens import Passages
from latentize.training.descent import WHOLE, Heads
from latentize.training.refine import Refinement, descend
from latentize.training.relative import stream_error, token_energy

__all__ = ["lower_model"]

_DOWN, _NORM, _UP = "kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight"
# What is trained beside the two projections of the latent.
_OUT = "o_proj.weight"
_AROUND = ("q_proj.weight", "q_b_proj.weight", _OUT)


@torch.no_grad()
def lower_model(
    source: LatentSource,
    rank: int,
    writer: FormatWriter,
    calibration: Passages,
    evaluation: Passages,
    refinement: Refinement | None = None,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Converted:
    """Lower the rank of every layer and write it.

    Args:
        source: The model.
        rank: The ``kv_lora_rank`` of the result; with the source's own every tensor stays as it is.
        writer: Saves layers.
        calibration: Tokens for statistics and refinement.
        evaluation: Tokens that the result is measured on.
        refinement: How layers are refined, or ``None``.
        progress: Told after each layer.
        journal: Keeps what took long.
    """
    facts: list[dict[str, Any]] = []
    layers = _lowered(source, _Lowering(source, rank, calibration, refinement, journal, facts))
    result = write_and_measure(source, layers, writer, evaluation, progress)
    changes = rank != source.latent.attention.kv_lora_rank
    result.calibration_tokens, result.facts = calibration.tokens_NT.numel() if changes else 0, facts
    return result


def _lowered(source: LatentSource, lowering: _Lowering) -> Iterator[MadeLayer]:
    """Every layer, and the text of the converted model through it once it is written."""
    for layer in source.layers():
        made = lowering.made(layer)
        yield made
        lowering.advance(layer, made.attention)
        made.let_go()


class _Lowering:
    """Makes the layers, in order."""

    def __init__(
        self,
        source: LatentSource,
        rank: int,
        calibration: Passages,
        refinement: Refinement | None,
        journal: Journal | None,
        facts: list[dict[str, Any]],
    ) -> None:
        self.rank, self.refinement, self.journal, self.facts = rank, refinement, journal, facts
        self.model = source.latent
        self.changes = rank != source.latent.attention.kv_lora_rank
        self.own: Stream | None = source.embed(calibration) if self.changes else None
        # What the converted layers before make of the text, which is what a layer will see.
        self.draft = None if self.own is None or refinement is None else self.own.clone()

    def made(self, layer: LatentSourceLayer) -> MadeLayer:
        if not self.changes:
            self.facts.append({"energy_lost": 0.0, "norm_spread": 0.0, "linear_norm": None})
            return MadeLayer(layer, ConvertedLayer(layer.index, layer.tensors), self._own(layer))
        if self._own(layer) is None:
            assert self.own is not None
            layer.run(self.own, use=Use.STATISTICS if self.draft is None else Use.LEARNT)
            self.facts.append({})
            return MadeLayer(layer, ConvertedLayer(layer.index, layer.tensors), None)
        inherited = 0.0 if self.draft is None or self.own is None else stream_error(self.draft, self.own)
        closed, residual_NTD = self._closed(layer)
        self.facts.append(closed.describe())
        stages: dict[str, nn.Module] = {}
        tensors = closed.tensors
        if self.draft is not None:
            assert residual_NTD is not None
            stages[CLOSED] = layer.with_tensors(tensors)
            tensors = self._refined(layer, tensors, residual_NTD, inherited)
        stored = {name: layer.tensors[ATTENTION + name].dtype for name in tensors}
        saved = {name: tensor.to(stored[name]) for name, tensor in tensors.items()}
        made = ConvertedLayer(layer.index, layer.tensors, lowered=saved)
        return MadeLayer(layer, made, layer.with_tensors(saved), stages)

    def _own(self, layer: LatentSourceLayer) -> Any:
        """A layer's latent attention; ``None`` where it has none, and stays as it is."""
        return layer.attention if self.model.kind_of(layer.index) == FULL else None

    def advance(self, layer: SourceLayer, attention: nn.Module | None) -> None:
        if self.draft is not None:
            layer.run(self.draft, attention, use=Use.LEARNT)

    def _closed(self, layer: LatentSourceLayer) -> tuple[Lowered, Tensor | None]:
        """The closed form, and the residual stream after the source's attention; advances the source's stream."""
        assert self.own is not None
        attention = layer.attention
        seen = LatentMoments(attention.kv_a_layernorm.variance_epsilon)
        residual_NTD = None if self.draft is None else torch.empty_like(self.own.hidden_NTD)
        for part in layer.observe(self.own, Use.STATISTICS if self.draft is None else Use.LEARNT):
            seen.add(part.y_BTr.flatten(0, 1), part.q_BTHN.flatten(0, 1))
            if residual_NTD is not None:
                residual_NTD[part.rows] = part.residual_BTD
        return lower(attention.state_dict(), seen, self.rank, scale=float(attention.scaling)), residual_NTD

    def _refined(
        self, layer: LatentSourceLayer, start: dict[str, Tensor], residual_NTD: Tensor, inherited: float
    ) -> dict[str, Tensor]:
        """The layer after a few steps, now or before an interruption."""
        step = f"layer {layer.index}"
        if self.journal is not None and (found := self.journal.tensors(step)) is not None:
            return found[0]
        assert self.draft is not None and self.refinement is not None
        made = _refine(layer, start, self.draft, residual_NTD, self.refinement, inherited)
        if self.journal is not None:
            self.journal.keep(step, made, {})
        return made


def _refine(
    layer: LatentSourceLayer,
    start: dict[str, Tensor],
    text: Stream,
    residual_NTD: Tensor,
    how: Refinement,
    inherited: float,
) -> dict[str, Tensor]:
    """Train projections of the latent, of queries and of the output on what the attention should add to the stream.

    The roped key's rows, norms and compressed queries stay.
    """
    attention = layer.with_tensors(start)
    source, rank = attention.state_dict(), len(start[_NORM])
    down, rope = start[_DOWN][:rank], start[_DOWN][rank:]
    around = [name for name in _AROUND if name in source]
    trained = {_DOWN: down, _UP: start[_UP], **{name: source[name] for name in around}}
    # Rows of the roped key are of another scale: a step relative to the whole matrix would not suit the latent's.
    parameters = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in trained.items()}
    hidden_NTD, positions_NT = text.hidden_NTD, text.positions_NT

    def made(rows: Tensor) -> Tensor:
        whole = {**parameters, _DOWN: torch.cat([parameters[_DOWN], rope])}
        return layer.attend(attention, whole, layer.normalise(hidden_NTD[rows]), positions_NT[rows])

    target_NTD = residual_NTD - hidden_NTD
    energy_NT = token_energy(residual_NTD, hidden_NTD)
    several = {name: Heads(attention.num_heads, axis=int(name == _OUT)) for name in (_UP, *_AROUND)}
    heads = [several.get(name, WHOLE) for name in parameters]
    options = {"inherited": inherited, "autocast": layer.precision.narrow(Use.LEARNT), "heads": heads}
    before, after = descend(list(parameters.values()), made, target_NTD, energy_NT, how, **options)
    if not after < before:
        return start
    learnt = {name: parameter.detach() for name, parameter in parameters.items()}
    return {**start, **learnt, _DOWN: torch.cat([learnt[_DOWN], rope])}
