"""To multi-head latent attention."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from latentize.calibrate.self_generated import self_generated
from latentize.calibrate.tokenizer import load_tokenizer
from latentize.checkpoint import Journal
from latentize.convert.allocate import allocate
from latentize.convert.descent import Schedule
from latentize.convert.pipeline import Converted, Effort, convert_latent
from latentize.convert.polish import Polish
from latentize.convert.progress import Progress
from latentize.convert.refine import Refinement
from latentize.convert.search import choose, choose_by_layers
from latentize.convert.settings import Setting, settings
from latentize.convert.source import SourceModel
from latentize.errors import FormatError
from latentize.families import ModelSpec
from latentize.families.model import FULL
from latentize.footprint import Footprint, latent_footprint
from latentize.formats.deepseek_v3 import DeepseekWriter, portable_reasons
from latentize.formats.native import NativeWriter
from latentize.jobs.job import Job
from latentize.jobs.text import Text, mixed, spread_over
from latentize.recipe import Recipe
from latentize.runtime.load import load_model
from latentize.spec import mean_over_layers

if TYPE_CHECKING:
    from latentize.formats.base import FormatWriter

__all__ = ["LatentJob"]

_How = TypeVar("_How", bound=Schedule)

# Share of the calibration text that a small model writes itself: with a quarter less of a user's text nothing is lost
# on text of its kind, and on other text two thirds of the loss are gone.
_SELF_GENERATED = 0.25
# Steps of refinement where the layers are polished together afterwards, which is then the better use of the time.
_BEFORE_POLISH = 140
# Multiplications and additions of refining all layers, and of a polish, unless rounds of the text are more: each is
# then about five minutes on two cores.
_FLOP = 2e13
_REFINED_ROUNDS, _POLISHED_ROUNDS = 1.0, 0.5
# Rounds of refinement at most: more of them on a short text learn it by heart. A polish keeps the best that it saw.
_MOST_ROUNDS = 10


class LatentJob(Job):
    """To multi-head latent attention."""

    def choose_kind(self) -> type[FormatWriter]:
        allowed = settings(self.recipe, self.spec.attention)
        kind, self.candidates, notes = _format(self.recipe, self.spec, allowed)
        self.notes += notes
        return kind

    @property
    def one_by_one(self) -> bool:
        """Whether every layer may be sized for itself."""
        return issubclass(self.kind, NativeWriter) and self.recipe.method == "calibrated"

    def footprint(self, source: SourceModel) -> Footprint:
        return latent_footprint(
            self.spec,
            self.checkpoint,
            self.recipe,
            self.candidates,
            _effort(self.recipe, source),
            one_by_one=self.one_by_one,
            item=self.dtype.itemsize,
            narrow=source.autocast,
        )

    def convert(self, source: SourceModel, text: Text, journal: Journal, progress: Progress) -> Converted:
        effort = _effort(self.recipe, source)
        if self.self_generated:
            text = self._with_its_own(source, text, journal, progress)
        self.settings, self.scores = self._chosen(source, text, journal, progress)
        first = self.settings[0]
        if not isinstance(self.writer, NativeWriter):
            self.writer.rope_theta = first.rope_theta(self.spec.attention)
        self.notes += first.approximations(self.spec.attention)
        if self.spec.kinds:
            kept, kinds = self.spec.layers - len(self.spec.converted), dict.fromkeys(self.spec.kinds)
            named = ", ".join(f"'{kind}'" for kind in kinds if kind != FULL)
            self.notes.append(
                f"{kept} of {self.spec.layers} layers stay as they are ({named}); cached values are those of the others"
            )
        texts = (text.calibration, text.selection, text.evaluation)
        return convert_latent(source, self.settings, self.writer, *texts, effort, progress, journal)

    def sequences_to_generate(self, source: SourceModel) -> int:
        share = self.recipe.self_generated
        if share is None:
            # The whole model has to be in memory for it.
            share = _SELF_GENERATED if self.recipe.refines and not source.large else 0.0
        return round(share * (self.recipe.calibration_tokens // self.recipe.sequence_length))

    def _with_its_own(self, source: SourceModel, text: Text, journal: Journal, progress: Progress) -> Text:
        """The text, with sequences of the model's own, written now or before an interruption."""
        written = journal.facts("self-generated text")
        if written is None:
            trust = {"trust_remote_code": self.trust_remote_code}
            dtype = torch.bfloat16 if source.fast_matmul else torch.float32
            own_NT = self_generated(
                load_model(self.checkpoint.path, dtype=dtype, device=source.device, **trust),
                load_tokenizer(self.checkpoint.path, **trust),
                sequences=self.self_generated,
                length=self.recipe.sequence_length,
                seed=self.recipe.seed,
                progress=lambda done, total: progress("writing text", done, total),
            )
            journal.note("self-generated text", own_NT.tolist())
        else:
            own_NT = torch.tensor(written)
        context = spread_over(self.recipe, self.spec.max_positions)
        return replace(text, calibration=mixed(text.calibration, own_NT, context, seed=self.recipe.seed))

    def _chosen(
        self, source: SourceModel, text: Text, journal: Journal, progress: Progress
    ) -> tuple[list[Setting], list[dict[str, Any]]]:
        """What :meth:`choose` finds, now or before an interruption."""
        found = journal.facts("settings")
        if found is None:
            chosen, scores = self.choose(source, text, progress)
            journal.note("settings", {"layers": [asdict(setting) for setting in chosen], "scores": scores})
            return chosen, scores
        return [Setting(**entries) for entries in found["layers"]], found["scores"]

    def choose(self, source: SourceModel, text: Text, progress: Progress) -> tuple[list[Setting], list[dict[str, Any]]]:
        """A setting for each layer, and what was compared; sizes of their own where the format holds them and nobody
        has fixed them."""
        texts = (text.calibration, text.selection)
        if self.one_by_one and self.recipe.sizes is None and len(self.spec.converted) > 1:
            sized, prices = allocate(source, self.candidates, *texts, self.recipe.refines, progress)
            by_layer = dict(zip(self.spec.converted, sized, strict=True))
            # Layers that stay have an entry that nothing reads.
            chosen = [by_layer.get(layer, sized[0]) for layer in range(self.spec.layers)]
            found = zip(self.spec.converted, prices, strict=True)
            return chosen, [{"layer": layer, "selection_kl_by_rank": priced} for layer, priced in found]
        if self.recipe.method == "calibrated":
            best, scores = choose_by_layers(source, self.candidates, *texts, self.recipe.refines, progress)
        else:
            best, scores = choose(source, self.candidates, *texts, progress)
        return [best] * self.spec.layers, [{**s.describe(), "selection_kl": kl} for s, kl in scores]

    def shape(self) -> dict[str, Any]:
        settings = [self.settings[layer] for layer in self.spec.converted]
        described = [setting.describe() for setting in settings]
        common = {k: v for k, v in described[0].items() if all(d.get(k) == v for d in described)}
        values = mean_over_layers([setting.cache_values for setting in settings])
        return {
            "method": self.recipe.method,
            "setting": common,
            "kv_lora_rank": mean_over_layers([setting.kv_lora_rank for setting in settings]),
            "qk_rope_head_dim": mean_over_layers([setting.qk_rope_head_dim for setting in settings]),
            "rope_theta": self.writer.rope_theta,
            "cache_values_per_token_layer": values,
            "keep": values / self.spec.cache_values,
        }

    def layer_shapes(self) -> list[dict[str, Any]]:
        sizes = ("kv_lora_rank", "qk_rope_head_dim")
        made = [{size: getattr(setting, size) for size in sizes} for setting in self.settings]
        return [
            {"kept": self.spec.kind(layer)} if self.spec.layer_attention(layer) is None else entries
            for layer, entries in enumerate(made)
        ]


def _format(
    recipe: Recipe, spec: ModelSpec, candidates: list[Setting]
) -> tuple[type[FormatWriter], list[Setting], list[str]]:
    """The writer, the settings that it can hold, and why not the portable one if it was not asked for."""
    # The native format chooses from the source's own frequencies, and keeps biases.
    free = [s for s in candidates if s.method != "calibrated" or s.on_source_frequencies(spec.attention)]
    if recipe.format == "native":
        return NativeWriter, free, []
    portable = [setting for setting in candidates if not portable_reasons(spec, setting)]
    if portable:
        return DeepseekWriter, portable, []
    ladders = [setting for setting in candidates if setting.stride is not None]
    reasons = portable_reasons(spec, (ladders or candidates)[-1])
    if recipe.format == "deepseek_v3":
        raise FormatError(
            "the deepseek_v3 format cannot hold this: " + "; ".join(reasons),
            where="--format deepseek_v3",
            fix="use --format native (or auto)",
        )
    return NativeWriter, free, [f"native format, because {reason}" for reason in reasons]


def _effort(recipe: Recipe, source: SourceModel) -> Effort:
    """What is done beyond the closed form. The order of the sequences follows from the seed."""
    if not recipe.refines:
        return Effort()
    # The whole model has to be in memory for it, and moves at every step.
    polish = not source.large if recipe.polish is None else recipe.polish
    length = recipe.sequence_length
    refinement = Refinement(seed=recipe.seed)
    a, checkpoint = source.spec.attention, source.checkpoint
    attention = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim * a.hidden_size * len(source.spec.converted)
    refinement = (replace(refinement, steps=_BEFORE_POLISH) if polish else refinement).suited(length)
    most = max(1, _MOST_ROUNDS * recipe.calibration_tokens // refinement.tokens)
    refinement = _affordable(replace(refinement, steps=min(refinement.steps, most)), recipe, attention, _REFINED_ROUNDS)
    if not polish:
        return Effort(refinement)
    whole = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    return Effort(refinement, _affordable(Polish(seed=recipe.seed).suited(length), recipe, whole, _POLISHED_ROUNDS))


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
