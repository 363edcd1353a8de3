"""The functions behind the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentize.checkpoint import Manifest, open_checkpoint, resolve
from latentize.conversion.job import Job
from latentize.conversion.latent import LatentJob
from latentize.conversion.lowered import LowerJob
from latentize.conversion.pooled import PooledJob
from latentize.errors import CheckpointError, OptionError, OutputError
from latentize.families import is_latent
from latentize.families.opening import checked_spec, open_source
from latentize.paths import expanded
from latentize.progress import Progress, silent
from latentize.recipe import Recipe
from latentize.report.measurements import is_output, record, require_record
from latentize.report.page import require_report as require_report_of
from latentize.report.page import verdict, write_report
from latentize.text.decoding import without_surrogates
from latentize.text.documents import describe, documents
from latentize.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from latentize.healing.parallel import Parallel

__all__ = ["convert", "evaluate", "export", "generate", "heal", "open_source", "verify"]


def convert(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **entries: Any,
) -> dict[str, Any]:
    """Convert a checkpoint and write the result to ``out``; of one that has latent attention already, lower the rank.

    Args:
        model: A folder, a GGUF file or a hub id.
        out: A folder that does not exist yet.
        recipe: What to do; or give its entries as keyword arguments.
        device: Where layers run.
        resume: Go on with an unfinished conversion of the same to ``out``; the result is what it would have been.
        trust_remote_code: Let transformers run code that lies in the checkpoint, for a model or a tokenizer that needs
            it; the architecture has to have a table all the same. Without it no such code is ever run.
        progress: Told how far it is.

    Under ``torchrun`` every process calls this, and they share the work.

    Returns:
        What ``latentize convert --json`` prints; nothing but on the first of several processes.

    Raises:
        LatentizeError: anything that the user can mend; nothing is left at ``out``. What an interruption or a full disk
            has left unfinished stays in ``OUT.partial-…``, if anything in it took long.
    """
    recipe = recipe or Recipe.build(**entries)
    checkpoint = open_checkpoint(resolve(model, code=trust_remote_code))
    job: Job
    if is_latent(checkpoint.config):
        job = LowerJob(recipe, checkpoint)
    else:
        trust = {"trust_remote_code": trust_remote_code}
        spec = checked_spec(checkpoint, **trust)
        job = (LatentJob if recipe.to == "mla" else PooledJob)(recipe, checkpoint, spec, **trust)
    if expanded(out).absolute() == checkpoint.path:
        raise OutputError(
            "the output would overwrite the model", code="LZ404", where=str(out), fix="choose another folder"
        )
    return job.run(expanded(out), str(model), device, progress, resume)


def heal(
    model: str | Path,
    out: str | Path,
    teacher: str | Path,
    *,
    device: str = "cpu",
    parallel: Parallel = "fsdp",
    sequences: int = 4,
    recompute: bool = False,
    autocast: bool | None = None,
    save_every: int = 50,
    resume: bool = False,
    track: str | None = None,
    progress: Progress = silent,
    **entries: Any,
) -> dict[str, Any]:
    """Train an output of latentize towards its source, and write the result to ``out``.

    Under ``torchrun`` every process calls this; they share the work.

    Args:
        model: The output, a folder.
        out: A folder that does not exist yet.
        teacher: The source: a folder, a GGUF file or a hub id.
        device: Where to run.
        parallel: ``fsdp`` or ``ddp``, if there are several processes.
        sequences: At a time; a step that has more accumulates gradients.
        recompute: Less memory for more time: no activations are kept inside layers.
        autocast: Multiply in bfloat16; by default where the machine is faster at it.
        save_every: Steps between the states that ``resume`` can go on from.
        resume: Go on with an unfinished healing of the same ``out``.
        track: ``tensorboard`` or ``trackio``, beside the metrics that are written in any case.
        progress: Told how far it is.
        **entries: As in :class:`latentize.healing.recipe.Healing`.

    Returns:
        What ``latentize heal --json`` prints; nothing but on the first of several processes.

    Raises:
        LatentizeError: anything that the user can mend; an unfinished healing stays in ``OUT.healing``.
    """
    from latentize.healing.loop import Execution
    from latentize.healing.parallel import Team
    from latentize.healing.recipe import Healing
    from latentize.healing.run import heal as run
    from latentize.machine import multiplies_bfloat16
    from latentize.processes import together

    healing = Healing.build(**entries)
    machine = Execution(
        autocast=multiplies_bfloat16(torch.device(device).type) if autocast is None else autocast,
        sequences=sequences,
        recompute=recompute,
        save_every=save_every,
    )
    folder, out = expanded(model), expanded(out)
    if not is_output(folder):
        raise CheckpointError(
            "not an output of latentize",
            code="LZ118",
            where=str(model),
            fix="convert the model first; healing starts from that",
        )
    with together(device):
        team = Team(parallel, device)
        options: dict[str, Any] = {"machine": machine, "team": team, "resume": resume, "track": track}
        options["progress"] = progress
        return run(folder, out, resolve(teacher), healing, **options)


def _torch_dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise OptionError(f"no such precision: '{name}'", where="--dtype", fix="float32, bfloat16 or float16")
    return getattr(torch, name)


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
    options["dtype"] = _torch_dtype(dtype)
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
    options["dtype"] = _torch_dtype(dtype)
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
        model: A folder, a GGUF file or a hub id.
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
    from latentize.modeling.generation import without_guesses
    from latentize.modeling.load import load_model
    from latentize.runtime.accelerate import accelerate, has_latents, no_latents
    from latentize.runtime.cache import LatentCache, cache_formats
    from latentize.runtime.generate import generate as run

    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    notes: list[str] = []
    loaded = load_model(folder, dtype=_torch_dtype(dtype), device=device, notes=notes)
    text = without_surrogates(prompt)
    if text != prompt:
        notes.append("what is not UTF-8 in the prompt is read as U+FFFD")
    if window is not None:
        notes += without_guesses(loaded)
    streamer, beams = None, (loaded.generation_config.num_beams or 1) > 1
    if stream and not beams:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "streamer": streamer}
    if has_latents(loaded):
        options["cache"] = LatentCache(accelerate(loaded).config, window=window, **cache_formats(cache))
    elif cache is not None or window is not None:
        raise no_latents("--cache, --window")
    result = vars(run(loaded, tokenizer, text, **options))
    if stream and beams:
        # Which beam is the likeliest is known in the end.
        print(text + result["text"])
    return {**result, "notes": notes}


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


def require_report(model: str | Path) -> None:
    """That what will be measured of an output of latentize can be added to its report; before it is measured.

    Args:
        model: What is to be measured; of what is no output of latentize nothing is kept.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: what the folder says of itself is damaged.
    """
    folder = Path(model)
    if is_output(folder):
        require_record(folder)
        require_report_of(folder)


def extend_report(model: str | Path, kind: str, result: dict[str, Any]) -> Path | None:
    """Add what was measured to the report of an output of latentize; of any other model nothing is kept.

    Args:
        model: What was measured.
        kind: ``eval``, ``bench`` or ``sample``.
        result: What was found.

    Returns:
        The report, or ``None`` where there is none.

    Raises:
        OutputError: the folder cannot be written; what was measured is to be printed before.
        CheckpointError: what the folder says of itself is damaged.
    """
    folder = expanded(model)
    if not is_output(folder):
        return None
    record(folder, kind, result)
    return write_report(folder)


def report(
    out: str | Path, reference: str | Path | None = None, *, prompt: str = "", tokens: int = 64
) -> dict[str, Any]:
    """What ``latentize report --json`` prints; writes ``report.html``.

    Args:
        out: An output of latentize.
        reference: Its source: then both continue a prompt, side by side.
        prompt: What to continue; by default the beginning of a held-out document.
        tokens: How long.

    Raises:
        CheckpointError: the folder is not an output of latentize.
        OutputError: the folder cannot be written.
    """
    folder = expanded(out)
    if is_output(folder):
        require_record(folder)
    path = write_report(folder)
    if reference is not None:
        prompt = prompt or " ".join(next(iter(documents((), "heldout"))).split(" ")[:24])
        made = {
            name: generate(model, prompt, max_new_tokens=tokens)["text"]
            for name, model in (("source", reference), ("converted", folder))
        }
        path = extend_report(folder, "sample", {"prompt": prompt, **made}) or path
    short, long = verdict(Manifest.load(folder).measurements["excess_loss"])
    return {"report": str(path), "bytes": path.stat().st_size, "verdict": short, "meaning": long}


def verify(
    out: str | Path,
    *,
    engine: str | None = None,
    folder: str | Path | None = None,
    kind: str = "f32",
    environment: str | Path | None = None,
    serve_on: str | None = None,
    **sizes: int,
) -> dict[str, Any]:
    """What ``latentize verify --json`` prints.

    Args:
        out: An output of latentize, or a GGUF file exported from one.
        engine: ``transformers``, ``llama.cpp`` or ``vllm``: compare what it computes with transformers in float32.
        folder: That a GGUF file was exported from.
        kind: Type of the GGUF file that is made for llama.cpp, where ``out`` is a folder.
        environment: The engine's virtual environment.
        serve_on: ``ENGINE`` or ``ENGINE@MACHINE``, as ``vllm@h100``: whether that would serve a model of these sizes
            (:func:`latentize.planning.serving.serving`).
        sizes: ``prompts``, ``prompt_tokens``, ``new_tokens`` of :func:`latentize.engines.compare.verify_engine`.

    Raises:
        CheckpointError: something is wrong with the output.
        EngineError: the engine is missing, stops, or computes something else; or it would refuse the sizes.
        OptionError: no such engine, machine or type; a GGUF file without ``folder``.
    """
    from latentize.evaluation.verify import TOLERANCE, require
    from latentize.evaluation.verify import verify as check

    path, checked, planned = expanded(out), {}, {}
    if serve_on is not None:
        from latentize.planning.serving import required_serving

        planned = required_serving(str(folder or path), serve_on)
    if path.is_file():
        from latentize.formats.gguf_check import check_gguf

        if folder is None:
            raise OptionError(
                "a GGUF file is compared with the folder it was made from", where="--folder", fix="give it"
            )
        checked = {"ok": True, **check_gguf(path, expanded(folder))}
    elif engine is None:
        verdict = check(path)
        require(verdict, path)
        found = {k: v for k, v in vars(verdict).items() if k != "problems"}
        return {"ok": verdict.ok, "tolerance": TOLERANCE, **found, **planned}
    if engine is None:
        return {**checked, **planned}
    from latentize.engines.compare import verify_engine

    options: dict[str, Any] = {
        "folder": folder and expanded(folder),
        "environment": environment and expanded(environment),
    }
    return {"ok": True, **checked, **planned, **verify_engine(engine, path, kind=kind, **{**options, **sizes})}


def export(
    model: str | Path, out: str | Path | None = None, *, to: str = "gguf", kind: str = "bf16", overwrite: bool = False
) -> dict[str, Any]:
    """Write a portable folder for another engine, read it back and compare: ``latentize export``.

    Args:
        model: A portable folder.
        out: The file; by default beside the folder, named after it and the type.
        to: ``gguf``.
        kind: ``f32``, ``bf16``, ``f16`` or ``q8_0``.
        overwrite: Replace a file that is there.

    Returns:
        What :func:`latentize.formats.gguf.write_gguf` says, with ``largest_error`` by type.

    Raises:
        FormatError: the folder is native, or has what the engine cannot hold, or the type damages it.
        OptionError: no such target or type; the ``gguf`` package is missing.
        OutputError: the file exists or cannot be written.
    """
    from latentize.formats.gguf import write_gguf
    from latentize.formats.gguf_check import check_gguf

    if to != "gguf":
        fix = "a portable folder needs no export" if to == "deepseek_v3" else "gguf"
        raise OptionError(f"nothing is exported to '{to}'", where="--to", fix=fix)
    folder = resolve(model)
    path = expanded(out) if out is not None else folder.absolute().with_name(f"{folder.absolute().name}-{kind}.gguf")
    result = write_gguf(folder, path, kind, overwrite=overwrite)
    return {**result, "largest_error": check_gguf(path, folder)["largest_error"]}
