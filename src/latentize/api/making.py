"""Models made of models: ``convert`` and ``heal``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentize.checkpoint import open_checkpoint, resolve
from latentize.conversion.job import Job
from latentize.conversion.latent import LatentJob
from latentize.conversion.lowered import LowerJob
from latentize.conversion.pooled import PooledJob
from latentize.errors import CheckpointError, OutputError
from latentize.families import is_latent
from latentize.families.opening import checked_spec
from latentize.paths import expanded
from latentize.progress import Progress, silent
from latentize.recipe import Recipe
from latentize.report.measurements import is_output

if TYPE_CHECKING:
    from latentize.healing.parallel import Parallel

__all__ = ["convert", "heal"]


def convert(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    resume: bool = False,
    trust_remote_code: bool = False,
    stream: bool = False,
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
        stream: Read a hub model's weights from the hub as layers need them, and keep none of them on a disk.
        progress: Told how far it is.

    Under ``torchrun`` every process calls this, and they share the work.

    Returns:
        What ``latentize convert --json`` prints; nothing but on the first of several processes.

    Raises:
        LatentizeError: anything that the user can mend; nothing is left at ``out``. What an interruption or a full disk
            has left unfinished stays in ``OUT.partial-…``, if anything in it took long.
    """
    recipe = recipe or Recipe.build(**entries)
    checkpoint = open_checkpoint(resolve(model, code=trust_remote_code, streamed=stream))
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
