"""The command line. Each command parses, calls one function, and prints."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from latentize.errors import LatentizeError, OptionError, OutputError, ResourceError
from latentize.paths import expanded

if TYPE_CHECKING:
    from latentize.progress import Progress

app = typer.Typer(
    help="The same model, a smaller KV cache: turns attention into multi-head latent attention (MLA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# What is printed is what people have named things: brackets and colons in it are no style.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
console = Console(**_PLAIN)
# Progress goes to stderr, so that stdout can be piped.
status = Console(stderr=True, **_PLAIN)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a checkpoint, a GGUF file, or a hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: .txt, .md, .jsonl or .parquet, a folder, - for stdin, or a hub data set. Repeat for several."
    ),
]
CacheFormat = Annotated[
    str | None,
    typer.Option(metavar="LATENT[+ROPE]", help="Cache in bf16, fp16, fp32, fp8, int8 or int4; as int4 or int4+bf16."),
]
SpreadOver = Annotated[
    int | None,
    typer.Option(help="Context that the text's positions are spread over. Default: the model's own, at most 32768."),
]
Keep = Annotated[str | None, typer.Option(help="Share of the source's cached values to keep, as 25% or 0.25.")]


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on a terminal; a line a step elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=status, disable=not status.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int, detail: str = "") -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, detail="")
            bar.update(tasks[what], completed=done, detail=detail)
            if not status.is_terminal:
                print(f"{what}: {done}/{total}  {detail}".rstrip(), file=sys.stderr, flush=True)

        yield tell


def _emit(entries: Any, as_json: bool, *tables: Table) -> None:
    with _printing():
        if as_json:
            print(json.dumps(entries))
        for table in () if as_json else tables:
            console.print(table)


@contextmanager
def _printing() -> Iterator[None]:
    """What is printed in here is out afterwards.

    Raises:
        OutputError: it is not.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read it has enough.
        raise
    except OSError as error:
        # Python would try again at its end.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(
            f"the result cannot be printed: {error.strerror}", code="LZ405", where="stdout", fix="make room there"
        ) from error


@contextmanager
def _kept(model: str, kind: str, result: dict[str, Any]) -> Iterator[None]:
    """Print in here: what was measured is added to the model's report afterwards, printed or not."""
    from latentize.api import extend_report

    try:
        yield
    finally:
        extend_report(model, kind, result)


def _facts(title: str, rows: dict[str, Any]) -> Table:
    # A title is folded to the table's width; a path should not be.
    width = min(len(title), console.width)
    table = Table(title=title, show_header=False, title_justify="left", min_width=width)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _print_version(asked: bool) -> None:
    if asked:
        from latentize import __version__

        print(f"latentize {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None: ...


@app.command()
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Say what a model is, what its KV cache weighs, and what can be done with it."""
    from latentize.planning.inspection import inspect as look

    facts = look(model)
    shown = {k: v for k, v in facts.items() if k not in ("methods", "quantization")}
    table = Table(title="What can be done with it", title_justify="left")
    for column in ("method", "result", "why"):
        table.add_column(column)
    for entry in facts["methods"]:
        table.add_row(entry["method"], entry["result"], entry["why"])
    _emit(facts, as_json, _facts(model, shown), table)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a config.json, a GGUF file, or a hub id.")],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context. Default: the model's maximum.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    keep: Keep = "25%",
    window: Annotated[int, typer.Option(min=1, help="Tokens of the sliding-window row.")] = 4096,
    device: Annotated[
        str | None,
        typer.Option(help="What fits on h200, h100, a100, l40s, mi300x, rtx4090, rtx3090, or cpu: this one."),
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GB of the machine's memory.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of that memory.")] = None,
    tflops: Annotated[float | None, typer.Option(help="16-bit TFLOPS of the machine.")] = None,
    reserve: Annotated[str, typer.Option(help="Share of the memory that is for something else.")] = "10%",
    weight_bits: Annotated[float, typer.Option(help="Bits of a stored weight.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Compare the bytes of the KV cache: MHA, MQA, GQA, MLA, window, int8, int4; with a machine, what fits and how
    fast. Reads no weights."""
    from latentize.planning.inspection import plan as compute
    from latentize.report.tables import capacity_tables, conversions_table, plan_table

    machine = {"device": device, "memory": memory, "bandwidth": bandwidth, "tflops": tflops, "weight_bits": weight_bits}
    result = compute(model, context=context, batch=batch, keep=keep, window=window, reserve=reserve, **machine)
    if as_json:
        _emit(result, True)
        return
    table, notes = plan_table(model, result)
    console.print(table)
    console.print("values: cached per token and layer", style="dim")
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}", style="dim")
    if "machine" in result:
        tables, notes = capacity_tables(result)
        if result.get("conversion"):
            tables.append(conversions_table(result))
        console.print(*tables, sep="\n")
        for note in notes:
            console.print(note, style="dim")


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    keep: Keep = None,
    kv_lora_rank: Annotated[int | None, typer.Option(help="Size of the latent, instead of --keep.")] = None,
    qk_rope_head_dim: Annotated[int | None, typer.Option(help="Size of a roped key, instead of --keep.")] = None,
    to: Annotated[str | None, typer.Option(help="mla, or gqa / mqa by mean-pooling heads. Default: mla.")] = None,
    method: Annotated[
        str | None, typer.Option(help="calibrated, transmla, mha2mla or care. Default: calibrated.")
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", help="auto, deepseek_v3 or native. Default: auto.")] = None,
    preset: Annotated[str | None, typer.Option(help="512+64: sizes that fast kernels are made for.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Closed form only: seconds instead of minutes.")] = False,
    polish: Annotated[
        bool | None, typer.Option(help="Train all layers together for a few steps. Default: where the model is small.")
    ] = None,
    freqfold: Annotated[
        int | None, typer.Option(help="transmla, care: frequencies folded; searched if absent.")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="mha2mla: high, low, uniform or 2-norm. Default: 2-norm.")
    ] = None,
    svd: Annotated[str | None, typer.Option(help="mha2mla: joint or split. Default: joint.")] = None,
    data: Data = None,
    tokens: Annotated[
        int | None, typer.Option(help="Calibration tokens of your text. Default: 131072; 32768 if nothing is refined.")
    ] = None,
    self_generated: Annotated[
        str | None,
        typer.Option(help="So many more that the model writes itself. Default: 50% of them where the model is small."),
    ] = None,
    restyled: Annotated[
        str | None,
        typer.Option(help="Share of them that is text in other styles. Default: 25%; none if nothing is refined."),
    ] = None,
    repeated: Annotated[
        str | None,
        typer.Option(help="Share of them where a passage is read twice. Default: 37.5%; none if nothing is refined."),
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per calibration sequence. Default: 512.")] = None,
    context: SpreadOver = None,
    dtype: Annotated[
        str | None, typer.Option(help="Saved precision: bfloat16, float16 or float32. Default: bfloat16.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe, or an output's latentize.json.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the calibration text. Default: 0.")] = None,
    device: Annotated[str, typer.Option(help="Where layers run.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished conversion to OUT.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that lies in the checkpoint, if it needs that.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to latent attention and say what it cost."""
    from latentize.recipe import Recipe

    given = {
        "keep": keep,
        "kv_lora_rank": kv_lora_rank,
        "qk_rope_head_dim": qk_rope_head_dim,
        "to": to,
        "preset": preset,
        "fast": fast or None,
        "polish": polish,
        "method": method,
        "format": format_,
        "freqfold": freqfold,
        "selection": selection,
        "svd": svd,
        "data": tuple(data) if data else None,
        "tokens": tokens,
        "self_generated": self_generated,
        "restyled": restyled,
        "repeated": repeated,
        "sequence_length": sequence_length,
        "context": context,
        "dtype": dtype,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    built = Recipe.load(recipe, **given) if recipe else Recipe.build(**given)
    from latentize.api import convert as run
    from latentize.report.tables import conversion_facts

    _return_freed_memory()
    with _progress() as progress:
        options = {"device": device, "resume": resume, "trust_remote_code": trust_remote_code}
        result = run(model, out, built, **options, progress=progress)
    _emit(result, as_json, _facts(str(out), conversion_facts(result)))
    if not as_json:
        # Not folded: a path is there to be copied.
        console.print(f"report: {expanded(out) / 'report.html'}", soft_wrap=True)


def _return_freed_memory() -> None:
    """Have glibc give every freed tensor back to the system, so that layers do not add up by fragmentation."""
    import ctypes

    threshold = -3  # M_MMAP_THRESHOLD
    # Another libc does as it likes.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(threshold, 1 << 22)


@app.command("eval")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The source, for KL and agreement.")] = None,
    data: Data = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure on.")] = 32_768,
    sequence_length: Annotated[int, typer.Option(min=2, help="Context of the predictions.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    cache: CacheFormat = None,
    window: Annotated[int | None, typer.Option(min=2, help="See only so many tokens, and the first 4.")] = None,
    probes: Annotated[bool, typer.Option("--probes", help="Ask for what lies far back, too.")] = False,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens of the probes' contexts. Default: 512,1024,2048.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples of each probe, length and depth.")] = 4,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Tasks of lm-eval, as hellaswag or longbench, or paths of their YAML."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder more of tasks for --tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task, at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of tasks at a time.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, calibration, and distance from a reference, on held-out text; by position, too."""
    from latentize.api import evaluate as run
    from latentize.api import require_report
    from latentize.report.tables import positions_table, probes_table, tasks_table

    options = {"data": tuple(data or ()), "tokens": tokens, "sequence_length": sequence_length, "cache": cache}
    options |= {"window": window, "probes": probes or lengths is not None, "samples": samples}
    options["lengths"] = None if lengths is None else _numbers(lengths, "--lengths")
    options["tasks"] = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    options["task_options"] = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
    options["task_options"]["batch_size"] = batch_size
    require_report(model)
    with _progress() as progress:
        result = run(model, reference, dtype=dtype, device=device, progress=progress, **options)
    plain = {k: v for k, v in result.items() if v is not None and not isinstance(v, list | dict)}
    shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in plain.items()}
    with _kept(model, "eval", {**result, "reference": reference, "cache": cache, "window": window}), _printing():
        _emit(result, as_json, _facts(model, shown), positions_table(result["by_position"]))
        if "probes" in result and not as_json:
            console.print(*probes_table(result["probes"]), sep="\n")
        if "tasks" in result and not as_json:
            console.print(*tasks_table(result["tasks"]), sep="\n")


@app.command()
def compare(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="What the models were made from.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids.")],
    cache: Annotated[
        list[str] | None, typer.Option(metavar="LATENT[+ROPE]", help="Each also with this cache. Repeat for several.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Each also with only so many tokens.")] = None,
    source_window: Annotated[
        list[int] | None, typer.Option(min=2, help="The source also with only so many. Repeat for several.")
    ] = None,
    data: Data = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure on.")] = 32_768,
    sequence_length: Annotated[int, typer.Option(min=2, help="Context of the predictions.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Write a chart, .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare models that were made from one: what each loses, for how many bytes of cache."""
    from latentize.api import compare as run
    from latentize.checkpoint.places import require_file, write_file
    from latentize.report.tables import compare_table

    options = {"cache": tuple(cache or ()), "window": window, "data": tuple(data or ()), "tokens": tokens}
    options |= {"source_windows": tuple(source_window or ())}
    options |= {"sequence_length": sequence_length, "dtype": dtype, "device": device}
    if plot is not None:
        require_file(expanded(plot))
    with _progress() as progress:
        result = run(source, models, progress=progress, **options)
    _emit(result, as_json, compare_table(result))
    if plot is not None:
        from latentize.report.pareto import pareto_chart

        write_file(expanded(plot), pareto_chart(result["rows"]))
    if not as_json:
        explained = "bytes: of cache a token, all layers; excess, KL: nats a token; worse than: in bytes and excess"
        for note in (explained, *result["notes"]):
            console.print(note, style="dim")


@app.command()
def heal(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that convert has written.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    teacher: Annotated[str, typer.Option(help="The source: a folder, a GGUF file or a hub id.")],
    data: Data = None,
    tokens: Annotated[int | None, typer.Option(help="Different tokens to learn from. Default: 262144.")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often each is learnt from. Default: 1.")] = None,
    train: Annotated[str | None, typer.Option(help="attention, all or lora. Default: attention.")] = None,
    ce: Annotated[
        float | None, typer.Option(help="Share of cross-entropy beside the teacher's KL. Default: 0.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of that KL. Default: 1.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep so many of the teacher's tokens on disk; it is not needed while training.")
    ] = None,
    match_hidden: Annotated[float | None, typer.Option(help="Weight of matching hidden states. Default: 0.")] = None,
    cache: CacheFormat = None,
    optimiser: Annotated[str | None, typer.Option(help="muon or adamw. Default: muon; adamw for lora.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Size of a step. Default: 0.01 muon, 0.0003 adamw, 0.002 lora.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up. Default: 5.")] = None,
    decay: Annotated[str | None, typer.Option(help="linear, cosine or 1-sqrt. Default: linear.")] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Tokens a step. Default: 1024.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a sequence. Default: 512.")] = None,
    context: SpreadOver = None,
    lora_rank: Annotated[int | None, typer.Option(help="Of the adapters. Default: 16.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Of the adapters. Default: 32.")] = None,
    looks: Annotated[int | None, typer.Option(help="How often held-out text is looked at. Default: 5.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Looks without a gain after which it ends. Default: never.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the text. Default: 1.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences at a time; more in a step accumulate.")] = 4,
    recompute: Annotated[bool, typer.Option(help="Less memory for more time.")] = False,
    autocast: Annotated[bool | None, typer.Option(help="Multiply in bfloat16. Default: where that is faster.")] = None,
    parallel: Annotated[str, typer.Option(help="Under torchrun: fsdp or ddp.")] = "fsdp",
    save_every: Annotated[int, typer.Option(min=1, help="Steps between states to resume from.")] = 50,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished healing of OUT.")] = False,
    track: Annotated[str | None, typer.Option(help="tensorboard or trackio, beside healing.jsonl.")] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Train a converted model towards its source, to recover what conversion lost."""
    given = {
        "data": tuple(data) if data else None,
        "tokens": tokens,
        "epochs": epochs,
        "train": train,
        "ce": ce,
        "temperature": temperature,
        "top_k": top_k,
        "match_hidden": match_hidden,
        "cache": cache,
        "optimiser": optimiser,
        "rate": rate,
        "warmup": warmup,
        "decay": decay,
        "step_tokens": step_tokens,
        "sequence_length": sequence_length,
        "context": context,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "looks": looks,
        "patience": patience,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    from latentize.api import heal as run
    from latentize.report.tables import healing_facts

    if parallel not in ("fsdp", "ddp"):
        raise OptionError(f"no such way: '{parallel}'", where="--parallel", fix="fsdp or ddp")
    machine: dict[str, Any] = {"sequences": sequences, "recompute": recompute, "autocast": autocast}
    with _progress() as progress:
        options = {**machine, "parallel": parallel, "save_every": save_every, "resume": resume}
        options |= {"track": track, "device": device, "progress": progress}
        result = run(model, out, teacher, **options, **given)
    # Of several processes the first one tells.
    if result:
        _emit(result, as_json, _facts(str(out), healing_facts(result)))


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that convert has written, or a GGUF file.")],
    engine: Annotated[str | None, typer.Option(help="Compare with: transformers, llama.cpp or vllm.")] = None,
    folder: Annotated[Path | None, typer.Option(help="What a GGUF file was exported from.")] = None,
    type_: Annotated[str, typer.Option("--type", help="Of the file made for llama.cpp: f32, bf16, f16, q8_0.")] = "f32",
    environment: Annotated[
        Path | None, typer.Option(help="The engine's virtual environment. Default: .engines/ENGINE.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many the engine gets.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens after each.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Check hashes, finiteness, and that expanded, absorbed, prefill and decode agree; a GGUF file against its folder;
    an engine against transformers in float32."""
    from latentize.api import verify as run

    sizes = {"prompts": prompts, "new_tokens": new_tokens}
    result = run(out, engine=engine, folder=folder, kind=type_, environment=environment, **sizes)
    shown = {k: f"{v:.2e}" if isinstance(v, float) else v for k, v in result.items()}
    _emit(result, as_json, _facts(f"{out} is whole", shown))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A portable folder that convert has written.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="File to write. Default: MODEL-TYPE.gguf.")
    ] = None,
    to: Annotated[str, typer.Option(help="gguf, for llama.cpp.")] = "gguf",
    type_: Annotated[str, typer.Option("--type", help="f32, bf16, f16 or q8_0.")] = "bf16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a portable model for llama.cpp, and compare what was written with the folder."""
    from latentize.api import export as run

    result = run(model, out, to=to, kind=type_, overwrite=overwrite)
    _emit(result, as_json, _facts(result["file"], {k: v for k, v in result.items() if k != "file"}))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    cache: CacheFormat = None,
    window: Annotated[int | None, typer.Option(min=2, help="Cache only so many tokens, and the first 4.")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    from latentize.api import generate as run

    result = run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
        cache=cache,
        window=window,
        stream=not as_json,
    )
    for note in result["notes"]:
        status.print(note, style="dim", soft_wrap=True)
    if as_json:
        _emit(result, True)
    else:
        rate = result["tokens"] / result["seconds"]
        status.print(
            f"\n{result['tokens']} tokens, {rate:.1f} a second; cache {result['cache_bytes'] / 2**20:.2f} MiB, "
            f"{result['cache_values_per_token_layer']} values per token and layer"
        )


def _numbers(text: str, where: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise OptionError(f"'{text}' is not a list of numbers", where=where, fix="as 512,2048")
    return numbers


@app.command()
def bench(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The source, measured beside it.")] = None,
    context: Annotated[str, typer.Option(metavar="N,N", help="Tokens of the prompt.")] = "512,2048",
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences at a time.")] = "1",
    cache: CacheFormat = None,
    stock: Annotated[bool, typer.Option(help="Measure transformers' own decode, too.")] = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are timed.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Write a chart, .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure prefill, decode and cache against context, interleaved with the source."""
    from latentize.api import bench as run
    from latentize.api import require_report
    from latentize.checkpoint.places import require_file, write_file

    contexts, batches = _numbers(context, "--context"), _numbers(batch, "--batch")
    options = {"cache": cache, "stock": stock, "dtype": dtype, "device": device, "steps": steps}
    require_report(model)
    if plot is not None:
        require_file(expanded(plot))
    with _progress() as progress:
        result = run(model, reference, contexts=contexts, batches=batches, progress=progress, **options)
    table = Table(title=f"{model}, {dtype} on {device}", title_justify="left")
    table.add_column("context", justify="right")
    table.add_column("", no_wrap=True)
    for column in ("prefill tok/s", "decode tok/s", "ms a step", "cache MiB", "of roof"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['batch']} x {row['context']:,}",
            row["name"],
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.1f}",
            f"{row['milliseconds_per_token']:,.2f}",
            f"{row['cache_bytes'] / 2**20:,.2f}",
            f"{row['roofline_share']:.0%}",
        )
    with _kept(model, "bench", result):
        _emit(result, as_json, table)
        if plot is not None:
            from latentize.report.page import speed_chart

            write_file(expanded(plot), speed_chart(result["rows"]))


@app.command()
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that convert has written.")],
    reference: Annotated[str | None, typer.Option(help="The source: both continue a prompt.")] = None,
    prompt: Annotated[str, typer.Option(help="What to continue. Default: a held-out text.")] = "",
    as_json: AsJson = False,
) -> None:
    """Write report.html: what was done, what it cost, where; with all that was measured since."""
    from latentize.api import report as run

    result = run(out, reference, prompt=prompt)
    _emit(result, as_json, _facts(result["report"], {k: v for k, v in result.items() if k != "report"}))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder to write; must not exist.")] = Path("demo-out"),
    as_json: AsJson = False,
) -> None:
    """Convert, verify, evaluate and run the bundled model."""
    from latentize.cli.demo import PROMPT
    from latentize.cli.demo import demo as run

    with _progress() as progress:
        result = run(out, progress)
    table = Table(title="The bundled model on held-out text", title_justify="left")
    for column in ("model", "cached values/token/layer", "perplexity", "KL", "same top token"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in result["rows"]:
        kl, same = ("", "") if row["kl"] is None else (f"{row['kl']:.3f}", f"{row['top1_agreement']:.1%}")
        table.add_row(row["name"], str(row["cache_values_per_token_layer"]), f"{row['perplexity']:.2f}", kl, same)
    _emit(result, as_json, table)
    if not as_json:
        for row in result["rows"]:
            if "continuation" in row:
                console.print(f"\n{row['name']}", style="bold")
                console.print(PROMPT + row["continuation"])
        console.print(f"\nreport: {result['report']}", soft_wrap=True)


# What the dynamic linker says where a library cannot be mapped.
_NO_MEMORY = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")


def _fail(error: LatentizeError) -> NoReturn:
    status.print(f"{error.code} ", style="red", end="")
    # Not folded: a path is there to be copied.
    status.print(str(error).removeprefix(error.code).lstrip(), soft_wrap=True)
    sys.exit(2)


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """What there is to know about the text, as one line each and without the place in the code."""
    from latentize.text.documents import TextWarning

    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, TextWarning):
                status.print(f"note: {message}", markup=False, soft_wrap=True)
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        yield


# What decides how threads wait for each other, of GNU's OpenMP and of LLVM's and Intel's.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def _wait_passively() -> None:
    """Threads that wait for others sleep, unless the environment says how they should wait.

    By default they spin, and where another program has the processor that the others need they take what is left of it.
    OpenMP reads this once, when torch is imported.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def main() -> None:
    """Entry point: user errors end with status 2 and no traceback."""
    _wait_passively()
    for stream in (sys.stdout, sys.stderr):
        # A name may hold what the terminal has no letters for.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _notes_on_stderr():
            app()
    except LatentizeError as error:
        _fail(error)
    except (MemoryError, ImportError) as error:
        # So little memory that not even the libraries fit.
        if isinstance(error, ImportError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        reason = (str(error) or "the system gives no more").splitlines()[0]
        lacking = ResourceError(f"memory does not suffice: {reason}", code="LZ422", where="this process")
        # Colours need memory, and so does what libraries that are half there do at the end.
        sys.stderr.write(f"{lacking}\n")
        sys.stderr.flush()
        os._exit(2)
