"""A lower rank for a model that has latent attention already, from checked input to finished folder."""

from __future__ import annotations

from typing import Any, cast

from latentize.checkpoint import Checkpoint, Journal
from latentize.conversion.job import Job
from latentize.conversion.lowering import lower_model
from latentize.conversion.measured import Converted
from latentize.conversion.texts import Text
from latentize.errors import FormatError, OptionError, UnsupportedModelError
from latentize.families import LatentModel, latent_model
from latentize.families.model import FULL
from latentize.formats.base import FormatWriter
from latentize.formats.lowered import LoweredWriter, predicts_further
from latentize.modeling.latent_source import LatentSource, check_latent
from latentize.modeling.source import SourceModel
from latentize.progress import Progress
from latentize.recipe import Recipe
from latentize.training.refine import Refinement

__all__ = ["LowerJob", "rank_of"]


def rank_of(recipe: Recipe, model: LatentModel) -> int:
    """The rank that a recipe asks for.

    Raises:
        UnsupportedModelError: it asks for something else than a lower rank.
        FormatError: it asks for another format.
        OptionError: no rank, or one that is not possible.
    """
    _refuse(recipe, model)
    full, rope = model.attention.kv_lora_rank, model.attention.qk_rope_head_dim
    sizes = recipe.sizes
    if sizes is not None and sizes[1] != rope:
        raise OptionError(
            f"the roped key of such a model stays as it is, {rope} values",
            code="LZ303",
            where="--qk-rope-head-dim",
            fix="leave it out",
        )
    rank = recipe.kv_lora_rank if sizes is None else sizes[0]
    if rank is not None:
        if rank > full:
            raise OptionError(
                f"the model has a rank of {full}, which cannot be raised to {rank}",
                code="LZ303",
                where="--kv-lora-rank",
                fix=f"give 1 to {full}",
            )
        return rank
    if recipe.keep is None:
        raise UnsupportedModelError(
            "the model has latent attention already",
            code="LZ203",
            where="config.json, model_type",
            fix="to lower its rank, give --keep or --kv-lora-rank",
        )
    rank = model.rank_within(recipe.keep)
    if rank < 1:
        raise OptionError(
            f"{recipe.keep:.4g} of {model.cache_values} cached values is no more than the roped key, which stays",
            code="LZ304",
            where="--keep",
            fix=f"keep more than {rope / model.cache_values:.1%}",
        )
    return rank


def _refuse(recipe: Recipe, model: LatentModel) -> None:
    """What makes no sense for such a model."""
    asked: dict[str, tuple[Any, Any]] = {"--to": (recipe.to, "mla"), "--method": (recipe.method, "calibrated")}
    asked |= {"--bytes": (recipe.bytes, None), "--cache-for": (recipe.cache_for, None)}
    for option, (value, only) in asked.items():
        if value != only:
            raise UnsupportedModelError(
                f"the model has latent attention already, for which {option} {value} means nothing",
                code="LZ203",
                where=option,
                fix="leave it out: only the rank can be lowered",
            )
    if recipe.format not in ("auto", model.model_type):
        raise FormatError(
            f"a model whose rank is lowered keeps its format, {model.model_type}",
            where=f"--format {recipe.format}",
            fix="leave it out",
        )
    if recipe.polish:
        raise OptionError(
            "a lower rank is refined layer by layer only", where="--polish", fix="leave it out, and heal the result"
        )


class LowerJob(Job):
    """To a lower rank, in the format that the model has."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint) -> None:
        self.model = latent_model(checkpoint.config)
        self.rank = rank_of(recipe, self.model)
        check_latent(checkpoint, self.model)
        stored = str(checkpoint.dtype("model.embed_tokens.weight"))
        if "dtype" in recipe.model_fields_set and recipe.dtype != stored:
            raise OptionError(
                f"weights stay as they are stored, in {stored}", where=f"--dtype {recipe.dtype}", fix="leave it out"
            )
        recipe = recipe.model_copy(update={"dtype": stored})
        super().__init__(recipe, checkpoint, cast(Any, self.model))
        if predicts_further(checkpoint, self.model):
            self.notes.append("layers that predict further tokens at once (multi-token prediction) are left out")

    def choose_kind(self) -> type[FormatWriter]:
        return LoweredWriter

    def open(self, device: str) -> SourceModel:
        return LatentSource(self.checkpoint, self.model, device)

    def footprint(self, source: SourceModel) -> None:
        """Not known."""

    def convert(self, source: SourceModel, text: Text, journal: Journal | None, progress: Progress) -> Converted:
        assert isinstance(source, LatentSource)
        how = Refinement(seed=self.recipe.seed).suited(self.recipe.sequence_length)
        refinement = how if self.recipe.refines else None
        texts = (text.calibration, text.evaluation)
        return lower_model(source, self.rank, self.writer, *texts, refinement, progress, journal)

    def shape(self) -> dict[str, Any]:
        values = self.rank + self.model.attention.qk_rope_head_dim
        return {
            "method": "lower-rank",
            "setting": {"kv_lora_rank": self.rank, "source_kv_lora_rank": self.model.attention.kv_lora_rank},
            "kv_lora_rank": self.rank,
            "qk_rope_head_dim": self.model.attention.qk_rope_head_dim,
            "rope_theta": self.model.rope.theta,
            "cache_values_per_token_layer": values,
            "keep": values / self.model.cache_values,
        }

    def layer_shapes(self) -> list[dict[str, Any]]:
        rope = self.model.attention.qk_rope_head_dim
        sizes = {"kv_lora_rank": self.rank, "qk_rope_head_dim": rope}
        kinds = [self.model.kind_of(layer) for layer in range(self.model.layers)]
        return [dict(sizes) if kind == FULL else {"kept": kind} for kind in kinds]
