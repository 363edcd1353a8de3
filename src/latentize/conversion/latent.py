"""To multi-head latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from latentize.attention.coding import RowCode
from latentize.attention.spec import mean_over_layers
from latentize.checkpoint import Journal
from latentize.conversion.allocate import allocate
from latentize.conversion.effort import effort_of
from latentize.conversion.footprint import Footprint, latent_footprint
from latentize.conversion.job import Job
from latentize.conversion.measured import Converted
from latentize.conversion.pipeline import convert_latent
from latentize.conversion.search import choose, choose_by_layers
from latentize.conversion.self_generated import self_generated
from latentize.conversion.serving import fit, fitting_settings
from latentize.conversion.texts import Text, mixed, sequences_to_generate, spread_over
from latentize.conversion.work import Work, latent_work
from latentize.engines.contracts import contract
from latentize.errors import FormatError
from latentize.families import ModelSpec
from latentize.families.model import FULL
from latentize.formats.deepseek_v2 import DeepseekV2Writer
from latentize.formats.deepseek_v3 import DeepseekWriter
from latentize.formats.native import NativeWriter
from latentize.formats.portable import PORTABLE, expert_reasons, portable_reasons
from latentize.machine import give_back_freed_memory
from latentize.methods.method import budget_of
from latentize.methods.registry import settings
from latentize.methods.setting import Setting
from latentize.modeling.load import load_model
from latentize.modeling.source import SourceModel
from latentize.progress import Progress
from latentize.recipe import Recipe
from latentize.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from latentize.formats.base import FormatWriter, LatentWriter

__all__ = ["LatentJob", "format_of", "sized_one_by_one"]


class LatentJob(Job):
    """To multi-head latent attention."""

    writer: LatentWriter
    shares = True

    def choose_kind(self) -> type[FormatWriter]:
        choices = settings if self.recipe.serve_on is None else fitting_settings
        allowed = choices(self.recipe, self.spec.attention)
        kind, self.candidates, notes = format_of(self.recipe, self.spec, allowed)
        self.notes += notes
        return kind

    @property
    def one_by_one(self) -> bool:
        """Whether every layer may be sized for itself."""
        return sized_one_by_one(self.kind, self.recipe)

    def other_ways(self) -> list[str]:
        return [*super().other_ways(), "another --method"]

    def footprint(self, source: SourceModel) -> Footprint:
        return latent_footprint(
            self.spec,
            self.checkpoint,
            self.recipe,
            self.candidates,
            effort_of(self.recipe, self.spec, large=source.large),
            written=self.sequences_to_generate(source) * self.recipe.sequence_length,
            one_by_one=self.one_by_one,
            item=self.dtype.itemsize,
            precision=source.precision,
        )

    def work(self, source: SourceModel) -> Mapping[str, Work]:
        return latent_work(
            self.spec,
            self.recipe,
            self.candidates,
            effort_of(self.recipe, self.spec, large=source.large),
            written=self.self_generated * self.recipe.sequence_length,
            one_by_one=self.one_by_one,
            precision=source.precision,
            processes=self.team.size,
        )

    def convert(self, source: SourceModel, text: Text, journal: Journal | None, progress: Progress) -> Converted:
        effort = effort_of(self.recipe, self.spec, large=source.large)
        if self.self_generated:
            text = self._with_its_own(source, text, journal, progress)
            # A cache and a search hold memory in other sizes than streams of text, which find no room between.
            give_back_freed_memory()
        self.settings, self.scores = self._chosen(source, text, journal, progress)
        give_back_freed_memory()
        self.writer.suited = self.recipe.cache_for is not None
        first = self.settings[0]
        if self.recipe.serve_on is not None:
            served = fit(self.recipe, self.spec.attention, first.kv_lora_rank, first.qk_rope_head_dim)
            budget = None if self.recipe.sizes else budget_of(self.recipe, self.spec.attention)
            self.notes += served.notes(budget)
            if served.zeros:
                self.writer.padded = served.padded
        if not isinstance(self.writer, NativeWriter):
            self.writer.rope_theta = first.rope_theta(self.spec.attention)
        self.notes += first.approximations(self.spec.attention)
        if self.spec.kinds:
            kept, kinds = self.spec.layers - len(self.spec.converted), dict.fromkeys(self.spec.kinds)
            named = ", ".join(f"'{kind}'" for kind in kinds if kind != FULL)
            self.notes.append(
                f"{kept} of {self.spec.layers} layers stay as they are ({named}); cached values are those of the others"
            )
        texts = (text.calibration, text.polishing, text.evaluation)
        return convert_latent(source, self.settings, self.writer, *texts, effort, progress, journal, self.team)

    def sequences_to_generate(self, source: SourceModel) -> int:
        return sequences_to_generate(self.recipe, large=source.large)

    def _with_its_own(self, source: SourceModel, text: Text, journal: Journal | None, progress: Progress) -> Text:
        """The text, with sequences of the model's own, written now or before an interruption, by the first process."""
        written = None if journal is None else journal.facts("self-generated text")
        if written is None and self.team.leads:
            trust: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
            dtype = torch.bfloat16 if source.precision.faster else torch.float32
            own_NT = self_generated(
                load_model(self.checkpoint.path, dtype=dtype, device=source.device, **trust),
                load_tokenizer(self.checkpoint.path, **trust),
                sequences=self.self_generated,
                length=self.recipe.sequence_length,
                seed=self.recipe.seed,
                progress=lambda done, total: progress("writing text", done, total),
            )
            written = own_NT.tolist()
            if journal is not None:
                journal.note("self-generated text", written)
        own_NT = torch.tensor(self.team.told(written))
        context = spread_over(self.recipe, self.spec.usual_positions)
        return replace(text, calibration=mixed(text.calibration, own_NT, context, seed=self.recipe.seed))

    def _chosen(
        self, source: SourceModel, text: Text, journal: Journal | None, progress: Progress
    ) -> tuple[list[Setting], list[dict[str, Any]]]:
        """What :meth:`choose` finds, now or before an interruption."""
        found = self.team.told(None if journal is None else journal.facts("settings"))
        if found is None:
            chosen, scores = self.team.told(self.choose(source, text, progress))
            if journal is None:
                return chosen, scores
            journal.note("settings", {"layers": [asdict(setting) for setting in chosen], "scores": scores})
            return chosen, scores
        return [Setting(**entries) for entries in found["layers"]], found["scores"]

    def choose(self, source: SourceModel, text: Text, progress: Progress) -> tuple[list[Setting], list[dict[str, Any]]]:
        """A setting for each layer, and what was compared; sizes of their own where the format holds them and nobody
        has fixed them."""
        texts = (text.calibration, text.selection)
        if self.recipe.whole:
            return self.candidates * self.spec.layers, []
        if self.one_by_one and self.recipe.sizes is None and len(self.spec.converted) > 1:
            sized, prices = allocate(source, self.candidates, *texts, self.recipe.refines, progress, self.team)
            by_layer = dict(zip(self.spec.converted, sized, strict=True))
            # Layers that stay have an entry that nothing reads.
            chosen = [by_layer.get(layer, sized[0]) for layer in range(self.spec.layers)]
            found = zip(self.spec.converted, prices, strict=True)
            return chosen, [{"layer": layer, "selection_kl_by_rank": priced} for layer, priced in found]
        if self.recipe.calibrates:
            found = choose_by_layers(source, self.candidates, *texts, self.recipe.refines, progress, self.team)
            best, scores = found
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
            **self._bytes(values),
            **({} if self.recipe.cache_for is None else {"cache_for": self.recipe.cache_for}),
        }

    @property
    def _row_codes(self) -> dict[int, RowCode]:
        return self.writer.row_codes if isinstance(self.writer, NativeWriter) else {}

    def _bytes(self, values: float) -> dict[str, Any]:
        """What coded rows take, on average over layers, and as a share of the source's in 16 bits."""
        if not self._row_codes:
            return {}
        context, codes = self.recipe.bytes_context, self._row_codes.values()
        row = mean_over_layers([code.row_bytes for code in codes])
        exact = mean_over_layers([code.sinks + code.newest for code in codes])
        total = row * (context - exact) + 2 * values * exact
        return {
            "row_bytes_per_token_layer": row,
            "bytes": total / (2 * self.spec.cache_values * context),
            "bytes_context": context,
        }

    def layer_shapes(self) -> list[dict[str, Any]]:
        sizes = ("kv_lora_rank", "qk_rope_head_dim")
        made: list[dict[str, Any]] = [{size: getattr(setting, size) for size in sizes} for setting in self.settings]
        for entries, setting in zip(made, self.settings, strict=True):
            # One is what all but exact conversions and mha2mla have.
            entries |= {"roped_keys": setting.rope_heads} if setting.rope_heads > 1 else {}
            entries |= {"key_scales": setting.key_scales} if setting.key_scales else {}
        for layer, code in self._row_codes.items():
            made[layer] |= {"row_bytes": code.row_bytes, **code.describe()}
        return [
            {"kept": self.spec.kind(layer)} if self.spec.layer_attention(layer) is None else entries
            for layer, entries in enumerate(made)
        ]


def sized_one_by_one(kind: type[FormatWriter], recipe: Recipe) -> bool:
    """Whether every layer may be sized for itself."""
    return issubclass(kind, NativeWriter) and recipe.calibrates


def format_of(
    recipe: Recipe, spec: ModelSpec, candidates: list[Setting]
) -> tuple[type[FormatWriter], list[Setting], list[str]]:
    """The writer, the settings that it can hold, and why not the portable one if it was not asked for."""
    # The native format chooses from the source's own frequencies, and keeps biases.
    free = [s for s in candidates if s.on_source_frequencies(spec.attention)]
    # Norms are fitted only where they cannot be kept.
    free = [s for s in free if s.key_scales] or free
    if recipe.format == "native":
        return NativeWriter, free, []
    if recipe.bytes is not None:
        return NativeWriter, free, ["native format, because values have bits of their own"]
    layout = _layout(recipe, spec)
    portable = [setting for setting in candidates if not portable_reasons(spec, setting, layout)]
    if portable:
        return (DeepseekWriter if layout == "deepseek_v3" else DeepseekV2Writer), portable, []
    ladders = [setting for setting in candidates if setting.stride is not None]
    reasons = portable_reasons(spec, (ladders or candidates)[-1], layout)
    options = {f"--for {recipe.serve_on}": recipe.serve_on, f"--cache-for {recipe.cache_for}": recipe.block > 1}
    asked = next((option for option, given in options.items() if given), None)
    if recipe.format in PORTABLE or asked is not None:
        others = {"deepseek_v2", "deepseek_v3"} - {layout}
        other = next(
            (o for o in others if any(not portable_reasons(spec, s, o) for s in candidates)), "native (or auto)"
        )
        raise FormatError(
            f"the {layout} format cannot hold this: " + "; ".join(reasons),
            where=asked or f"--format {recipe.format}",
            fix="leave it out: engines take no other" if asked else f"use --format {other}",
        )
    return NativeWriter, free, [f"native format, because {reason}" for reason in reasons]


def _layout(recipe: Recipe, spec: ModelSpec) -> str:
    """DeepSeek-V2's has experts that are chosen by softmax, where it is asked for or the engine computes them."""
    if recipe.format != "auto":
        return recipe.format
    engine = "llama.cpp" if recipe.block > 1 else (recipe.serve_on or "").partition("@")[0]
    softmax = bool(engine) and "softmax" in contract(engine).experts and not expert_reasons(spec, "deepseek_v2")
    return "deepseek_v2" if softmax else "deepseek_v3"
