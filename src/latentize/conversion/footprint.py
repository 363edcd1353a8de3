"""How much memory a conversion takes at its peak, from shapes alone: predicted before anything is done.

Each stretch of a conversion holds something else, and the largest decides. Counted is what is there at once: a layer
as stored and in float32, the hidden states of the texts, statistics and factorisations in float64, what is trained
with its gradients and momenta, tensors that wait to be written, the embedding. ``benchmarks/memory.py`` and
``tests/integration/test_memory.py`` hold the sum against what the operating system has counted.

D hidden, H query heads, G kv heads, d head size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from latentize.checkpoint.writer import SHARD_BYTES
from latentize.conversion.allocate import STREAM_BYTES, TRIAL_TOKENS
from latentize.conversion.coding import SAMPLED_TOKENS
from latentize.conversion.pipeline import REFINED_TOKENS, RMS_TOKENS, Effort
from latentize.conversion.search import FINALISTS, SEARCH_TOKENS
from latentize.conversion.self_generated import PIECE, pieces_at_once
from latentize.families import ModelSpec
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.modeling.layer import MULTIPLIED
from latentize.modeling.precision import Precision
from latentize.modeling.source import VOCAB_AT_ONCE, tokens_at_once
from latentize.recipe import Recipe
from latentize.training.descent import Schedule

__all__ = ["Footprint", "Stored", "graph_bytes", "latent_footprint", "pooled_footprint"]

# The largest activations of a layer that exist at once, going forward, and those that a backward pass keeps.
_FORWARD, _BACKWARD = 3, 8
# float32 copies of what is trained: start, itself, gradient, momentum, step.
_TRAINED = 5
# Logits of both models, their logarithms and differences, of the tokens that are compared at once.
_LOGITS, _LOGIT_BYTES = 8, 1 << 25
# Of each piece of text that is written at a time: logits, probabilities, their sums, what they were made of.
_DRAWN = 4
# What drawing text leaves behind: the pool that it is drawn from, what the tokenizer has made of it.
_TEXT = 120 << 20
# Bytes of a second moment's entry while another is added to it, and while a layer is factorised: in float64 with
# summands, and in complex float64 beside it.
_GATHERED, _FACTORISED = 28, 32


class Stored(Protocol):
    """Tensors in files: a :class:`~latentize.checkpoint.Checkpoint`, or what a description says of one."""

    def names(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def size(self, name: str) -> int: ...


@dataclass(frozen=True)
class Footprint:
    """Bytes that a conversion takes beyond those that the process has before it.

    Attributes:
        stretches: Part of the conversion → what it holds at once.
    """

    stretches: Mapping[str, int]

    @property
    def largest(self) -> str:
        """The part that decides."""
        return max(self.stretches, key=self.stretches.__getitem__)

    @property
    def bytes(self) -> int:
        return self.stretches[self.largest] + _TEXT


@dataclass(frozen=True)
class _Shapes:
    """Bytes of the parts that stretches are made of.

    Attributes:
        item: Of a saved number.
        precision: What is multiplied in bfloat16.
    """

    spec: ModelSpec
    checkpoint: Stored
    recipe: Recipe
    item: int
    precision: Precision

    def whole(self, tokens: int) -> int:
        """Tokens of the whole sequences among so many, at least of one."""
        length = self.recipe.sequence_length
        return max(1, tokens // length) * length

    def stream(self, tokens: int) -> int:
        """Hidden states, float32."""
        return 4 * self.whole(tokens) * self.spec.attention.hidden_size

    def layers(self) -> list[int]:
        """Every layer, as stored and as it runs; what runs as it is stored is not copied."""
        sizes = []
        for index in range(self.spec.layers):
            prefix, size = self.spec.layer_prefix(index), 0
            for name in (name for name in self.checkpoint.names() if name.startswith(prefix)):
                stored, wide = self.checkpoint.size(name), 4 * math.prod(self.checkpoint.shape(name))
                narrow = self.precision.everything and name.endswith(MULTIPLIED) and stored < wide
                size += stored + (wide if stored != wide and not narrow else 0)
            sizes.append(size)
        return sizes

    def running(self) -> int:
        """All layers as a step of the polish runs them, but for the attention that is trained."""
        inside = f".{self.spec.module('attention')}."
        sizes = {name: math.prod(self.checkpoint.shape(name)) for name in self.checkpoint.names()}
        prefixes = tuple(self.spec.layer_prefix(index) for index in range(self.spec.layers))
        layers = {name: size for name, size in sizes.items() if name.startswith(prefixes) and inside not in name}
        return sum(
            (2 if self.precision.faster and name.endswith(MULTIPLIED) else 4) * size for name, size in layers.items()
        )

    def embedding(self, item: int = 0) -> int:
        """As stored, or with items of so many bytes."""
        name = self.spec.module("embedding") + ".weight"
        return item * math.prod(self.checkpoint.shape(name)) if item else self.checkpoint.size(name)

    def pending(self) -> int:
        """Tensors that wait to be written."""
        outside = self.embedding(self.item) * (1 if self.spec.tied else 2)
        total = self.item * sum(math.prod(self.checkpoint.shape(name)) for name in self.checkpoint.names())
        return min(SHARD_BYTES, max(0, total - outside))

    def activations(self, tokens: int, copies: int) -> int:
        """Of tokens that go through a layer at once."""
        cast = 2 * self.spec.attention.hidden_size * self.spec.intermediate_size if self.precision.everything else 0
        return tokens * _per_token(self.spec, copies, self.precision) + cast

    def forward(self) -> int:
        return self.activations(self.whole(tokens_at_once(self.spec, self.precision)), _FORWARD)

    def step(self, schedule: Schedule) -> int:
        """Tokens of a step of training."""
        return min(self.whole(schedule.tokens), self.whole(self.recipe.calibration_tokens))

    def statistics(self, setting: Setting, item: int = 8) -> int:
        """Of one layer."""
        a, needed = self.spec.attention, needs(setting, self.spec.attention)
        size = a.hidden_size**2
        if needed.cross:
            size += (a.num_heads + a.num_kv_heads) * a.head_dim * a.hidden_size
        reach = max(self.recipe.sequence_length, min(self.recipe.reach, self.spec.usual_positions))
        return item * size + (16 * a.num_heads * reach if needed.distances else 0)

    def latent(self, setting: Setting, item: int, *, expanded: bool = False) -> int:
        """The attention of a converted layer."""
        a, heads = self.spec.attention, self.spec.attention.num_heads
        rank, rope = setting.kv_lora_rank, setting.qk_rope_head_dim
        query = heads * (a.head_dim + rope) * a.hidden_size
        if setting.key_scales:
            maps = heads * (a.head_dim + rope * (1 + a.norm_after_rope)) * a.head_dim
            query = (heads + a.num_kv_heads) * a.head_dim * a.hidden_size + maps
        query += a.gated * heads * a.head_dim * a.hidden_size
        down = (rank + setting.rope_heads * rope) * a.hidden_size
        up = 2 * rank * (heads if expanded else a.num_kv_heads) * a.head_dim
        return item * (query + down + up + heads * a.head_dim * a.hidden_size)

    def attention(self, item: int) -> int:
        a = self.spec.attention
        return item * (2 * (a.num_heads + a.num_kv_heads) + a.gated * a.num_heads) * a.head_dim * a.hidden_size

    def left(self) -> int:
        """Tensors of layers that wait until the embedding is written: those that go into the same file."""
        return min(self.pending(), max(0, SHARD_BYTES - self.embedding(self.item)))

    def comparison(self, streams: int) -> int:
        """Final hidden states to logits."""
        a, vocab = self.spec.attention, self.spec.vocab_size
        rows = 4 * min(VOCAB_AT_ONCE, vocab) * a.hidden_size
        return streams + self.embedding() + rows + _LOGITS * max(_LOGIT_BYTES, 4 * vocab) + self.left()

    def top(self) -> int:
        """The embedding is read, converted where it is stored otherwise, and written; a small head waits with it."""
        written = self.embedding(self.item)
        waiting = written if written < SHARD_BYTES else 0
        return self.embedding() + (written if self.embedding() != written else 0) + waiting + self.left()


def _per_token(spec: ModelSpec, copies: int, precision: Precision) -> int:
    """Activations of a token in a layer."""
    a = spec.attention
    inside = (2 if precision.everything else 4) * max(spec.intermediate_size, 2 * a.num_heads * a.head_dim)
    return copies * inside + 12 * a.hidden_size


def graph_bytes(spec: ModelSpec, precision: Precision) -> int:
    """What a backward pass through all layers keeps of a token.

    Args:
        spec: The model.
        precision: What is multiplied in bfloat16.
    """
    return spec.layers * _per_token(spec, _BACKWARD, precision)


def pooled_footprint(spec: ModelSpec, checkpoint: Stored, recipe: Recipe, item: int, precision: Precision) -> Footprint:
    """Of head pooling; arguments as for :func:`latent_footprint`."""
    of = _Shapes(spec, checkpoint, recipe, item, precision)
    texts = 2 * of.stream(recipe.held_out_tokens)
    layers = texts + max(of.layers()) + of.attention(8) + of.pending() + of.forward()
    return Footprint({"converting layers": layers, "comparing": of.comparison(texts), "the embedding": of.top()})


def latent_footprint(
    spec: ModelSpec,
    checkpoint: Stored,
    recipe: Recipe,
    settings: Sequence[Setting],
    effort: Effort,
    *,
    written: int,
    one_by_one: bool,
    item: int,
    precision: Precision,
) -> Footprint:
    """Of a conversion to latent attention.

    Args:
        spec: The source.
        checkpoint: Its files; only their headers are looked at.
        recipe: What is to be done.
        settings: What it allows; one of them will be chosen.
        effort: Training beyond the closed form.
        written: Tokens that the source writes itself.
        one_by_one: Whether every layer is sized for itself.
        item: Bytes of a saved number.
        precision: What is multiplied in bfloat16.
    """
    of = _Shapes(spec, checkpoint, recipe, item, precision)
    refines = effort.refinement is not None
    tokens = recipe.calibration_tokens + written
    calibration = of.stream(tokens)
    widest = max(settings, key=lambda setting: of.latent(setting, 1))
    layer = max(of.layers())
    drafted = of.stream(min(tokens, REFINED_TOKENS if refines else 0 if effort.whole else RMS_TOKENS))
    read = min(tokens, RMS_TOKENS) if widest.whole and not effort.polish else tokens
    own = of.stream(read) + drafted
    # The source, the result, and what a layer was on its way.
    texts = of.stream(recipe.held_out_tokens) * (2 + refines + widest.linear)
    gathered = of.statistics(widest, _GATHERED) + of.forward()
    # In float64, as saved, and a copy on its way to either; once it is written only what runs is left.
    made = of.latent(widest, 8 + 4 + 8)
    factorised = of.statistics(widest, _FACTORISED) + 2 * of.attention(8)
    settled = max(gathered, factorised, made, of.latent(widest, 4) + of.forward())
    waiting = own + layer + (0 if effort.polish else texts + of.pending())
    stretches = {"converting layers": waiting + settled}
    if effort.refinement is not None:
        trained = of.latent(widest, 4 * _TRAINED + 8, expanded=True)
        trained += of.activations(of.step(effort.refinement), _BACKWARD)
        # What a layer adds is there beside the target; both are as large as the text.
        stretches["refining layers"] = waiting + drafted + max(drafted + trained, settled)
    if effort.coding is not None or effort.suiting is not None:
        table = of.comparison(of.stream(recipe.selection_tokens))
        graph = of.whole(1) * graph_bytes(spec, precision)
        # Rows and gradients, in two bytes each; weights before and after, in float32.
        rows = 2 * 2 * spec.layers * min(SAMPLED_TOKENS, tokens) * widest.cache_values
        each = of.latent(widest, 4 + 4)
        stage = "choosing bits" if effort.coding is not None else "suiting rows"
        stretches[stage] = calibration + of.running() + spec.layers * each + rows + graph + table
    if effort.polish is not None:
        each = of.latent(widest, 4 * _TRAINED + 8, expanded=True)
        graph = min(of.step(effort.polish), of.whole(effort.polish.at_once)) * graph_bytes(spec, precision)
        table = of.comparison(of.stream(recipe.selection_tokens))
        stretches["polishing"] = calibration + of.running() + spec.layers * each + graph + table
    if written:
        stretches["writing text"] = _written(of)
    if len(settings) > 1:
        stretches["choosing sizes"] = _choice(of, settings, one_by_one) + layer + max(settled, of.forward())
    stretches["comparing"] = of.comparison(texts)
    stretches["the embedding"] = of.top()
    return Footprint(stretches)


def _written(of: _Shapes) -> int:
    """The whole source as it runs, what it caches, and logits as often as drawing takes them."""
    spec, item = of.spec, 2 if of.precision.faster else 4
    stored = sum(of.checkpoint.size(name) for name in of.checkpoint.names())
    model = item * sum(math.prod(of.checkpoint.shape(name)) for name in of.checkpoint.names())
    pieces = pieces_at_once(spec.vocab_size)
    cached = item * pieces * PIECE * spec.layers * spec.cache_values
    return stored + model + 2 * cached + _DRAWN * 4 * pieces * spec.vocab_size


def _choice(of: _Shapes, settings: Sequence[Setting], one_by_one: bool) -> int:
    """Texts, and what is kept of each layer, while settings are compared."""
    search = of.stream(min(SEARCH_TOKENS, of.recipe.calibration_tokens))
    selection = of.stream(of.recipe.selection_tokens)
    # The text as it enters a layer, as it leaves it, what the attention adds, and what it should add.
    alone = 5 * search
    if one_by_one and of.recipe.sizes is None:
        trials = of.spec.layers * of.stream(min(TRIAL_TOKENS, of.recipe.selection_tokens))
        return alone + trials if trials < STREAM_BYTES else alone + STREAM_BYTES
    if of.recipe.calibrates:
        trained = max(of.latent(setting, 4 * _TRAINED + 8, expanded=True) for setting in settings)
        return alone + trained + (1 + 2 * FINALISTS) * selection
    return 2 * search + (1 + len(settings)) * selection
