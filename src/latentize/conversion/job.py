"""A conversion from checked input to finished folder."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from latentize.checkpoint import Checkpoint, Journal, Manifest, OutputFolder
from latentize.checkpoint.checksums import source_hashes
from latentize.checkpoint.gguf import is_gguf
from latentize.checkpoint.journal import bytes_in, partial_folders
from latentize.checkpoint.manifest import sha256, versions
from latentize.checkpoint.writer import NoFolder, copied_files
from latentize.conversion.footprint import Footprint
from latentize.conversion.limits import MemoryNeed, finite_numbers, require_disk, require_memory, within_memory
from latentize.conversion.measured import MASSIVE, Converted
from latentize.conversion.rates import rates_of
from latentize.conversion.texts import Text, draw_text
from latentize.conversion.work import Work
from latentize.errors import FormatError
from latentize.families import ModelSpec
from latentize.families.described import described
from latentize.formats.deepseek_v3 import DeepseekWriter
from latentize.machine import keeping_freed_memory, peak_rss_bytes
from latentize.methods.setting import Setting
from latentize.modeling.reading import PROVED_TOKENS, prove
from latentize.modeling.source import SourceModel
from latentize.processes import ALONE, own_device, team, together
from latentize.progress import Progress, Timed, silent
from latentize.recipe import Recipe
from latentize.report import card
from latentize.report.page import write_report
from latentize.text.documents import describe
from latentize.text.tokens import require_rows

if TYPE_CHECKING:
    from latentize.formats.base import FormatWriter

__all__ = ["Job"]


def _within(path: Path, folder: Path) -> str:
    """A file's path in a folder; its name where it lies elsewhere."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


# Entries of a report that another run on another machine has otherwise.
_OF_THIS_RUN = ("seconds", "peak_rss_bytes", "predicted_peak_rss_bytes", "layers")


class Job(ABC):
    """One conversion, from checked input to finished folder.

    Attributes:
        settings: Of every layer, once they are chosen.
        notes: What the report has to say in words.
        scores: What was compared to choose settings.
        self_generated: How many calibration sequences the model writes itself beside the user's.
        restyled, repeated: Calibration tokens that are the user's text in another style, and that are in sequences
            where a passage is read twice.
        memory: What the process is expected to take.
        proved: Largest relative error of the source as it is read, against transformers, or ``None``.
        team: The processes that convert.
        shares: Whether several can share the work; else the first does all of it.
    """

    shares: ClassVar[bool] = False

    def __init__(
        self, recipe: Recipe, checkpoint: Checkpoint, spec: ModelSpec, *, trust_remote_code: bool = False
    ) -> None:
        self.recipe, self.checkpoint, self.spec = recipe, checkpoint, spec
        self.trust_remote_code = trust_remote_code
        self.dtype = getattr(torch, recipe.dtype)
        self.settings: list[Setting] = []
        self.self_generated, self.restyled, self.repeated = 0, 0, 0
        self.notes: list[str] = checkpoint.notes
        self.scores: list[dict[str, Any]] = []
        self.kind: type[FormatWriter] = self.choose_kind()
        if trust_remote_code and checkpoint.config.get("auto_map") and not issubclass(self.kind, DeepseekWriter):
            raise FormatError(
                "the output would need the checkpoint's own code to be loaded",
                where="config.json, auto_map",
                fix="choose what --format deepseek_v3 can hold; that needs no code",
            )
        self.proved: float | None = None
        self.team = ALONE
        self.memory: MemoryNeed
        self.writer: FormatWriter

    @abstractmethod
    def choose_kind(self) -> type[FormatWriter]:
        """The class of the writer; what the recipe asks for is possible."""

    def open(self, device: str) -> SourceModel:
        """The model to convert."""
        trust = {"trust_remote_code": self.trust_remote_code}
        return SourceModel(self.checkpoint, self.spec, device, hurried=self.recipe.hurries, **trust)

    def other_ways(self) -> list[str]:
        """Options that may help where this conversion leaves the range of numbers."""
        return ["--fast"] if self.recipe.refines else []

    def sequences_to_generate(self, source: SourceModel) -> int:
        """How many calibration sequences the model will write itself beside the user's."""
        return 0

    @abstractmethod
    def convert(self, source: SourceModel, text: Text, journal: Journal | None, progress: Progress) -> Converted:
        """Hand every layer to the writer."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """The JSON entries that say what attention became."""

    def layer_shapes(self) -> list[dict[str, Any]]:
        """For each layer the JSON entries that say what its attention became."""
        return [{} for _ in range(self.spec.layers)]

    def request(self, model: str, text: Text) -> dict[str, Any]:
        """What decides the bytes of the output, by name; reads all of the source."""
        source = self.checkpoint
        hashes = source_hashes(source)
        for name in source.names():
            source.load(name)
        rest = set() if is_gguf(source.path) else {source.config_path, source.path / "README.md"}
        rest |= {
            *copied_files(source.path, processor=True),
            *(source.path.glob("*.py") if self.trust_remote_code else ()),
        }
        return {
            "model": model,
            "recipe": self.recipe.model_dump(mode="json"),
            "weights": hashes,
            **self._quantization(),
            "other files": {_within(path, source.path): sha256(path) for path in sorted(rest) if path.is_file()},
            "text": text.digest(),
            "versions": versions(),
        }

    def _quantization(self) -> dict[str, Any]:
        """What the source was quantised to, where it was."""
        found = self.checkpoint.quantization
        return {} if found is None else {"quantization": found}

    def prove(self, source: SourceModel, text: Text, progress: Progress) -> float | None:
        """The largest relative error between the source as it is read and transformers' own model.

        Raises:
            CheckpointError: they differ.
        """
        tokens_T = text.evaluation.tokens_NT[0, :PROVED_TOKENS]
        return prove(source, tokens_T, trust_remote_code=self.trust_remote_code, progress=progress)

    @abstractmethod
    def footprint(self, source: SourceModel) -> Footprint | None:
        """The memory that it will take, where that can be predicted."""

    def work(self, source: SourceModel) -> Mapping[str, Work]:
        """The arithmetic of each stage that progress names; nothing where it is not counted."""
        return {}

    def _timed(self, progress: Progress, source: SourceModel) -> Progress:
        """Tells how much time is left, too, where the work is counted and somebody listens."""
        work = {} if progress is silent else self.work(source)
        if not work:
            return progress
        rates = rates_of(self.spec, source.device)
        return Timed(progress, {stage: done.seconds(rates) for stage, done in work.items()})

    def _check_memory(self, source: SourceModel) -> None:
        """Refuse where memory will surely not suffice; on a device that has its own nothing is predicted."""
        predicted = self.footprint(source) if source.device == "cpu" else None
        if predicted is None:
            self.memory = MemoryNeed(None, keeps_freed=not source.large)
        else:
            here = self.team.on_this_machine if self.shares else 1
            self.memory = require_memory(predicted, self.recipe, large=source.large, processes=here)

    def _check_room(self, out: Path) -> None:
        """Refuse where the output cannot be written, and as much again that is kept until it is whole."""
        stored = sum(math.prod(self.checkpoint.shape(name)) for name in self.checkpoint.names())
        # The portable format has an output head of its own.
        stored += self.spec.vocab_size * self.spec.attention.hidden_size if self.spec.tied else 0
        require_disk(out, 2 * stored * self.dtype.itemsize - sum(map(bytes_in, partial_folders(out))))

    def run(self, out: Path, model: str, device: str, progress: Progress, resume: bool = False) -> dict[str, Any]:
        """Convert and write; what was interrupted goes on with ``resume``.

        Args:
            out: Where to.
            model: Name of the source.
            device: Where layers run.
            progress: Told how far it is.
            resume: Go on with an unfinished conversion of the same to ``out``.

        Returns:
            What ``latentize convert --json`` prints; nothing in all but the first of several processes.
        """
        device = own_device(device)
        with together(device):
            self.team = team()
            if self.team.leads:
                return self._lead(out, model, device, progress, resume)
            if self.shares and not self.team.told(True):
                self._follow(device)
            return {}

    def _follow(self, device: str) -> None:
        """What every process but the first does: its share, and nothing is written or said."""
        trust: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        source = self.open(device)
        self.self_generated = self.sequences_to_generate(source)
        text = draw_text(self.checkpoint.path, self.recipe, self.spec.max_positions, **trust)
        self.writer = self.kind(NoFolder(), self.checkpoint, self.spec, self.dtype)
        with finite_numbers(self.other_ways()):
            self.convert(source, text, None, silent)

    def _lead(self, out: Path, model: str, device: str, progress: Progress, resume: bool) -> dict[str, Any]:
        """What the only process does, or the first."""
        started = time.time()
        with Journal(out, resume=resume) as journal, within_memory():
            if self.shares:
                self.team.told(journal.done is not None)
            if journal.done is not None:
                journal.remove()
                return journal.done
            trust: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
            source = self.open(device)
            self._check_room(out)
            self._check_memory(source)
            self.self_generated = self.sequences_to_generate(source)
            text = draw_text(self.checkpoint.path, self.recipe, self.spec.max_positions, **trust)
            for part in (text.calibration, text.selection, text.evaluation):
                require_rows(part.tokens_NT, self.spec.vocab_size, self.checkpoint.path)
            self.notes += text.notes
            self.restyled, self.repeated = text.restyled, text.repeated
            self.proved = self.prove(source, text, progress)
            request = self.request(model, text)
            journal.begin(request)
            with OutputFolder(out, journal=journal) as folder:
                self.writer = self.kind(folder, self.checkpoint, self.spec, self.dtype)
                progress = self._timed(progress, source)
                memory = keeping_freed_memory() if self.memory.keeps_freed else contextlib.nullcontext()
                with finite_numbers(self.other_ways()), memory:
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
            source={"model": model, **described(self.spec), "files": hashes, **self._quantization()},
            recipe=self.recipe.model_dump(mode="json"),
            layers=report["layers"],
            measurements=measurements,
            notes=self.notes,
        )
        sees = self.checkpoint.whole is not None and self.writer.name == "native"
        folder.copy_tokenizer(self.checkpoint.path, processor=sees)
        facts = (self.spec, self.recipe, report, self.notes)
        folder.write_text("README.md", card.render(model, self.checkpoint.path, *facts))

        def last(partial: Path) -> None:
            write_report(partial, name=folder.out.name)
            # The embedding, which comes last, may have been the largest of all.
            report["peak_rss_bytes"] = peak_rss_bytes()
            journal.finish(report)

        folder.finish(self.writer.config(), manifest, last)

    def _report(self, done: Converted, started: float) -> dict[str, Any]:
        self._note(done)
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
            "self_generated_tokens": self.self_generated * self.recipe.sequence_length,
            "restyled_tokens": self.restyled,
            "repeated_tokens": self.repeated,
            "reading_error": self.proved,
            "seconds": round(time.time() - started, 2),
            **({"processes": self.team.size} if self.shares and self.team.size > 1 else {}),
            "peak_rss_bytes": peak_rss_bytes(),
            "predicted_peak_rss_bytes": self.memory.peak,
            "layers": self._layers(done),
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

    def _layers(self, done: Converted) -> list[dict[str, Any]]:
        """What became of each layer."""
        facts = done.facts or [{}] * len(done.errors)
        measured = zip(self.layer_shapes(), done.errors, done.massive, facts, strict=True)
        return [
            {
                **sizes,
                "error_before_refine": before,
                "error_after_refine": after,
                "massive_tokens": massive._asdict(),
                **more,
            }
            for sizes, (before, after), massive, more in measured
        ]

    def _note(self, done: Converted) -> None:
        """Say what numbers alone would not."""
        if done.linear_fit is not None:
            kl = done.linear_fit.kl / done.linear_fit.tokens
            self.notes.append(f"the linear fit alone, nothing compressed or refined, is {kl:.2g} nats from the source")
        reach, longest = self.recipe.reach, self.spec.max_positions
        if self.recipe.to == "mla" and reach < longest:
            self.notes.append(
                f"calibrated on distances up to {reach:,} tokens, the model is made for {longest:,}: what "
                f"comes later in a context may be predicted far worse (latentize eval --sequence-length {longest})"
            )
        lost, made = (max((getattr(m, kind) for m in done.massive), default=0) for kind in ("lost", "made"))
        if lost or made:
            self.notes.append(
                f"of the tokens whose residual stream is {MASSIVE:.0f} times as large as others' the conversion lost "
                f"{lost} in one layer at most, and made {made} new ones"
            )
