"""Training a student: steps, looks at held-out text, states to go on from.

N sequences, B of them a step, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentize.errors import DataError
from latentize.healing.parallel import Team
from latentize.healing.recipe import Healing
from latentize.healing.state import Workspace
from latentize.healing.student import Losses, Student
from latentize.healing.targets import Teacher
from latentize.machine import peak_rss_bytes
from latentize.progress import Progress
from latentize.text.tokens import Passages
from latentize.training.descent import Muon, Schedule

__all__ = ["Execution", "Looked", "train"]

_MAX_NORM = 1.0


@dataclass(frozen=True)
class Execution:
    """How the work is done; it decides no more than the rounding.

    Attributes:
        autocast: Multiply in bfloat16.
        sequences: At a time; a step that has more accumulates gradients.
        recompute: Keep no activations inside layers, make them again on the way back.
        save_every: Steps between states.
    """

    autocast: bool = False
    sequences: int = 4
    recompute: bool = False
    save_every: int = 50


@dataclass(frozen=True)
class Looked:
    """Held-out text, means in nats per token.

    Attributes:
        loss: What is descended.
        kl: Divergence from the teacher; zero without one.
        ce: Cross-entropy.
    """

    loss: float
    kl: float
    ce: float


class Adam:
    """AdamW without decay, gradients clipped to a norm of one; the other choice beside ``Muon``."""

    def __init__(self, parameters: list[nn.Parameter], schedule: Schedule) -> None:
        self.parameters, self._schedule, self.taken = parameters, schedule, 0
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        ]

    def follow(self) -> None:
        """One step down the gradients that the parameters have."""
        torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_NORM)
        for group in self.optimisers[0].param_groups:
            group["lr"] = self._schedule.rate * self._schedule.factor(self.taken)
        self.optimisers[0].step()
        self.taken += 1


def train(
    student: Student,
    teacher: Teacher | None,
    text: Passages,
    look: Callable[[Callable[..., Losses]], Looked],
    workspace: Workspace,
    machine: Execution,
    team: Team,
    progress: Progress,
) -> dict[str, Any]:
    """Heal, in place.

    Args:
        student: Learns; of what it learns the best that was seen remains.
        teacher: What to predict, or ``None`` for the text alone.
        text: Training text, whole on every process.
        look: Measures a student on held-out text.
        workspace: Keeps states, and may have one to go on from.
        machine: How.
        team: Which processes.
        progress: Told after each step.

    Returns:
        Facts: steps, tokens, seconds, tokens per second, all looks and the best.

    Raises:
        DataError: there is no whole step's text.
        OptionError: the sequences of a step cannot be shared by the processes.
        FloatingPointError: the loss is no longer finite.
    """
    return _Run(student, teacher, text, look, workspace, machine, team, progress).run()


class _Run:
    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        text: Passages,
        look: Callable[[Callable[..., Losses]], Looked],
        workspace: Workspace,
        machine: Execution,
        team: Team,
        progress: Progress,
    ) -> None:
        self.student, self.teacher, self.text = student, teacher, text
        self.workspace, self.machine, self.team, self.progress = workspace, machine, team, progress
        self.healing: Healing = student.healing
        self.schedule = self.healing.schedule(len(text))
        if len(text) < self.schedule.sequences(text.length):
            raise DataError("the text does not fill one step", fix="more text with --data, or fewer --step-tokens")
        self._look = look
        self.called = team.called(student)
        if machine.recompute:
            _recompute(student)
        self.parameters = [p for _, p in student.trained()]
        kind = Muon if self.healing.method == "muon" else Adam
        self.descent: Any = kind(self.parameters, self.schedule)
        self.best = {name: p.detach().clone() for name, p in student.trained()}
        self.facts: dict[str, Any] = {"looks": [], "best": None, "worse": 0, "seconds": 0.0}

    def run(self) -> dict[str, Any]:
        restored = self.workspace.read(self.student, self.descent.optimisers, self.best)
        done = 0
        if restored is not None:
            done, self.facts = restored.pop("step"), restored
            self.descent.taken = done
        else:
            self._seen(0, self.look())
        started, ended = time.time() - self.facts["seconds"], False
        for step, rows in enumerate(self.schedule.batches(len(self.text), self.text.length)):
            if step < done:
                continue
            losses = self._step(step, rows)
            self.facts["seconds"] = time.time() - started
            step += 1
            looks = step * self.healing.looks % self.schedule.steps < self.healing.looks
            if looks:
                ended = self._seen(step, self.look())
            self._tell(step, losses)
            if ended:
                break
            if step % self.machine.save_every == 0 and step < self.schedule.steps:
                self.workspace.write(step, self.student, self.descent.optimisers, self.best, self.facts)
        with torch.no_grad():
            for name, parameter in self.student.trained():
                parameter.copy_(self.best[name])
        tokens = step * self.schedule.tokens
        return {
            "steps": step,
            "tokens": self.text.tokens_NT.numel(),
            "tokens_seen": tokens,
            "seconds": round(self.facts["seconds"], 2),
            "tokens_per_second": round(tokens / max(self.facts["seconds"], 1e-9), 1),
            "held_out": self.facts["looks"],
            "held_out_best": self.facts["best"],
        }

    def look(self) -> Looked:
        with torch.no_grad(), self._fast():
            return self._look(self.called)

    def _fast(self) -> Any:
        device = torch.device(self.team.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.machine.autocast)

    def _step(self, step: int, rows: Tensor) -> Losses:
        mine = self.team.share(rows)
        for parameter in self.parameters:
            parameter.grad = None
        sums = torch.zeros(4, device=self.team.device)
        for part in mine.split(self.machine.sequences):
            sequences = self.text[part].to(self.team.device)
            share = len(part) / len(mine)
            with self._fast():
                targets = None if self.teacher is None else self.teacher(part, sequences)
                losses = self.called(sequences, targets)
            (losses.total * share).backward()
            found = (losses.total.detach(), losses.kl, losses.ce, losses.hidden)
            sums += torch.stack([value.float() for value in found]) * share
        means = Losses(*self.team.averaged(sums))
        if not math.isfinite(float(means.total)):
            raise FloatingPointError(f"healing diverged at step {step}: a smaller --rate may help")
        self.descent.follow()
        return means

    def _seen(self, step: int, looked: Looked) -> bool:
        """Note a look; whether training should end."""
        entry = {"step": step, **vars(looked)}
        self.facts["looks"].append(entry)
        if self.facts["best"] is None or looked.loss < self.facts["best"]["loss"]:
            self.facts["best"], self.facts["worse"] = entry, 0
            self.best = {name: p.detach().clone() for name, p in self.student.trained()}
        else:
            self.facts["worse"] += 1
        self.workspace.note(step=step, held_out={"loss": looked.loss, "kl": looked.kl, "ce": looked.ce})
        return self.healing.patience is not None and self.facts["worse"] >= self.healing.patience

    def _tell(self, step: int, losses: Losses) -> None:
        seconds, tokens = self.facts["seconds"], step * self.schedule.tokens
        values = {name: float(value) for name, value in vars(losses).items()}
        rate = self.schedule.rate * self.schedule.factor(step - 1)
        timing = {"seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}
        self.workspace.note(step=step, tokens=tokens, rate=rate, **values, **timing, peak_rss_bytes=peak_rss_bytes())
        best = self.facts["best"]
        summary = (
            f"loss {values['total']:.4f}, held out {best['loss']:.4f}, {timing['tokens_per_second']:,.0f} tokens/s"
        )
        self.progress("healing", step, self.schedule.steps, summary)


def _recompute(student: Student) -> None:
    """Layers are run again on the way back, from their inputs alone."""
    from torch.utils.checkpoint import checkpoint

    for layer in student.layers:
        once = layer.forward

        def again(*args: Any, _once: Any = once, **kwargs: Any) -> Any:
            return checkpoint(_once, *args, use_reentrant=False, **kwargs)

        layer.forward = again
