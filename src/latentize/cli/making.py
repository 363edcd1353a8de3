"""Commands that make a model."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from latentize.cli.console import AsJson, Model, app, console, emit, facts_table, progress_bar
from latentize.cli.options import options_of
from latentize.errors import OptionError
from latentize.healing.recipe import Healing
from latentize.paths import expanded
from latentize.recipe import Recipe


@app.command()
@options_of(Recipe, leave_out=("damping", "selection_tokens", "evaluation_tokens"))
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    given: dict[str, Any],
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe, or an output's latentize.json.")] = None,
    device: Annotated[str, typer.Option(help="Where layers run.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished conversion to OUT.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that lies in the checkpoint, if it needs that.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Keep no weights of a hub model on a disk: read them as layers need them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to latent attention and say what it cost."""
    built = Recipe.load(recipe, **given) if recipe else Recipe.build(**given)
    from latentize.api import convert as run
    from latentize.report.tables import conversion_facts

    _return_freed_memory()
    with progress_bar() as progress:
        options = {"device": device, "resume": resume, "trust_remote_code": trust_remote_code, "stream": stream}
        result = run(model, out, built, **options, progress=progress)
    # Of several processes the first one tells.
    if not result:
        return
    emit(result, as_json, facts_table(str(out), conversion_facts(result)))
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


@app.command()
@options_of(Healing, leave_out=("selection_tokens", "evaluation_tokens"))
def heal(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that convert has written.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    teacher: Annotated[str, typer.Option(help="The source: a folder, a GGUF file or a hub id.")],
    given: dict[str, Any],
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
    from latentize.api import heal as run
    from latentize.report.tables import healing_facts

    if parallel not in ("fsdp", "ddp"):
        raise OptionError(f"no such way: '{parallel}'", where="--parallel", fix="fsdp or ddp")
    machine: dict[str, Any] = {"sequences": sequences, "recompute": recompute, "autocast": autocast}
    with progress_bar() as progress:
        options = {**machine, "parallel": parallel, "save_every": save_every, "resume": resume}
        options |= {"track": track, "device": device, "progress": progress}
        result = run(model, out, teacher, **options, **given)
    # Of several processes the first one tells.
    if result:
        emit(result, as_json, facts_table(str(out), healing_facts(result)))
