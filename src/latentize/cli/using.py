"""Commands that use a converted model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from latentize.cli.console import AsJson, CacheFormat, Model, app, console, emit, facts_table, progress_bar, status


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that convert has written, or a GGUF file.")],
    engine: Annotated[str | None, typer.Option(help="Compare with: transformers, llama.cpp or vllm.")] = None,
    folder: Annotated[Path | None, typer.Option(help="What a GGUF file was exported from.")] = None,
    type_: Annotated[str, typer.Option("--type", help="Of the file made for llama.cpp: f32, bf16, f16, q8_0.")] = "f32",
    environment: Annotated[
        Path | None, typer.Option(help="The engine's virtual environment. Default: .engines/ENGINE.")
    ] = None,
    serve_on: Annotated[
        str | None,
        typer.Option("--for", metavar="ENGINE[@MACHINE]", help="Whether an engine will serve its sizes, as vllm@h100."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many the engine gets.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens after each.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Check hashes, finiteness, and that expanded, absorbed, prefill and decode agree; a GGUF file against its folder;
    an engine against transformers in float32; its sizes against what an engine elsewhere takes."""
    from latentize.api import verify as run

    sizes = {"prompts": prompts, "new_tokens": new_tokens}
    result = run(out, engine=engine, folder=folder, kind=type_, environment=environment, serve_on=serve_on, **sizes)
    shown = {k: f"{v:.2e}" if isinstance(v, float) else v for k, v in result.items()}
    emit(result, as_json, facts_table(f"{out} is whole", shown))


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
    emit(result, as_json, facts_table(result["file"], {k: v for k, v in result.items() if k != "file"}))


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
        emit(result, True)
    else:
        rate = result["tokens"] / result["seconds"]
        status.print(
            f"\n{result['tokens']} tokens, {rate:.1f} a second; cache {result['cache_bytes'] / 2**20:.2f} MiB, "
            f"{result['cache_values_per_token_layer']} values per token and layer in "
            f"{result['cache_bytes_per_token_layer']:.4g} bytes",
            soft_wrap=True,
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder to write; must not exist.")] = Path("demo-out"),
    as_json: AsJson = False,
) -> None:
    """Convert, verify, evaluate and run the bundled model."""
    from latentize.cli.demo import PROMPT
    from latentize.cli.demo import demo as run

    with progress_bar() as progress:
        result = run(out, progress)
    table = Table(title="The bundled model on held-out text", title_justify="left")
    for column in ("model", "cached values/token/layer", "perplexity", "KL", "same top token"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in result["rows"]:
        kl, same = ("", "") if row["kl"] is None else (f"{row['kl']:.3f}", f"{row['top1_agreement']:.1%}")
        table.add_row(row["name"], str(row["cache_values_per_token_layer"]), f"{row['perplexity']:.2f}", kl, same)
    emit(result, as_json, table)
    if not as_json:
        for row in result["rows"]:
            if "continuation" in row:
                console.print(f"\n{row['name']}", style="bold")
                console.print(PROMPT + row["continuation"])
        console.print(f"\nreport: {result['report']}", soft_wrap=True)
