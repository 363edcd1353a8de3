"""Layers are written and measured as they are made, and no second model is ever in memory.

The evaluation text runs as the source, as what is saved, and as what it was on the way there. So the final loss and KL
are those of the whole converted model.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentize.evaluation.losses import Quality, compare_streams
from latentize.formats.base import FormatWriter
from latentize.formats.layer import ConvertedLayer
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.precision import Use
from latentize.modeling.source import SourceModel
from latentize.processes import ALONE, Team
from latentize.progress import Progress
from latentize.text.tokens import Passages
from latentize.training.relative import stream_error

__all__ = ["CLOSED", "LINEAR", "MASSIVE", "Converted", "MadeLayer", "Massive", "write_and_measure"]

# A token is called massive whose residual stream is so many times as large as the median token's.
MASSIVE = 20.0
# Names of what a layer was on its way.
CLOSED, LINEAR = "closed form", "linear fit"


class Massive(NamedTuple):
    """Tokens of the evaluation text whose residual stream is massive after a layer.

    Attributes:
        source: In the source.
        lost: In the source, and no longer in the converted model.
        made: In the converted model only.
    """

    source: int
    lost: int
    made: int

    @classmethod
    def of(cls, text: Stream, reference: Stream, team: Team = ALONE) -> Massive:
        """Of both models' hidden states, those of a team's texts together."""
        here_NT, there_NT = (_is_massive(stream.hidden_NTD, team) for stream in (text, reference))
        mine = (int(there_NT.sum()), int((there_NT & ~here_NT).sum()), int((here_NT & ~there_NT).sum()))
        return cls(*map(sum, zip(*team.gather(mine), strict=True)))


def _is_massive(hidden_NTD: Tensor, team: Team) -> Tensor:
    norm_NT = torch.stack([h_TD.norm(dim=-1) for h_TD in hidden_NTD])
    return norm_NT > MASSIVE * float(torch.cat(team.gather(norm_NT.cpu())).median())


@dataclass
class MadeLayer:
    """A converted layer.

    Attributes:
        source: What it was made from, until the next layer is asked for.
        converted: For the writer, which takes it.
        attention: As saved; ``None`` where the layer stays as it is.
        stages: What it was before, by name; the same names in every converted layer.
    """

    source: SourceLayer
    converted: ConvertedLayer | None
    attention: nn.Module | None
    stages: dict[str, nn.Module] = field(default_factory=dict)

    def taken(self) -> ConvertedLayer:
        """What is to be written. It is float64 and is not held any longer."""
        assert self.converted is not None
        converted, self.converted = self.converted, None
        return converted

    def let_go(self) -> None:
        """Hold nothing any longer, whoever still holds this."""
        self.attention, self.stages = None, {}


@dataclass
class Converted:
    """What a conversion measured.

    Attributes:
        quality: On the evaluation text, the source as reference.
        closed_form: The same before anything was refined, or ``None`` where nothing was.
        linear_fit: The same with the nearest linear projections and nothing compressed, or ``None`` where the
            source's are linear, or stay as they are.
        errors: For each layer the mean relative error of a token in the residual stream that leaves it, ``‖h -
            h_source‖² / max(‖h‖², ‖h_source‖²)``, on the evaluation text: in closed form, and as saved.
        massive: For each layer how many tokens are massive there.
        calibration_tokens: Tokens that statistics and refinement came from.
        facts: For each layer what a report shows of its closed form.
    """

    quality: Quality
    closed_form: Quality | None = None
    linear_fit: Quality | None = None
    errors: list[tuple[float, float]] = field(default_factory=list)
    massive: list[Massive] = field(default_factory=list)
    calibration_tokens: int = 0
    facts: list[dict[str, Any]] = field(default_factory=list)


@torch.no_grad()
def write_and_measure(
    source: SourceModel,
    layers: Iterable[MadeLayer],
    writer: FormatWriter,
    evaluation: Passages,
    progress: Progress,
    team: Team = ALONE,
) -> Converted:
    """Take layers as they are made, write each, and follow a text through all of them.

    Args:
        source: The model.
        layers: Its layers, converted, in order.
        writer: Saves them.
        evaluation: The text.
        progress: Told after each layer.
        team: Processes that make the same layers and share the text; the first one writes.

    Returns:
        The same to all of them.
    """
    if len(evaluation) < team.size:
        # Nobody is without any text: all measure all of it.
        sharing, mine = ALONE, evaluation
    else:
        sharing, mine = team, evaluation.part(team)
    reference = source.embed(mine)
    hidden, before = reference.clone(), {}
    found: list[tuple[tuple[float, float], Massive]] = []
    for made in layers:
        converted = made.taken()
        if team.leads:
            writer.layer(converted)
        del converted
        found.append(_followed(made, reference, hidden, before, sharing))
        progress("converting layers", len(found), source.spec.layers, _shown(*found[-1][0]))
    if team.leads:
        writer.no_more_layers()
    head, vocab = source.head(), source.spec.vocab_size
    streams = [stream.hidden_NTD for stream in (hidden, *before.values())]
    parts = sharing.gather(compare_streams(streams, reference.hidden_NTD, mine.tokens_NT, head, vocab_size=vocab))
    final, *others = (sum(some, Quality()) for some in zip(*parts, strict=True))
    earlier = dict(zip(before, others, strict=True))
    errors, massive = [error for error, _ in found], [tokens for _, tokens in found]
    return Converted(final, earlier.get(CLOSED), earlier.get(LINEAR), errors, massive)


def _followed(
    made: MadeLayer, reference: Stream, hidden: Stream, before: dict[str, Stream], team: Team
) -> tuple[tuple[float, float], Massive]:
    """What a layer does to the text: errors in closed form and as saved, and massive tokens."""
    layer = made.source
    for name in {**before, **made.stages}:
        if name not in before:
            before[name] = reference.clone()
        # Of the closed form nothing is said but how far off it was.
        layer.run(before[name], made.stages.get(name), Use.LEARNT if name == CLOSED else Use.MEASURED)
    layer.run(reference)
    layer.run(hidden, made.attention)
    after = stream_error(hidden, reference, team)
    error = stream_error(before[CLOSED], reference, team) if CLOSED in before else after
    return (error, after), Massive.of(hidden, reference, team)


def _shown(before: float, after: float) -> str:
    return f"error {after:.4f}" if before == after else f"error {before:.4f} → {after:.4f}"
