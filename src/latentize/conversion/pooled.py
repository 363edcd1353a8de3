"""To fewer kv heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentize.checkpoint import Journal
from latentize.conversion.footprint import Footprint, pooled_footprint
from latentize.conversion.job import Job
from latentize.conversion.measured import Converted
from latentize.conversion.pipeline import convert_pooled
from latentize.conversion.texts import Text
from latentize.errors import FormatError
from latentize.formats.pooled import PooledWriter
from latentize.methods.pooling import pooled_heads
from latentize.modeling.canonical import is_like_llama
from latentize.modeling.source import SourceModel
from latentize.progress import Progress

if TYPE_CHECKING:
    from latentize.formats.base import FormatWriter

__all__ = ["PooledJob"]


class PooledJob(Job):
    """To fewer kv heads."""

    def choose_kind(self) -> type[FormatWriter]:
        self.kv_heads = pooled_heads(self.recipe, self.spec.attention)
        if not is_like_llama(self.spec.table) or self.spec.kinds or not self.spec.attention.rotates_whole:
            raise FormatError(
                f"heads of '{self.spec.table.model_type}' cannot be pooled: they are stored unlike Llama's, or rotate "
                f"in part, or not in every layer",
                where=f"--to {self.recipe.to}",
                fix="use --to mla",
            )
        return PooledWriter

    def other_ways(self) -> list[str]:
        return ["--to mla"]

    def footprint(self, source: SourceModel) -> Footprint:
        sizes = (self.dtype.itemsize, source.precision)
        return pooled_footprint(self.spec, self.checkpoint, self.recipe, *sizes)

    def convert(self, source: SourceModel, text: Text, journal: Journal | None, progress: Progress) -> Converted:
        return convert_pooled(source, self.kv_heads, self.writer, text.evaluation, progress, dtype=self.dtype)

    def shape(self) -> dict[str, Any]:
        cache_values = 2 * self.kv_heads * self.spec.attention.head_dim
        return {
            "method": "mean-pool",
            "num_key_value_heads": self.kv_heads,
            "kv_lora_rank": None,
            "qk_rope_head_dim": None,
            "rope_theta": self.spec.attention.rope.theta,
            "cache_values_per_token_layer": cache_values,
            "keep": cache_values / self.spec.cache_values,
        }
