"""Commands that measure a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from latentize.cli.console import (
    AsJson,
    CacheFormat,
    Data,
    Model,
    app,
    console,
    emit,
    facts_table,
    kept,
    numbers,
    printing,
    progress_bar,
)
from latentize.paths import expanded


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
    options["lengths"] = None if lengths is None else numbers(lengths, "--lengths")
    options["tasks"] = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    options["task_options"] = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
    options["task_options"]["batch_size"] = batch_size
    require_report(model)
    with progress_bar() as progress:
        result = run(model, reference, dtype=dtype, device=device, progress=progress, **options)
    # Of several processes the first one tells.
    if not result:
        return
    plain = {k: v for k, v in result.items() if v is not None and not isinstance(v, list | dict)}
    shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in plain.items()}
    with kept(model, "eval", {**result, "reference": reference, "cache": cache, "window": window}), printing():
        emit(result, as_json, facts_table(model, shown), positions_table(result["by_position"]))
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
    with progress_bar() as progress:
        result = run(source, models, progress=progress, **options)
    if not result:
        return
    emit(result, as_json, compare_table(result))
    if plot is not None:
        from latentize.report.pareto import pareto_chart

        write_file(expanded(plot), pareto_chart(result["rows"]))
    if not as_json:
        explained = "bytes: of cache a token, all layers; excess, KL: nats a token; worse than: in bytes and excess"
        for note in (explained, *result["notes"]):
            console.print(note, style="dim")


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

    contexts, batches = numbers(context, "--context"), numbers(batch, "--batch")
    options = {"cache": cache, "stock": stock, "dtype": dtype, "device": device, "steps": steps}
    require_report(model)
    if plot is not None:
        require_file(expanded(plot))
    with progress_bar() as progress:
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
    with kept(model, "bench", result):
        emit(result, as_json, table)
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
    emit(result, as_json, facts_table(result["report"], {k: v for k, v in result.items() if k != "report"}))
