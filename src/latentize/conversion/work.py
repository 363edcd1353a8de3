"""How much arithmetic a conversion is, stage by stage, from shapes alone; and how long a machine takes for it.

Counted are the multiplications and additions of matrix products, apart by precision, and the bytes of activations that
everything else (norms, softmax, gates, casts) reads and writes. A machine is what it reaches in products of the model's
own sizes and in a copy. ``benchmarks/real_model.py`` holds the prediction against the clock.

N sequences, T tokens of each, D hidden, H query heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from latentize.conversion.allocate import TRIAL_TOKENS, TRIED
from latentize.conversion.coding import SAMPLED_TOKENS, TRIED_TOKENS
from latentize.conversion.draft import DISTANCE_TOKENS, START_TOKENS
from latentize.conversion.pipeline import REFINED_TOKENS, RMS_TOKENS, Effort
from latentize.conversion.search import FINALISTS, LADDERS, SEARCH_TOKENS, sampled_layers, short_refinement
from latentize.conversion.self_generated import PIECE
from latentize.families import ModelSpec
from latentize.methods.even import ROUNDS
from latentize.methods.rate import COMPARED_TOKENS
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.modeling.precision import Precision, Use
from latentize.recipe import Recipe
from latentize.training.descent import Schedule, orthogonalising
from latentize.training.refine import solved_tokens

__all__ = ["Rates", "Work", "latent_work"]

# Passes of elementwise operators over a token's hidden states and MLP activations in a layer, each a read and a write.
_PASSES = 16
# Times that a component's values are read or written while its widths are compared: seven of them, five scales each,
# some sixty passes to find a word and come back from it.
_PRICED = 7 * 5 * 60
# Of a cache that grows by a token: read twice, written once.
_REWRITTEN = 3


@dataclass(frozen=True)
class Work:
    """What a stage does.

    Attributes:
        narrow, wide, double: Multiplications and additions in bfloat16, float32 and float64.
        scores: Multiplications and additions of queries with keys, and of their probabilities with values.
        moved: Bytes of activations that are read and written beside products.
        sent: Bytes that each process hands to others.
    """

    narrow: float = 0.0
    wide: float = 0.0
    double: float = 0.0
    scores: float = 0.0
    moved: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + yours for mine, yours in zip(self._parts(), other._parts(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * part for part in self._parts()))

    __rmul__ = __mul__

    def _parts(self) -> tuple[float, ...]:
        return (self.narrow, self.wide, self.double, self.scores, self.moved, self.sent)

    @property
    def flop(self) -> float:
        """All multiplications and additions."""
        return self.narrow + self.wide + self.double + self.scores

    def seconds(self, rates: Rates) -> float:
        """How long a machine takes."""
        reached = (rates.narrow, rates.wide, rates.double, rates.scores, rates.moved, rates.sent)
        return sum(part / rate for part, rate in zip(self._parts(), reached, strict=True))


@dataclass(frozen=True)
class Rates:
    """What a machine reaches.

    Attributes:
        narrow, wide, double: Multiplications and additions a second in bfloat16, float32 and float64.
        scores: The same in attention, which is far slower than other products.
        moved: Bytes a second.
        sent: Bytes a second that a process can hand to others.
    """

    narrow: float
    wide: float
    double: float
    scores: float
    moved: float
    sent: float = math.inf


@dataclass(frozen=True)
class _Counter:
    """Work of parts that stages are made of, for the first of several processes, which does most.

    Attributes:
        precision: What is multiplied in bfloat16.
        processes: How many there are.
    """

    spec: ModelSpec
    recipe: Recipe
    precision: Precision
    processes: int = 1

    def share(self, work: Work) -> Work:
        """Of what processes share."""
        return 1 / self.processes * work

    def rounds(self, items: int) -> int:
        """How many of a list that processes share."""
        return -(-items // self.processes)

    def steps(self, how: Schedule) -> Schedule:
        """Those of all processes together: each has a sequence of a step at least."""
        return how.suited(self.processes * self.recipe.sequence_length) if self.processes > 1 else how

    def summed(self, numbers: float) -> Work:
        """float32 numbers, over the processes: a ring hands on all but its own part, twice (Patarasuk & Yuan 2009)."""
        return Work(sent=4 * numbers * 2 * (self.processes - 1) / self.processes)

    def whole(self, tokens: int) -> int:
        """Tokens of the whole sequences among so many, at least of one."""
        return max(1, tokens // self.recipe.sequence_length) * self.recipe.sequence_length

    def products(self, flop: float, moved: float, use: Use) -> Work:
        """In the precision that they are done in."""
        narrow = self.precision.narrow(use)
        moved *= 2 if narrow else 4
        return Work(narrow=flop, moved=moved) if narrow else Work(wide=flop, moved=moved)

    def matrices(self) -> float:
        """Entries of a layer's matrices, on average, that a token is multiplied with."""
        spec, total = self.spec, 0.0
        prefixes = tuple(spec.layer_prefix(layer) for layer in range(spec.layers))
        for name, shape in spec.tensor_shapes().items():
            if len(shape) > 1 and name.startswith(prefixes):
                total += math.prod(shape) * (spec.active_experts if ".experts." in name else 1.0)
        return total / spec.layers

    def scores(self, head_dim: int) -> float:
        """Products with keys and values of one query token in one layer: half of the sequence is before it."""
        return 2 * self.spec.attention.num_heads * head_dim * self.recipe.sequence_length / 2

    def activations(self) -> float:
        """Entries that elementwise operators read or write for a token in a layer."""
        a = self.spec.attention
        return 2 * _PASSES * (a.hidden_size + self.spec.intermediate_size / 2)

    def forward(self, tokens: float, use: Use) -> Work:
        """One layer of the source, or a converted one, which is about as much."""
        scores = tokens * self.scores(2 * self.spec.attention.head_dim)
        products = self.products(tokens * 2 * self.matrices(), tokens * self.activations(), use)
        return products + Work(scores=scores)

    def head(self, tokens: float, use: Use = Use.MEASURED) -> Work:
        """To logits, and what is derived from them."""
        a, vocab = self.spec.attention, self.spec.vocab_size
        return self.products(tokens * 2 * a.hidden_size * vocab, tokens * _PASSES * vocab, use)

    def written(self, tokens: int) -> Work:
        """Text that the source writes: at every token its cache is read, made longer, and written anew."""
        forward = self.spec.layers * self.forward(tokens, Use.LEARNT) + self.head(tokens, Use.LEARNT)
        cached = PIECE / 2 * self.spec.layers * self.spec.cache_values * (2 if self.precision.faster else 4)
        # Logits are drawn from in float32.
        return forward + Work(moved=tokens * (_REWRITTEN * cached + 4 * _PASSES * self.spec.vocab_size))

    def latent(self, setting: Setting) -> list[tuple[int, int, int]]:
        """Shapes of a converted layer's matrices, a stack of those of the heads: every head has its own."""
        a, rank, rope = self.spec.attention, setting.kv_lora_rank, setting.qk_rope_head_dim
        heads, each, hidden = a.num_heads, a.head_dim, a.hidden_size
        # Queries are normalised before they are split where norms are kept, and the norms of keys are made again.
        kept = setting.key_scales
        query = [
            (heads, each, hidden),
            (heads, each + rope * (1 + a.norm_after_rope), each),
            (kept, a.num_kv_heads // max(1, kept) * each, hidden),
        ]
        stacks = [
            *(query if kept else [(heads, each + rope, hidden)]),
            *([(heads, each, hidden)] if a.gated else []),
            (1, rank, hidden),
            (setting.rope_heads, rope, hidden),
            (heads, 2 * each, rank),
            (heads, hidden, each),
        ]
        return [stack for stack in stacks if math.prod(stack)]

    def stepped(self, setting: Setting, how: Schedule) -> Work:
        """All steps on a layer, once processes have their gradients.

        Where Muon is taken gradients go to the process that orthogonalises a matrix, which tells the others its step.
        """
        entries = sum(map(math.prod, self.latent(setting)))
        flop = orthogonalising(self.latent(setting), how.tokens)
        if flop is None:
            return self.summed(how.steps * entries)
        told = 4 + (2 if self.precision.narrow(Use.LEARNT) else 4)
        sent = how.steps * told * entries * (self.processes - 1) / self.processes
        return self.share(self.products(how.steps * flop, 0.0, Use.LEARNT)) + Work(sent=sent)

    def attention(self, tokens: float, setting: Setting, passes: int) -> Work:
        """A converted layer's attention alone; ``passes`` is 1 forward and 3 with the way back."""
        a, length = self.spec.attention, self.recipe.sequence_length
        both = 2 * a.head_dim + setting.qk_rope_head_dim
        # To be trained through, attention is plain products, which are twice as fast.
        scores = passes * self.scores(both) / (1 if passes == 1 else 2)
        # Scores and probabilities exist, in blocks.
        moved = passes * _PASSES / 2 * (2 * a.hidden_size + a.num_heads * (both + length / 2))
        products = self.products(
            tokens * passes * 2 * sum(map(math.prod, self.latent(setting))), tokens * moved, Use.LEARNT
        )
        return products + Work(scores=tokens * scores)

    def statistics(self, tokens: float, distances: bool) -> Work:
        """Second moments, and attended distances of as many tokens as are looked at."""
        a = self.spec.attention
        work = Work(wide=tokens * 2 * a.hidden_size**2)
        some = min(tokens, DISTANCE_TOKENS) if distances else 0
        length = self.recipe.sequence_length
        return work + Work(
            wide=some * (2 * 2 * a.num_heads * a.head_dim * a.hidden_size + 2 * a.num_heads * a.head_dim * length),
            moved=some * 4 * 2 * _PASSES * a.num_heads * length,
        )

    def closed(self) -> Work:
        """A closed form: energies of queries and keys in complex float64, and the factorisation."""
        a = self.spec.attention
        pairs = (a.num_heads + a.num_kv_heads) * a.head_dim / 2
        stacked = 2 * a.num_kv_heads * a.head_dim
        return Work(double=8 * pairs * a.hidden_size**2 + 4 * stacked * a.hidden_size**2 + 25 * stacked**3)

    def refined(self, setting: Setting, how: Schedule, tokens: float) -> Work:
        """One layer: the steps, and then the output projection."""
        how = self.steps(how)
        work = self.share(self.attention(how.steps * self.whole(how.tokens), setting, 3))
        work += self.stepped(setting, how)
        solved = min(tokens, solved_tokens(how))
        read = self.spec.attention.num_heads * self.spec.attention.head_dim
        gram = self.attention(solved, setting, 1) + Work(wide=2 * solved * read**2)
        return work + self.share(gram) + Work(double=read**3)

    def alone(self) -> _Counter:
        """The same where every process does all of it."""
        return replace(self, processes=1)


def latent_work(
    spec: ModelSpec,
    recipe: Recipe,
    settings: Sequence[Setting],
    effort: Effort,
    *,
    written: int,
    one_by_one: bool,
    precision: Precision,
    processes: int = 1,
) -> Mapping[str, Work]:
    """Of a conversion to latent attention, stage by stage as its progress names them.

    Args:
        spec: The source.
        recipe: What is to be done.
        settings: What it allows; one of them will be chosen.
        effort: Training beyond the closed form.
        written: Tokens that the source writes itself.
        one_by_one: Whether every layer is sized for itself.
        precision: What is multiplied in bfloat16.
        processes: That share it.
    """
    of = _Counter(spec, recipe, precision, processes)
    layers, converted, length = spec.layers, len(spec.converted), recipe.sequence_length
    tokens, evaluated = of.whole(recipe.calibration_tokens + written), of.whole(recipe.held_out_tokens)
    setting, refinement = settings[0], effort.refinement
    distances = needs(setting, spec.attention).distances
    stages: dict[str, Work] = {}
    if written:
        stages["writing text"] = of.written(written)
    if len(settings) > 1:
        stages |= _choice(of, settings, distances, refines=refinement is not None, one_by_one=one_by_one)
    # Each layer: what the source does, the closed form, and the text on its way through the result.
    rough = refinement is not None or setting.whole
    read = min(tokens, RMS_TOKENS) if setting.whole and not effort.polish else tokens
    stated = min(read, START_TOKENS) if rough else read
    seen = of.forward(read, Use.LEARNT if rough else Use.STATISTICS) + of.statistics(stated, distances)
    made = of.share(seen) + of.closed() + of.summed(2 * spec.attention.hidden_size**2)
    drafted = min(tokens, REFINED_TOKENS if refinement else 0 if effort.whole else RMS_TOKENS)
    if refinement is not None:
        made += of.refined(setting, refinement, drafted)
    made += of.share(of.forward(drafted, Use.LEARNT))
    # Source, result, and what a layer was on its way.
    measured = (2 + setting.linear) * (layers * of.forward(evaluated, Use.MEASURED) + of.head(evaluated))
    if refinement is not None:
        measured += layers * of.forward(evaluated, Use.LEARNT) + of.head(evaluated)
    measured = of.share(measured)
    kept = (layers - converted) * of.share(of.forward(read, Use.MEASURED))
    if not effort.whole:
        return {**stages, "converting layers": converted * made + kept + measured}
    stages["refining layers"] = converted * made + kept
    if effort.coding is not None:
        stages["choosing bits"] = _coded(of, setting, tokens)
    if effort.polish is not None:
        looks, selection = effort.polish.looks + 2, of.whole(recipe.selection_tokens)
        stages["polishing"] = _polished(of, setting, effort.polish, selection, looks)
    if effort.suiting is not None:
        some = of.whole(min(SAMPLED_TOKENS, tokens))
        stages["suiting rows"] = _gradients(of, some) + converted * _suited(setting, some)
    few = of.whole(max(length, RMS_TOKENS))
    stages["converting layers"] = measured + layers * of.share(of.forward(min(few, tokens), Use.LEARNT))
    return stages


def _coded(of: _Counter, setting: Setting, tokens: int) -> Work:
    """Gradients of some text; components and widths of every layer; and what each of its halves costs."""
    layers, converted = of.spec.layers, len(of.spec.converted)
    some = of.whole(min(SAMPLED_TOKENS, tokens))
    work = _gradients(of, some)
    rank, values = setting.kv_lora_rank, setting.cache_values
    work += converted * Work(double=2 * 2 * some * rank**2 + 25 * rank**3, moved=_PRICED * 4 * COMPARED_TOKENS * values)
    # A trial begins at its layer, and ends with logits of both.
    trial = of.whole(min(TRIED_TOKENS, of.recipe.selection_tokens))
    return work + 2 * converted * (layers / 2 * of.forward(trial, Use.LEARNT) + 2 * of.head(trial, Use.LEARNT))


def _gradients(of: _Counter, tokens: int) -> Work:
    """Of some text, back through the whole model."""
    return 3 * (of.spec.layers * of.forward(tokens, Use.LEARNT) + of.head(tokens, Use.LEARNT))


def _suited(setting: Setting, tokens: int) -> Work:
    """Weighted moments and their geometric mean, a few times."""
    rank = setting.kv_lora_rank
    return ROUNDS * Work(double=6 * tokens * rank**2 + 5 * 25 * rank**3)


def _polished(of: _Counter, setting: Setting, how: Schedule, selection: int, looks: int) -> Work:
    """Forward, and back through everything; the gradients of attention's matrices."""
    how = of.steps(how)
    tokens = how.steps * of.whole(how.tokens)
    layer = 2 * of.forward(tokens, Use.LEARNT) + of.attention(tokens, setting, 1)
    # On the way back operators read what they made on the way there, too.
    layer += Work(moved=2 * tokens * of.activations())
    # Logits of both, and the way back from one.
    step = of.share(of.spec.layers * layer + 3 * of.head(tokens, Use.LEARNT))
    step += len(of.spec.converted) * of.stepped(setting, how)
    # Rounded and not, once each, before the first step.
    looked = of.spec.layers * of.forward(selection, Use.LEARNT) + 2 * of.head(selection, Use.LEARNT)
    return step + looks * of.share(looked)


def _choice(
    of: _Counter, settings: Sequence[Setting], distances: bool, *, refines: bool, one_by_one: bool
) -> dict[str, Work]:
    """Sizes and ladders."""
    spec, recipe = of.spec, of.recipe
    tokens, selection = of.whole(min(SEARCH_TOKENS, recipe.calibration_tokens)), of.whole(recipe.selection_tokens)
    some, layers = len(sampled_layers(spec.converted)), spec.layers
    text = layers * of.forward(tokens, Use.LEARNT) + some * of.statistics(tokens, distances)
    if not recipe.calibrates:
        each = spec.layers * (of.forward(selection, Use.MEASURED) + of.closed()) + 2 * of.head(selection)
        return {"comparing settings": text + len(settings) * each}
    probed = of.attention(tokens / 4, settings[0], 1) + of.closed()
    tried = of.closed()
    if refines:
        # Processes share what is tried, not the text.
        tried += of.alone().refined(settings[0], short_refinement(recipe.sequence_length), tokens)
    if one_by_one and recipe.sizes is None and len(spec.converted) > 1:
        # Each layer is tried alone, and the rest of the source follows it.
        trial = of.whole(min(TRIAL_TOKENS, recipe.selection_tokens))
        sized = of.rounds(len(settings)) * probed + of.rounds(len(TRIED)) * tried + of.head(trial)
        return {"sizing layers": text + len(spec.converted) * (sized + layers / 2 * of.forward(trial, Use.LEARNT))}
    by_size: dict[tuple[int, int], int] = {}
    for setting in settings:
        size = (setting.kv_lora_rank, setting.qk_rope_head_dim)
        by_size[size] = by_size.get(size, 0) + 1
    stages: dict[str, Work] = {}
    if max(by_size.values()) > LADDERS:
        stages["choosing the ladder"] = text + some * of.closed()
    likely = sum(min(count, LADDERS + 2) for count in by_size.values())
    stages["comparing settings"] = text + some * of.rounds(likely) * probed
    finalists = sum(sorted((min(count, 1 + refines) for count in by_size.values()), reverse=True)[:FINALISTS])
    predicted = layers * of.forward(selection, Use.LEARNT) + of.head(selection, Use.LEARNT)
    compared = of.rounds(finalists) * (predicted + some * tried)
    stages["comparing the best settings"] = text + predicted + compared
    return stages
