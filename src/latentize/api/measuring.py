"""What a model lost, and how fast it is: ``eval``, ``compare`` and ``bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from latentize.api.options import torch_dtype
from latentize.checkpoint import resolve
from latentize.errors import OptionError
from latentize.progress import Progress, silent
from latentize.text.documents import describe

__all__ = ["bench", "compare", "evaluate"]


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    dtype: str = "float32",
    probes: bool = False,
    lengths: Sequence[int] | None = None,
    samples: int = 4,
    tasks: Sequence[str] = (),
    task_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What ``latentize eval --json`` prints.

    Args:
        model: A folder, a GGUF file or a hub id.
        reference: The source, to compare with.
        dtype: Precision to run in.
        probes: Ask for what lies far back in long contexts, too.
        lengths, samples: As in :func:`latentize.evaluation.probes.probe`.
        tasks: Names of lm-eval's, or paths of YAML.
        task_options: ``include_path``, ``limit``, ``num_fewshot``, ``batch_size``, as in
            :func:`latentize.evaluation.tasks.run_tasks`.
        options: As in :func:`latentize.evaluation.quality.evaluate`. Under ``torchrun`` every process calls this, and
            they share the text; the first one answers tasks and probes.

    Returns:
        Nothing but on the first of several processes.
    """
    from latentize.evaluation.probes import probe
    from latentize.evaluation.quality import evaluate as measure
    from latentize.processes import own_device, team, together

    folder, source = resolve(model), None if reference is None else resolve(reference)
    options["dtype"] = torch_dtype(dtype)
    options["device"] = own_device(options.get("device", "cpu"))
    with together(options["device"]):
        leads = team().leads
        # First: what goes wrong with tasks should not do so after minutes of other measurements.
        answered = _tasks(folder, source, tasks, dict(task_options or {}), options) if tasks and leads else None
        found = measure(folder, source, **options, team=team()).describe()
    if not leads:
        return {}
    entries = {**found, "text": describe(options.get("data", ()))}
    if probes:
        shared = {name: value for name, value in options.items() if name not in ("tokens", "sequence_length", "split")}
        entries["probes"] = probe(folder, source, lengths=lengths, samples=samples, **shared)
    return entries if answered is None else {**entries, "tasks": answered}


def _tasks(
    folder: Path, source: Path | None, tasks: Sequence[str], own: dict[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    from latentize.evaluation.tasks import run_tasks

    for option in ("cache", "window"):
        if options.get(option) is not None:
            raise OptionError(
                "lm-eval runs a model with its own cache, not with this one",
                where=f"--tasks with --{option}",
                fix="measure the two in separate runs",
            )
    own |= {name: options[name] for name in ("dtype", "device", "progress") if name in options}
    return run_tasks(folder, source, tasks=tasks, **own)


def compare(
    source: str | Path,
    models: Sequence[str],
    *,
    cache: Sequence[str] = (),
    dtype: str = "float32",
    **options: Any,
) -> dict[str, Any]:
    """What ``latentize compare --json`` prints.

    Args:
        source: A folder, a GGUF file or a hub id: what the models were made from.
        models: Folders or hub ids.
        cache: ``LATENT[+ROPE]``: each model also with these formats, and the source with transformers' own.
        dtype: Precision to run in.
        options: As in :func:`latentize.evaluation.compare.compare`. Under ``torchrun`` every process calls this, and
            they share the text.

    Returns:
        Nothing but on the first of several processes.
    """
    from latentize.evaluation.compare import as_json, names_of
    from latentize.evaluation.compare import compare as run
    from latentize.processes import own_device, team, together

    folders = {name: resolve(model) for name, model in zip(names_of(models), models, strict=True)}
    options["dtype"] = torch_dtype(dtype)
    options["device"] = own_device(options.get("device", "cpu"))
    with together(options["device"]):
        rows, notes, count = run(resolve(source), folders, caches=cache, **options, team=team())
        if not team().leads:
            return {}
    return {
        "source": str(source),
        "tokens": count,
        "text": describe(options.get("data", ())),
        "rows": as_json(rows),
        "notes": notes,
    }


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
        model: A folder, a GGUF file or a hub id.
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
        resolve(model), source, cache_formats(cache), stock=stock, dtype=torch_dtype(dtype), device=device
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
