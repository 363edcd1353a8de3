"""The functions behind the commands."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentize import card
from latentize.calibrate.text import describe, documents
from latentize.calibrate.tokenizer import load_tokenizer
from latentize.calibrate.tokens import pack
from latentize.checkpoint import Checkpoint, Manifest, OutputFolder, resolve
from latentize.checkpoint.manifest import sha256
from latentize.convert.methods import Setting, pooled_heads, settings
from latentize.convert.pipeline import Converted, Effort, convert_latent, convert_pooled
from latentize.convert.polish import Polish
from latentize.convert.progress import Progress, silent
from latentize.convert.refine import Refinement
from latentize.convert.search import choose
from latentize.convert.source import SourceModel
from latentize.errors import ConfigError, FormatError, OptionError, OutputError
from latentize.families import ModelSpec, model_spec
from latentize.formats.deepseek_v3 import DeepseekWriter, portable_reasons
from latentize.formats.native import NativeWriter
from latentize.formats.pooled import PooledWriter
from latentize.machine import keeping_freed_memory, peak_rss_bytes
from latentize.recipe import Recipe

if TYPE_CHECKING:
    from latentize.formats.base import FormatWriter

__all__ = ["convert", "evaluate", "generate", "open_source", "verify"]


def open_source(model: str | Path) -> tuple[Checkpoint, ModelSpec]:
    """Open a checkpoint and hold it against its family's table.

    Raises:
        CheckpointError, ConfigError: files are damaged, or contradict ``config.json``.
        UnsupportedModelError: not a family that can be converted.
    """
    checkpoint = Checkpoint(resolve(model))
    spec = model_spec(checkpoint.config)
    checkpoint.check_tensors(spec.tensor_shapes(), ignore=["lm_head.weight"] if spec.tied else [])
    if spec.tied and "lm_head.weight" in checkpoint:
        head, embedding = checkpoint.load("lm_head.weight"), checkpoint.load("model.embed_tokens.weight")
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise ConfigError(
                "tie_word_embeddings is true, yet lm_head.weight differs from the embedding",
                where=str(checkpoint.folder / "config.json"),
                fix="set tie_word_embeddings to false",
            )
    return checkpoint, spec


# Steps of refinement where the layers are polished together afterwards, which is then the better use of the time.
_BEFORE_POLISH = 200


@dataclass
class _Text:
    calibration_NT: Tensor
    selection_NT: Tensor
    evaluation_NT: Tensor


def _tokens(folder: Path, recipe: Recipe) -> _Text:
    """Three disjoint sets: for statistics, for choices, for the numbers that are reported."""
    tokenizer, length = load_tokenizer(folder), recipe.sequence_length

    def draw(split: str, tokens: int, seed: int = 0) -> Tensor:
        stream = documents(recipe.data, split)  # type: ignore[arg-type]
        return pack(tokenizer, stream, tokens=tokens, sequence_length=length, seed=seed)

    rows = draw("calibration", recipe.calibration_tokens + recipe.selection_tokens, recipe.seed)
    held = max(1, min(recipe.selection_tokens // length, len(rows) // 4)) if len(rows) > 1 else 0
    # One sequence alone has to serve for everything.
    selection, calibration = rows[: held or 1], rows[held : held + max(1, recipe.calibration_tokens // length)]
    return _Text(calibration, selection, draw("heldout", recipe.evaluation_tokens))


def _format(
    recipe: Recipe, spec: ModelSpec, candidates: list[Setting]
) -> tuple[type[FormatWriter], list[Setting], list[str]]:
    """The writer, the settings that it can hold, and why not the portable one if it was not asked for."""
    # A format that holds any frequencies has no use for a ladder.
    free = [setting for setting in candidates if setting.stride is None]
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


def convert(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    **entries: Any,
) -> dict[str, Any]:
    """Convert a checkpoint and write the result to ``out``.

    Args:
        model: A folder or a hub id.
        out: A folder that does not exist yet.
        recipe: What to do; or give its entries as keyword arguments.
        device: Where layers run.
        progress: Told how far it is.

    Returns:
        What ``latentize convert --json`` prints.

    Raises:
        LatentizeError: anything that the user can mend; nothing is left at ``out``.
    """
    started = time.time()
    recipe = recipe or Recipe.build(**entries)
    checkpoint, spec = open_source(model)
    if Path(out).expanduser().absolute() == checkpoint.folder:
        raise OutputError("the output would overwrite the model", where=str(out), fix="choose another folder")
    with OutputFolder(Path(out)) as folder:
        if recipe.to != "mla":
            job = _PooledJob(recipe, checkpoint, spec, folder)
        else:
            job = _LatentJob(recipe, checkpoint, spec, folder)
        result = job.run(str(model), device, progress, started)
    return result


def _effort(recipe: Recipe, source: SourceModel) -> Effort:
    """What is done beyond the closed form. The order of the sequences follows from the seed."""
    if not recipe.refines:
        return Effort()
    # The whole model has to be in memory for it, and moves at every step.
    polish = not source.large if recipe.polish is None else recipe.polish
    width = source.spec.attention.hidden_size
    refinement = Refinement(seed=recipe.seed)
    if not polish:
        return Effort(refinement.at_width(width))
    before = replace(refinement, steps=_BEFORE_POLISH)
    return Effort(before.at_width(width), Polish(seed=recipe.seed).at_width(width))


class _Job:
    """One conversion, from checked input to finished folder."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, spec: ModelSpec, folder: OutputFolder) -> None:
        self.recipe, self.checkpoint, self.spec, self.folder = recipe, checkpoint, spec, folder
        self.dtype = getattr(torch, recipe.dtype)
        self.setting: Setting | None = None
        self.notes: list[str] = []
        self.scores: list[dict[str, Any]] = []
        self.writer: FormatWriter = self.make_writer()

    def make_writer(self) -> FormatWriter:
        raise TypeError

    def convert(self, source: SourceModel, text: _Text, progress: Progress) -> Converted:
        raise TypeError

    def shape(self) -> dict[str, Any]:
        """The JSON entries that say what attention became."""
        raise TypeError

    def run(self, model: str, device: str, progress: Progress, started: float) -> dict[str, Any]:
        text = _tokens(self.checkpoint.folder, self.recipe)
        source = SourceModel(self.checkpoint, self.spec, device)
        # A model that is large beside the machine's memory has none to keep.
        with contextlib.nullcontext() if source.large else keeping_freed_memory():
            done = self.convert(source, text, progress)
        self.writer.top()
        report = self._report(done, time.time() - started)
        measurements = {k: v for k, v in report.items() if k not in ("seconds", "peak_rss_bytes", "layers")}
        source_hashes = {p.name: sha256(p) for p in self.checkpoint.files}
        manifest = Manifest(
            format=self.writer.name,
            source={"model": model, "model_type": self.spec.table.model_type, "files": source_hashes},
            recipe=self.recipe.model_dump(mode="json"),
            layers=report["layers"],
            measurements=measurements,
            notes=self.notes,
        )
        self.folder.copy_tokenizer(self.checkpoint.folder)
        self.folder.write_text("README.md", card.render(model, self.spec, self.recipe, report, self.notes))
        self.folder.finish(self.writer.config(), manifest)
        return report

    def _report(self, done: Converted, seconds: float) -> dict[str, Any]:
        quality = done.quality.describe()
        return {
            "format": self.writer.name,
            "to": self.recipe.to,
            **self.shape(),
            "source_cache_values_per_token_layer": self.spec.cache_values,
            "calibration_tokens": done.calibration_tokens,
            "calibration_text": describe(self.recipe.data),
            "seconds": round(seconds, 2),
            "peak_rss_bytes": peak_rss_bytes(),
            "layers": [{"error_before_refine": b, "error_after_refine": a} for b, a in done.errors],
            "source_perplexity": quality["reference_perplexity"],
            "perplexity": quality["perplexity"],
            "excess_loss": done.quality.excess,
            "closed_form_excess_loss": None if done.closed_form is None else done.closed_form.excess,
            "kl": quality["kl"],
            "top1_agreement": quality["top1_agreement"],
            "evaluation_tokens": quality["tokens"],
            "candidates": self.scores,
            "notes": self.notes,
        }


class _LatentJob(_Job):
    """To multi-head latent attention."""

    def make_writer(self) -> FormatWriter:
        allowed = settings(self.recipe, self.spec.attention)
        writer, self.candidates, self.notes = _format(self.recipe, self.spec, allowed)
        return writer(self.folder, self.checkpoint, self.spec, self.dtype)

    def convert(self, source: SourceModel, text: _Text, progress: Progress) -> Converted:
        effort = _effort(self.recipe, source)
        best, scores = choose(
            source, self.candidates, text.calibration_NT, text.selection_NT, self.recipe.refines, progress
        )
        self.setting = best
        self.writer.rope_theta = best.rope_theta(self.spec.attention)
        self.scores = [{**s.describe(), "selection_kl": kl} for s, kl in scores]
        self.notes += best.approximations(self.spec.attention)
        texts = (text.calibration_NT, text.selection_NT, text.evaluation_NT)
        return convert_latent(source, best, self.writer, *texts, effort, progress)

    def shape(self) -> dict[str, Any]:
        s = self.setting
        assert s is not None
        return {
            "method": s.method,
            "setting": s.describe(),
            "kv_lora_rank": s.kv_lora_rank,
            "qk_rope_head_dim": s.qk_rope_head_dim,
            "rope_theta": self.writer.rope_theta,
            "cache_values_per_token_layer": s.cache_values,
            "keep": s.cache_values / self.spec.cache_values,
        }


class _PooledJob(_Job):
    """To fewer kv heads."""

    def make_writer(self) -> FormatWriter:
        self.kv_heads = pooled_heads(self.recipe, self.spec.attention)
        return PooledWriter(self.folder, self.checkpoint, self.spec, self.dtype)

    def convert(self, source: SourceModel, text: _Text, progress: Progress) -> Converted:
        return convert_pooled(source, self.kv_heads, self.writer, text.evaluation_NT, progress, dtype=self.dtype)

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


def _torch_dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise OptionError(f"no such precision: '{name}'", where="--dtype", fix="float32, bfloat16 or float16")
    return getattr(torch, name)


def evaluate(
    model: str | Path, reference: str | Path | None = None, *, dtype: str = "float32", **options: Any
) -> dict[str, Any]:
    """What ``latentize eval --json`` prints; options as in :func:`latentize.evaluate.quality.evaluate`."""
    from latentize.evaluate.quality import evaluate as measure

    folder, source = resolve(model), None if reference is None else resolve(reference)
    quality = measure(folder, source, dtype=_torch_dtype(dtype), **options)
    entries: dict[str, Any] = quality.describe()
    if reference is None:
        entries |= {"reference_perplexity": None, "kl": None, "top1_agreement": None}
    else:
        entries["excess_loss"] = quality.excess
    return {**entries, "text": describe(options.get("data", ()))}


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    cache: str | None = None,
    window: int | None = None,
    stream: bool = False,
) -> dict[str, Any]:
    """What ``latentize generate --json`` prints; with ``stream`` the text is printed as it comes.

    A model with latent attention is accelerated.

    Args:
        model: A folder or a hub id.
        prompt: Text to continue.
        max_new_tokens: At most so many.
        temperature: 0 takes the most likely token.
        seed: For sampling.
        dtype: Precision to run in.
        device: Where.
        cache: ``LATENT[+ROPE]``, formats of :class:`LatentCache`.
        window: Keep the last so many tokens, and the first four.
        stream: Print the text as it comes.

    Raises:
        OptionError: a cache format or a window for a model that has no latents.
    """
    from latentize.evaluate.load import load_model
    from latentize.runtime.accelerate import accelerate, has_latents, no_latents
    from latentize.runtime.cache import LatentCache, cache_formats
    from latentize.runtime.generate import generate as run

    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, dtype=_torch_dtype(dtype), device=device)
    streamer = None
    if stream:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "streamer": streamer}
    if has_latents(loaded):
        options["cache"] = LatentCache(accelerate(loaded).config, window=window, **cache_formats(cache))
    elif cache is not None or window is not None:
        raise no_latents("--cache, --window")
    return vars(run(loaded, tokenizer, prompt, **options))


def bench(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    contexts: Sequence[int] = (512, 2048),
    batches: Sequence[int] = (1,),
    cache: str | None = None,
    stock: bool = True,
    dtype: str = "bfloat16",
    device: str = "cpu",
    steps: int = 16,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What ``latentize bench --json`` prints: prefill and decode, side by side in one run.

    Args:
        model: A folder or a hub id.
        reference: The source, to compare with.
        contexts: Tokens of the prompt.
        batches: Sequences.
        cache: ``LATENT[+ROPE]``: measure that cache, too.
        stock: Measure the model without ``accelerate``, too.
        dtype: Precision to run in.
        device: Where.
        steps: Decode steps that are timed.
        progress: Told how far it is.

    Raises:
        OptionError: a cache format for a model that has no latents.
    """
    from latentize.bench.decode import copy_bandwidth, measure
    from latentize.bench.subjects import subjects_of
    from latentize.runtime.cache import cache_formats

    source = None if reference is None else resolve(reference)
    subjects = subjects_of(
        resolve(model), source, cache_formats(cache), stock=stock, dtype=_torch_dtype(dtype), device=device
    )
    bandwidth = copy_bandwidth(device)
    options: dict[str, Any] = {"steps": steps, "bandwidth": bandwidth, "device": device, "progress": progress}
    rows = [row for b in batches for c in contexts for row in measure(subjects, context=c, batch=b, **options)]
    return {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "rows": [row.describe() for row in rows],
    }


def verify(out: str | Path) -> dict[str, Any]:
    """What ``latentize verify --json`` prints.

    Raises:
        CheckpointError: something is wrong with the output.
    """
    from latentize.evaluate.verify import TOLERANCE, require
    from latentize.evaluate.verify import verify as check

    verdict = check(Path(out))
    require(verdict, Path(out))
    return {"ok": verdict.ok, "tolerance": TOLERANCE, **{k: v for k, v in vars(verdict).items() if k != "problems"}}
