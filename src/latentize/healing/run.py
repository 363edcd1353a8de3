"""A healing from checked input to finished folder: what ``latentize.heal`` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentize import processes
from latentize.checkpoint import Manifest, OutputFolder, load_config, open_checkpoint
from latentize.checkpoint.manifest import sha256
from latentize.checkpoint.places import write_file
from latentize.errors import DataError, OptionError, UnsupportedModelError
from latentize.evaluation.quality import evaluate
from latentize.formats.portable import PORTABLE
from latentize.healing.loop import Execution, Looked, train
from latentize.healing.parallel import Team, shard
from latentize.healing.recipe import Healing
from latentize.healing.state import Workspace, learnt
from latentize.healing.student import Losses, Student
from latentize.healing.targets import Live, Teacher, Written, write_top_k
from latentize.machine import peak_rss_bytes
from latentize.modeling.body import decoder_layers
from latentize.modeling.load import load_model, without_weights
from latentize.progress import Progress, silent
from latentize.report.measurements import record
from latentize.report.page import write_report
from latentize.text.documents import ALONE, Split, describe, warn
from latentize.text.drawing import Part, draw
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import Passages, TooShortError, require_rows

__all__ = ["heal"]

# Shows how large latents get.
_RMS_TOKENS = 16_384
METRICS_NAME = "healing.jsonl"


def heal(
    model: Path,
    out: Path,
    teacher: Path,
    healing: Healing,
    *,
    machine: Execution,
    team: Team,
    resume: bool = False,
    track: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train an output of latentize towards its source, and write the result to ``out``.

    Args:
        model: The output.
        out: A folder that does not exist yet.
        teacher: The source.
        healing: What to do.
        machine: How.
        team: Which processes; all of them call this.
        resume: Go on with an unfinished healing of the same ``out``.
        track: ``tensorboard`` or ``trackio``, beside the metrics that are written in any case.
        progress: Told how far it is.

    Returns:
        What ``latentize heal --json`` prints.

    Raises:
        LatentizeError: anything that the user can mend; an unfinished healing stays in ``OUT.healing``.
    """
    manifest, out = Manifest.load(model), out.absolute()
    if manifest.measurements.get("method") == "lower-rank" and not all(m.get("linear_norm") for m in manifest.layers):
        raise UnsupportedModelError(
            "a model of a lower rank cannot be healed where its latent norm does more than scale",
            code="LZ203",
            where=str(model),
            fix="keep a higher rank, or refine it (convert without --fast)",
        )
    if healing.cache is not None and manifest.format not in ("native", *PORTABLE):
        raise OptionError("the model has no latents to store", where="--cache", fix="heal an MLA model, or without it")
    named = (("model", model), ("teacher", teacher))
    _same_vocabulary(model, teacher)
    files = {name: [sha256(p) for p in open_checkpoint(path).files] for name, path in named}
    request = {"healing": healing.model_dump(mode="json"), "files": files}
    workspace = Workspace(out, request, resume=resume, team=team, track=track)
    text, held = _text(model, healing)
    for part in (text, held):
        require_rows(part.tokens_NT, _vocabulary(model), model)
    try:
        workspace.begin()
        weights, facts = _learn(model, teacher, healing, text, held, workspace, machine, team, progress)
        result: dict[str, Any] = {}
        if team.leads:
            report = {**facts, "text": describe(healing.data), "teacher": str(teacher)}
            result = _write(out, model, teacher, healing, weights, text, report, manifest, workspace, progress)
        workspace.remove()
    finally:
        workspace.release()
    return result


def _write(
    out: Path,
    model: Path,
    teacher: Path,
    healing: Healing,
    weights: dict[str, Tensor],
    text: Passages,
    report: dict[str, Any],
    manifest: Manifest,
    workspace: Workspace,
    progress: Progress,
) -> dict[str, Any]:
    """Write the output with all that is said of it; what the command prints. ``weights`` are given up."""
    with OutputFolder(out) as folder:
        _save(folder, model, healing, weights, text)
        # Two models are about to be measured.
        weights.clear()
        report |= _compared(folder, model, teacher, healing, progress)
        manifest.healing = [*manifest.healing, {"recipe": healing.model_dump(mode="json"), **_stable(report)}]
        manifest.measurements |= {k: report[k] for k in manifest.measurements if k in report and k != "seconds"}
        folder.write_text("README.md", _card(model, report, healing))
        result = {**report, "peak_rss_bytes": peak_rss_bytes()}

        def last(partial: Path) -> None:
            # Times of day are in these, so they are no files that another run would give again.
            write_file(partial / METRICS_NAME, workspace.metrics.read_text(encoding="utf-8"))
            record(partial, "heal", result)
            write_report(partial, name=out.name)

        folder.finish(open_checkpoint(model).config, manifest, last)
    return result


def _vocabulary(folder: Path) -> int:
    config = open_checkpoint(folder).config
    # The native format has it in its source's config.
    return config.get("source_config", config)["vocab_size"]


def _same_vocabulary(model: Path, teacher: Path) -> None:
    sizes = [_vocabulary(folder) for folder in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the models have different vocabularies ({sizes[0]} and {sizes[1]})",
            where="--teacher",
            fix="the teacher is the model that was converted",
        )


def _text(model: Path, healing: Healing) -> tuple[Passages, Passages]:
    """Sequences to learn from, and others, of other documents, to look at; spread over the model's context."""
    tokenizer, length = load_tokenizer(model), healing.sequence_length
    context = min(load_config(model).max_position_embeddings, healing.context)

    def drawn(split: Split, tokens: int) -> Tensor:
        (rows_NT,) = draw(tokenizer, healing.data, [Part(split, tokens, healing.seed)], sequence_length=length)
        return rows_NT

    try:
        rows_NT = drawn("training", healing.tokens).to(torch.int32)
    except TooShortError:
        # All documents but those that are reported on may be such as are chosen on.
        rows_NT = drawn("calibration", healing.tokens).to(torch.int32)
    try:
        held_NT = drawn("selection", healing.selection_tokens)
    except TooShortError:
        # Too few documents to keep some apart: other sequences then, of the same ones; one alone serves for both.
        held = max(1, len(rows_NT) // 8)
        if len(rows_NT) == 1:
            warn(ALONE)
        rows_NT, held_NT = rows_NT[held:] if len(rows_NT) > 1 else rows_NT, rows_NT[:held]
    text = Passages.spread(rows_NT, context, seed=healing.seed)
    return text, Passages.spread(held_NT, context, seed=healing.seed + 1)


def _teacher(
    folder: Path,
    healing: Healing,
    text: Passages,
    held: Passages,
    workspace: Workspace,
    machine: Execution,
    team: Team,
    progress: Progress,
) -> tuple[Teacher | None, Callable[..., Looked]]:
    """Who is asked in training, and how held-out text is looked at."""
    if not healing.teaches:
        return None, _looks(None, held, machine, team)
    model = _teaching(folder, team)
    if healing.top_k is None:
        live = Live(model, hidden=healing.match_hidden > 0)
        return live, _looks(live, held, machine, team)
    asked = []
    for name, part in (("training", text), ("held-out", held)):
        place = workspace.folder / f"teacher-{name}"
        how: dict[str, Any] = {"k": healing.top_k, "temperature": healing.temperature, "progress": progress}
        if team.leads or team.shards:
            together = team if team.shards else processes.ALONE
            write_top_k(model, part, place, together, batch=machine.sequences, autocast=machine.autocast, **how)
        team.wait()
        asked.append(Written(place))
    return asked[0], _looks(asked[1], held, machine, team)


def _teaching(folder: Path, team: Team) -> Any:
    """The teacher's model; its layers in parts where the student's are, and all of the embedding and the head."""
    # Stored in 16 bits it is no less exact there than in 32, but half as large.
    dtype = torch.float32 if torch.device(team.device).type == "cpu" else torch.bfloat16
    if not team.shards:
        return load_model(folder, dtype=dtype, device=team.device).requires_grad_(False)
    whole = load_model(folder, dtype=dtype) if team.leads else None
    model = without_weights(folder, dtype).requires_grad_(False)
    shard(model, decoder_layers(model), whole, team.device, rest=False)
    # Embedding and head are two now, with the same values, where they are one.
    model.tie_weights()
    return model


def _looks(teacher: Teacher | None, held: Passages, machine: Execution, team: Team) -> Callable[..., Looked]:
    def look(student: Callable[..., Losses]) -> Looked:
        # All processes look at all of it: a sharded model needs all of them for any of it.
        total = torch.zeros(3)
        for rows in torch.arange(len(held)).split(machine.sequences):
            part = held[rows].to(team.device)
            losses = student(part, None if teacher is None else teacher(rows, part))
            found = torch.stack([v.float() for v in (losses.total, losses.kl, losses.ce)])
            total += found.cpu() * len(rows) / len(held)
        return Looked(*total.tolist())

    return look


def _learn(
    model: Path,
    teacher: Path,
    healing: Healing,
    text: Passages,
    held: Passages,
    workspace: Workspace,
    machine: Execution,
    team: Team,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was learnt, whole on the first process, and facts about it; models and moments are gone again."""
    # Before the student: a teacher that has written its answers is gone when the student comes.
    asked, look = _teacher(teacher, healing, text, held, workspace, machine, team, progress)
    student = Student(model, healing, "meta" if team.shards else team.device)
    if team.shards:
        shard(student, student.layers, Student(model, healing) if team.leads else None, team.device)
    facts = train(student, asked, text, look, workspace, machine, team, progress)
    facts["parameters"] = sum(p.numel() for _, p in student.trained())
    facts["machine"] = asdict(machine) | {"processes": team.size}
    return learnt(student), facts


def _save(folder: OutputFolder, model: Path, healing: Healing, weights: dict[str, Tensor], text: Passages) -> None:
    """Write what was learnt, put into the model that healing began with."""
    student, files = Student(model, healing), open_checkpoint(model)
    student.load_state_dict(weights, strict=False)
    dtype = getattr(torch, files.config.get("dtype") or "bfloat16")
    for name, tensor in student.stored(files, text.tokens_NT[: max(1, _RMS_TOKENS // text.length)], dtype):
        folder.add(name, tensor.detach() if tensor.dtype == torch.int32 else tensor.detach().to(dtype))
    for name, tensor in files.carried():
        folder.add(name, tensor)
    folder.copy_tokenizer(model, processor=True)
    folder.finish_model(files.config)


def _compared(folder: OutputFolder, model: Path, teacher: Path, healing: Healing, progress: Progress) -> dict[str, Any]:
    """Measured as written, and what it began with beside it."""
    before, after = (_measured(path, teacher, healing, progress) for path in (model, folder.partial))
    removed = 1 - after["excess_loss"] / before["excess_loss"]
    return {"excess_loss_before": before["excess_loss"], "excess_removed": removed, **after}


def _stable(report: dict[str, Any]) -> dict[str, Any]:
    """Without what another run of the same would not give again."""
    return {k: v for k, v in report.items() if k not in ("seconds", "tokens_per_second", "machine", "teacher")}


def _measured(folder: Path, teacher: Path, healing: Healing, progress: Progress) -> dict[str, Any]:
    found = evaluate(
        folder,
        teacher,
        data=healing.data,
        split="heldout",
        tokens=healing.evaluation_tokens,
        sequence_length=healing.sequence_length,
        cache=healing.cache,
        progress=progress,
    )
    quality = found.quality
    entries: dict[str, Any] = quality.describe()
    entries["evaluation_tokens"] = entries.pop("tokens")
    return {**entries, "excess_loss": quality.excess}


def _card(model: Path, report: dict[str, Any], healing: Healing) -> str:
    """The model card of what was healed, and what healing did."""
    path = model / "README.md"
    card = path.read_text(encoding="utf-8").rstrip() if path.is_file() else f"# {model.name}"
    kind = "cross-entropy" if healing.ce == 1 else "distillation from its source"
    p = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in report.items()}
    return (
        f"{card}\n\n## Healed\n\n"
        f"By {kind} on {report['tokens']:,} tokens of {p['text']} ({p['steps']} steps, {healing.train}); the numbers "
        f"above are those of before. On {report['evaluation_tokens']:,} held-out tokens: perplexity {p['perplexity']} "
        f"(the source has {p['reference_perplexity']}), KL {p['kl']} nats per token, same most likely token "
        f"{report['top1_agreement']:.2%}; above the source {p['excess_loss']} nats per token, before "
        f"{p['excess_loss_before']}.\n"
    )
