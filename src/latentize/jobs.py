"""A conversion from checked input to finished folder: what ``latentize.convert`` runs."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentize import card
from latentize import plan as arithmetic
from latentize.calibrate.text import describe, documents
from latentize.calibrate.tokenizer import load_tokenizer
from latentize.calibrate.tokens import Passages, pack
from latentize.checkpoint import Checkpoint, Journal, Manifest, OutputFolder
from latentize.checkpoint.checksums import source_hashes
from latentize.checkpoint.journal import bytes_in, partial_folders
from latentize.checkpoint.manifest import sha256, versions
from latentize.checkpoint.writer import copied_files
from latentize.convert.allocate import allocate
from latentize.convert.canonical import is_like_llama
from latentize.convert.pipeline import Converted, Effort, convert_latent, convert_pooled
from latentize.convert.polish import Polish
from latentize.convert.progress import Progress
from latentize.convert.refine import Refinement
from latentize.convert.search import choose
from latentize.convert.settings import Setting, pooled_heads, settings
from latentize.convert.source import SourceModel
from latentize.errors import FormatError, NumericsError, OutputError, ResourceError
from latentize.families import ModelSpec
from latentize.families.model import FULL
from latentize.footprint import Footprint, latent_footprint, pooled_footprint
from latentize.formats.deepseek_v3 import DeepseekWriter, portable_reasons
from latentize.formats.native import NativeWriter
from latentize.formats.pooled import PooledWriter
from latentize.machine import keeping_freed_memory, memory_room, peak_rss_bytes, rss_bytes
from latentize.recipe import Recipe
from latentize.report.page import write_report
from latentize.spec import mean_over_layers

if TYPE_CHECKING:
    from latentize.formats.base import FormatWriter

__all__ = ["Job", "LatentJob", "PooledJob", "Text", "draw_text"]

# Steps of refinement where the layers are polished together afterwards, which is then the better use of the time.
_BEFORE_POLISH = 200
# A prediction of memory is taken at its word only this far: it was 21 % too large at most where it was measured
# (docs/memory.md). Between the two a conversion is tried.
_CERTAIN = 0.8
# Freed memory that stays with the process is faster, and lies in pieces: so many times as much is needed.
_KEPT = 1.8
# Entries of a report that another run on another machine has otherwise.
_OF_THIS_RUN = ("seconds", "peak_rss_bytes", "predicted_peak_rss_bytes", "layers")


@dataclass
class Text:
    """Three disjoint sets of tokens.

    Attributes:
        calibration: For statistics, and to learn from.
        selection: For choices.
        evaluation: For the numbers that are reported.
    """

    calibration: Passages
    selection: Passages
    evaluation: Passages

    def digest(self) -> str:
        """Of all tokens and positions."""
        parts = (t for p in (self.calibration, self.selection, self.evaluation) for t in (p.tokens_NT, p.positions_NT))
        found = hashlib.sha256()
        for part in parts:
            found.update(str(tuple(part.shape)).encode() + part.to(torch.int64).contiguous().numpy().tobytes())
        return found.hexdigest()


def draw_text(folder: Path, recipe: Recipe, context: int, *, trust_remote_code: bool = False) -> Text:
    """The text of a recipe, in the tokens of the model in ``folder``.

    What is learnt from, and what choices are made on, is spread over a context; what is reported is as it is written.

    Args:
        folder: With the tokenizer.
        recipe: Says how much.
        context: Positions that the model is made for.
        trust_remote_code: Whether code of the tokenizer may be run.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    length = recipe.sequence_length

    def draw(split: str, tokens: int, seed: int = 0) -> Tensor:
        stream = documents(recipe.data, split)  # type: ignore[arg-type]
        return pack(tokenizer, stream, tokens=tokens, sequence_length=length, seed=seed)

    rows = draw("calibration", recipe.calibration_tokens + recipe.selection_tokens, recipe.seed)
    held = max(1, min(recipe.selection_tokens // length, len(rows) // 4)) if len(rows) > 1 else 0
    # One sequence alone has to serve for everything.
    selection, calibration = rows[: held or 1], rows[held : held + max(1, recipe.calibration_tokens // length)]
    context = min(context, recipe.reach)
    return Text(
        calibration=Passages.spread(calibration, context, seed=recipe.seed),
        selection=Passages.spread(selection, context, seed=recipe.seed + 1),
        evaluation=Passages.contiguous(draw("heldout", recipe.held_out_tokens)),
    )


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
    model = (source.spec.attention.hidden_size, recipe.sequence_length)
    refinement = Refinement(seed=recipe.seed)
    if not polish:
        return Effort(refinement.suited(*model))
    before = replace(refinement, steps=_BEFORE_POLISH)
    return Effort(before.suited(*model), Polish(seed=recipe.seed).suited(*model))


@contextlib.contextmanager
def _finite_numbers() -> Iterator[None]:
    """Arithmetic that leaves the range of numbers is the model's fault, or that of what was done to it."""
    try:
        yield
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericsError(
            f"the conversion has left the range of numbers: {error}",
            where="the weights of the model, or the method",
            fix="does the model itself predict anything? if so, try --fast, or another --method",
        ) from error


@contextlib.contextmanager
def _within_memory() -> Iterator[None]:
    """What Python and PyTorch say where there is no more memory, said once."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocators have no class of their own on a CPU.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ResourceError(
            f"memory does not suffice: {(str(error) or 'the system gives no more').splitlines()[0]}",
            code="LZ422",
            where="this machine",
            fix="end other programs, give fewer --tokens or --no-polish, or use a larger machine",
        ) from error


class Job:
    """One conversion, from checked input to finished folder.

    Attributes:
        predicted_peak: Bytes that the process is expected to have at most; ``None`` where that is not known.
        keeps_freed_memory: Whether there is so much memory that what is freed need not go back.
    """

    def __init__(
        self, recipe: Recipe, checkpoint: Checkpoint, spec: ModelSpec, *, trust_remote_code: bool = False
    ) -> None:
        self.recipe, self.checkpoint, self.spec = recipe, checkpoint, spec
        self.trust_remote_code = trust_remote_code
        self.dtype = getattr(torch, recipe.dtype)
        self.settings: list[Setting] = []
        self.notes: list[str] = []
        self.scores: list[dict[str, Any]] = []
        self.predicted_peak: int | None = None
        self.keeps_freed_memory = False
        self.kind: type[FormatWriter] = self.choose_kind()
        if trust_remote_code and checkpoint.config.get("auto_map") and self.kind is not DeepseekWriter:
            raise FormatError(
                "the output would need the checkpoint's own code to be loaded",
                where="config.json, auto_map",
                fix="choose what --format deepseek_v3 can hold; that needs no code",
            )
        self.writer: FormatWriter

    def choose_kind(self) -> type[FormatWriter]:
        """The class of the writer; what the recipe asks for is possible."""
        raise TypeError

    def open(self, device: str) -> SourceModel:
        """The model to convert."""
        trust = {"trust_remote_code": self.trust_remote_code}
        return SourceModel(self.checkpoint, self.spec, device, rough=self.recipe.hurries, **trust)

    def convert(self, source: SourceModel, text: Text, journal: Journal, progress: Progress) -> Converted:
        raise TypeError

    def shape(self) -> dict[str, Any]:
        """The JSON entries that say what attention became."""
        raise TypeError

    def layer_shapes(self) -> list[dict[str, Any]]:
        """For each layer the JSON entries that say what its attention became."""
        return [{} for _ in range(self.spec.layers)]

    def request(self, model: str, text: Text) -> dict[str, Any]:
        """What decides the bytes of the output, by name; reads all of the source."""
        source = self.checkpoint
        hashes = source_hashes(source)
        for name in source.names():
            source.load(name)
        rest = {source.folder / "config.json", source.folder / "README.md", *copied_files(source.folder)}
        rest |= set(source.folder.glob("*.py")) if self.trust_remote_code else set()
        return {
            "model": model,
            "recipe": self.recipe.model_dump(mode="json"),
            "weights": hashes,
            "other files": {path.name: sha256(path) for path in sorted(rest) if path.is_file()},
            "text": text.digest(),
            "versions": versions(),
        }

    def footprint(self, source: SourceModel) -> Footprint | None:
        """The memory that it will take, where that can be told."""

    def _check_memory(self, source: SourceModel) -> None:
        """Predict the peak of this process, and refuse where memory will surely not suffice.

        On a device that has memory of its own nothing is predicted.
        """
        predicted = self.footprint(source) if source.device == "cpu" else None
        if predicted is None:
            self.keeps_freed_memory = not source.large
            return
        room, now = memory_room(), rss_bytes()
        if _CERTAIN * predicted.bytes > room.bytes:
            raise ResourceError(
                f"the conversion would take about {predicted.bytes / 1e9:.2f} GB beside the {now / 1e9:.2f} GB of the "
                f"process, {room.bytes / 1e9:.2f} GB are there; the largest part is {predicted.largest}",
                code="LZ422",
                where=room.bound,
                fix=self._less_memory(predicted.largest),
            )
        # A model that is large beside the machine's memory has none to keep.
        self.keeps_freed_memory = not source.large and _KEPT * predicted.bytes < room.bytes / 2
        self.predicted_peak = now + round(predicted.bytes * (_KEPT if self.keeps_freed_memory else 1))

    def _less_memory(self, largest: str) -> str:
        """What makes the part of a conversion smaller that takes most."""
        fewer = f"give fewer --tokens (now {self.recipe.calibration_tokens}), "
        options = {
            "polishing": "give --no-polish, ",
            "refining layers": f"{fewer}or --fast, ",
            "converting layers": fewer if self.recipe.to == "mla" else "",
            "choosing sizes": "give --kv-lora-rank and --qk-rope-head-dim, ",
        }
        return f"{options.get(largest, '')}end other programs, or use a larger machine"

    def _check_room(self, out: Path) -> None:
        """Refuse where nothing can be written, or not the output, and as much again that is kept until it is whole."""
        stored = sum(math.prod(self.checkpoint.shape(name)) for name in self.checkpoint.names())
        # The portable format has an output head of its own.
        stored += self.spec.vocab_size * self.spec.attention.hidden_size if self.spec.tied else 0
        needed = 2 * stored * self.dtype.itemsize - sum(map(bytes_in, partial_folders(out)))
        parent = next(folder for folder in out.expanduser().absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                "the output folder cannot be made there",
                code="LZ402",
                where=str(parent),
                fix="choose a folder that can be written",
            )
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise ResourceError(
                f"the output and what it is made of take about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                where=str(parent),
                fix="make room, or choose another disk",
            )

    def run(self, out: Path, model: str, device: str, progress: Progress, resume: bool = False) -> dict[str, Any]:
        """Convert and write; what was interrupted goes on with ``resume``.

        Args:
            out: Where to.
            model: Name of the source.
            device: Where layers run.
            progress: Told how far it is.
            resume: Go on with an unfinished conversion of the same to ``out``.
        """
        started = time.time()
        with Journal(out, resume=resume) as journal, _within_memory():
            if journal.done is not None:
                journal.remove()
                return journal.done
            trust = {"trust_remote_code": self.trust_remote_code}
            source = self.open(device)
            self._check_room(out)
            self._check_memory(source)
            text = draw_text(self.checkpoint.folder, self.recipe, self.spec.max_positions, **trust)
            request = self.request(model, text)
            journal.begin(request)
            with OutputFolder(out, journal=journal) as folder:
                self.writer = self.kind(folder, self.checkpoint, self.spec, self.dtype)
                with _finite_numbers(), keeping_freed_memory() if self.keeps_freed_memory else contextlib.nullcontext():
                    done = self.convert(source, text, journal, progress)
                    report = self._report(done, started)
                self._write(folder, journal, model, report, request["weights"])
        return report

    def _write(
        self, folder: OutputFolder, journal: Journal, model: str, report: dict[str, Any], hashes: dict[str, str]
    ) -> None:
        """Everything but the layers."""
        self.writer.top()
        measurements = {k: v for k, v in report.items() if k not in _OF_THIS_RUN}
        manifest = Manifest(
            format=self.writer.name,
            source={"model": model, **arithmetic.describe(self.spec), "files": hashes},
            recipe=self.recipe.model_dump(mode="json"),
            layers=report["layers"],
            measurements=measurements,
            notes=self.notes,
        )
        folder.copy_tokenizer(self.checkpoint.folder)
        told = (self.spec, self.recipe, report, self.notes)
        folder.write_text("README.md", card.render(model, self.checkpoint.folder, *told))

        def last(partial: Path) -> None:
            write_report(partial, name=folder.out.name)
            # The embedding, which comes last, may have been the largest of all.
            report["peak_rss_bytes"] = peak_rss_bytes()
            journal.finish(report)

        folder.finish(self.writer.config(), manifest, last)

    def _report(self, done: Converted, started: float) -> dict[str, Any]:
        if done.linear_fit is not None:
            kl = done.linear_fit.kl / done.linear_fit.tokens
            self.notes.append(f"the linear fit alone, nothing compressed or refined, is {kl:.2g} nats from the source")
        reach, longest = self.recipe.reach, self.spec.max_positions
        if self.recipe.to == "mla" and reach < longest:
            self.notes.append(
                f"calibrated on distances up to {reach:,} tokens, the model is made for {longest:,}: what "
                f"comes later in a context may be predicted far worse (latentize eval --sequence-length {longest})"
            )
        quality = done.quality.describe()
        if not all(math.isfinite(value) for value in quality.values() if isinstance(value, float)):
            raise ArithmeticError("what the converted model predicts is not finite")
        return {
            "format": self.writer.name,
            "to": self.recipe.to,
            **self.shape(),
            "source_cache_values_per_token_layer": self.spec.cache_values,
            "calibration_tokens": done.calibration_tokens,
            "calibration_text": describe(self.recipe.data),
            "seconds": round(time.time() - started, 2),
            "peak_rss_bytes": peak_rss_bytes(),
            "predicted_peak_rss_bytes": self.predicted_peak,
            "layers": [
                {**sizes, "error_before_refine": before, "error_after_refine": after, **facts}
                for sizes, (before, after), facts in zip(
                    self.layer_shapes(), done.errors, done.facts or [{}] * len(done.errors), strict=True
                )
            ],
            "source_perplexity": quality["reference_perplexity"],
            "perplexity": quality["perplexity"],
            "excess_loss": done.quality.excess,
            "closed_form_excess_loss": None if done.closed_form is None else done.closed_form.excess,
            "linear_fit_excess_loss": None if done.linear_fit is None else done.linear_fit.excess,
            "kl": quality["kl"],
            "top1_agreement": quality["top1_agreement"],
            "evaluation_tokens": quality["tokens"],
            "candidates": self.scores,
            "notes": self.notes,
        }


class LatentJob(Job):
    """To multi-head latent attention."""

    def choose_kind(self) -> type[FormatWriter]:
        allowed = settings(self.recipe, self.spec.attention)
        kind, self.candidates, self.notes = _format(self.recipe, self.spec, allowed)
        return kind

    def footprint(self, source: SourceModel) -> Footprint:
        one_by_one = issubclass(self.kind, NativeWriter) and self.recipe.method == "calibrated"
        return latent_footprint(
            self.spec,
            self.checkpoint,
            self.recipe,
            self.candidates,
            _effort(self.recipe, source),
            one_by_one=one_by_one,
            item=self.dtype.itemsize,
            narrow=source.autocast,
        )

    def convert(self, source: SourceModel, text: Text, journal: Journal, progress: Progress) -> Converted:
        effort = _effort(self.recipe, source)
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
        options = (source, self.candidates, text.calibration, text.selection, self.recipe.refines, progress)
        one_by_one = isinstance(self.writer, NativeWriter) and self.recipe.method == "calibrated"
        if one_by_one and self.recipe.sizes is None and len(self.spec.converted) > 1:
            sized, prices = allocate(*options)
            by_layer = dict(zip(self.spec.converted, sized, strict=True))
            # Layers that stay have an entry that nothing reads.
            chosen = [by_layer.get(layer, sized[0]) for layer in range(self.spec.layers)]
            found = zip(self.spec.converted, prices, strict=True)
            return chosen, [{"layer": layer, "selection_kl_by_rank": priced} for layer, priced in found]
        best, scores = choose(*options)
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

    def footprint(self, source: SourceModel) -> Footprint:
        sizes = {"item": self.dtype.itemsize, "narrow": source.autocast}
        return pooled_footprint(self.spec, self.checkpoint, self.recipe, **sizes)

    def convert(self, source: SourceModel, text: Text, journal: Journal, progress: Progress) -> Converted:
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
