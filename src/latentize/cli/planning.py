"""Before a conversion: what a model is, and what it would become."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from latentize.cli.console import AsJson, Keep, Model, app, console, emit, facts_table


@app.command()
def inspect(
    model: Model,
    engine: Annotated[
        str | None,
        typer.Option("--for", metavar="ENGINE[@MACHINE]", help="What an engine does with its latents, as vllm@h100."),
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Format of that engine's cache. Default: the model's.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks that share the heads there.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what a model is, what its KV cache weighs, and what can be done with it; or how an engine would serve it."""
    from latentize.planning.inspection import inspect as look

    if engine is not None:
        _serving(model, engine, cache, tensor_parallel, as_json)
        return
    facts = look(model)
    shown = {k: v for k, v in facts.items() if k not in ("methods", "quantization")}
    table = Table(title="What can be done with it", title_justify="left")
    for column in ("method", "result", "why"):
        table.add_column(column)
    for entry in facts["methods"]:
        table.add_row(entry["method"], entry["result"], entry["why"])
    emit(facts, as_json, facts_table(model, shown), table)


def _serving(model: str, engine: str, cache: str | None, tensor_parallel: int, as_json: bool) -> None:
    """How an engine would serve it."""
    from latentize.planning.serving import serving
    from latentize.report.tables import serving_table

    facts = serving(model, engine, cache=cache, tensor_parallel=tensor_parallel)
    emit(facts, as_json, *serving_table(model, facts))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a config.json, a GGUF file, or a hub id.")],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context. Default: the model's maximum.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    keep: Keep = "25%",
    bytes: Annotated[str | None, typer.Option(help="Share of the source's bytes in a row of coded values.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens of the sliding-window row.")] = 4096,
    device: Annotated[
        str | None,
        typer.Option(help="What fits on h200, h100, a100, l40s, mi300x, rtx4090, rtx3090, or cpu: this one."),
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GB of the machine's memory.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of that memory.")] = None,
    tflops: Annotated[float | None, typer.Option(help="16-bit TFLOPS of the machine.")] = None,
    reserve: Annotated[str, typer.Option(help="Share of the memory that is for something else.")] = "10%",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks that share the heads: what each holds.")] = 1,
    processes: Annotated[
        int, typer.Option(min=1, help="Machines, or GPUs, that share a conversion: what it takes.")
    ] = 1,
    weight_bits: Annotated[float, typer.Option(help="Bits of a stored weight.")] = 16,
    serve_on: Annotated[
        str | None,
        typer.Option("--for", metavar="ENGINE[@MACHINE]", help="Sizes that an engine serves fast, as vllm@h100."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the bytes of the KV cache: MHA, MQA, GQA, MLA, window, int8, int4; with a machine, what fits and how
    fast. Reads no weights."""
    from latentize.planning.inspection import plan as compute
    from latentize.report.tables import capacity_tables, conversions_table, plan_table

    machine = {"device": device, "memory": memory, "bandwidth": bandwidth, "tflops": tflops, "weight_bits": weight_bits}
    result = compute(
        model,
        **{"context": context, "batch": batch, "keep": keep, "bytes": bytes, "window": window, "reserve": reserve},
        tensor_parallel=tensor_parallel,
        serve_on=serve_on,
        processes=processes,
        **machine,
    )
    if as_json:
        emit(result, True)
        return
    table, notes = plan_table(model, result)
    console.print(table)
    console.print("values: cached per token and layer", style="dim")
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}", style="dim")
    if serve_on is not None:
        from latentize.report.tables import serving_table

        served = result["serving"]
        console.print(*(served["notes"] if "notes" in served else serving_table(model, served)), sep="\n")
    if "machine" in result:
        tables, notes = capacity_tables(result)
        if result.get("conversion"):
            tables.append(conversions_table(result))
        console.print(*tables, sep="\n")
        for note in notes:
            console.print(note, style="dim")
