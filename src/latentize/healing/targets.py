"""What a student is to predict: the teacher's distributions, in full or its most likely tokens from disk.

n tokens, D hidden, V vocabulary, k tokens that are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from latentize.families import families
from latentize.processes import ALONE, Team
from latentize.progress import Progress
from latentize.text.tokens import Passages

__all__ = ["FullTargets", "Live", "Targets", "Teacher", "TopKTargets", "Written", "inputs", "write_top_k"]

_SEQUENCES_A_FILE = 128


def inputs(text: Passages) -> dict[str, Tensor]:
    """Keyword arguments of a model of transformers."""
    # Without a mask it would take a jump for the start of another document, which sees nothing of the one before.
    whole = torch.ones_like(text.tokens_NT)
    return {"input_ids": text.tokens_NT, "position_ids": text.positions_NT, "attention_mask": whole}


class Targets(Protocol):
    """A teacher's predictions of some tokens."""

    @property
    def hidden_BTD(self) -> list[Tensor]:
        """The teacher's hidden states after every layer; empty if they were not asked for."""
        ...

    def split(self, size: int) -> Iterator[Targets]:
        """The same in parts of ``size`` tokens."""
        ...

    def divergence(self, logits_nV: Tensor, temperature: float) -> Tensor:
        """Sum over tokens of ``KL(teacher ‖ student)`` in nats, both at ``temperature``."""
        ...


@dataclass
class FullTargets:
    """All of the vocabulary, made from hidden states when it is needed.

    Attributes:
        final_nD: Normalised hidden states that leave the teacher.
        head: From those to logits.
        hidden_BTD: As in :class:`Targets`.
    """

    final_nD: Tensor
    head: Callable[[Tensor], Tensor]
    hidden_BTD: list[Tensor] = field(default_factory=list)

    def split(self, size: int) -> Iterator[Targets]:
        return (FullTargets(part_nD, self.head) for part_nD in self.final_nD.split(size))

    def divergence(self, logits_nV: Tensor, temperature: float) -> Tensor:
        with torch.no_grad():
            log_p_nV = (self.head(self.final_nD).float() / temperature).log_softmax(-1)
        log_q_nV = (logits_nV.float() / temperature).log_softmax(-1)
        return (log_p_nV.exp() * (log_p_nV - log_q_nV)).sum()


@dataclass
class TopKTargets:
    """The ``k`` most likely tokens; all others are one.

    By the chain rule of the divergence that is a lower bound of the full one, and the same at its minimum.

    Attributes:
        log_p_nk: Their log-probabilities, at the temperature that they were written for.
        ids_nk: Their numbers.
    """

    log_p_nk: Tensor
    ids_nk: Tensor
    hidden_BTD: list[Tensor] = field(default_factory=list)

    def split(self, size: int) -> Iterator[Targets]:
        pairs = zip(self.log_p_nk.split(size), self.ids_nk.split(size), strict=True)
        return (TopKTargets(*pair) for pair in pairs)

    def divergence(self, logits_nV: Tensor, temperature: float) -> Tensor:
        log_q_nk = (logits_nV.float() / temperature).log_softmax(-1).gather(1, self.ids_nk.long())
        log_p_nk = self.log_p_nk.float()
        kept = (log_p_nk.exp() * (log_p_nk - log_q_nk)).sum()
        rest_p_n, rest_q_n = (1 - log.exp().sum(-1).clamp(max=1 - 1e-6) for log in (log_p_nk, log_q_nk))
        return kept + (rest_p_n * (rest_p_n.log() - rest_q_n.log())).sum()


class Teacher(Protocol):
    """Gives the targets of a batch."""

    def __call__(self, rows: Tensor, text: Passages) -> Targets:
        """Of the positions that have a next token.

        Args:
            rows: Numbers of the sequences in the training text.
            text: The sequences.
        """
        ...


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """From final hidden states to logits; some families divide them by a number of their config."""
    inner, head = getattr(model, "source", model), model.get_output_embeddings()
    table = families().get(inner.config.model_type)
    key = table.multipliers.get("logits") if table else None
    divisor = getattr(inner.config, key) if key else 1.0
    return head if divisor == 1.0 else lambda final_nD: head(final_nD / divisor)


class Live:
    """A model that runs along.

    Args:
        model: A causal model of transformers.
        hidden: Whether hidden states are matched, too.
    """

    def __init__(self, model: Any, *, hidden: bool = False) -> None:
        self._body, self._head, self._hidden = model.get_decoder(), head_of(model), hidden

    @torch.no_grad()
    def __call__(self, rows: Tensor, text: Passages) -> FullTargets:
        made = self._body(**inputs(text), use_cache=False, output_hidden_states=self._hidden)
        final_nD = made.last_hidden_state[:, :-1].flatten(0, 1)
        return FullTargets(final_nD, self._head, list(made.hidden_states[1:]) if self._hidden else [])


class Written:
    """Targets that :func:`write_top_k` has written.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]

    def __call__(self, rows: Tensor, text: Passages) -> TopKTargets:
        found: dict[str, list[Tensor]] = {"log_p": [], "ids": []}
        for row in rows.tolist():
            file, place = divmod(row, _SEQUENCES_A_FILE)
            for name, parts in found.items():
                part = self._files[file].get_slice(name)[place]
                # Autocast on a CPU does not join float16.
                parts.append(part.float() if name == "log_p" else part)
        log_p_nk, ids_nk = (torch.cat(parts).to(text.tokens_NT.device) for parts in found.values())
        return TopKTargets(log_p_nk, ids_nk)


@torch.no_grad()
def write_top_k(
    model: Any,
    text: Passages,
    folder: Path,
    team: Team = ALONE,
    *,
    k: int,
    temperature: float,
    batch: int,
    autocast: bool,
    progress: Progress,
) -> None:
    """Write the teacher's ``k`` most likely tokens of every position that has a next token: 6 bytes each.

    What is there already for the same tokens and options stays.

    Args:
        model: The teacher.
        text: The training text.
        folder: Where to.
        team: Processes that each have a part of the teacher, and ask it together; the first one writes.
        k: How many.
        temperature: Of the distribution.
        batch: Sequences at a time.
        autocast: Multiply in bfloat16.
        progress: Told after each file.
    """
    from safetensors.torch import save_file

    both = torch.stack([text.tokens_NT.to(torch.int64), text.positions_NT])
    digest = hashlib.sha256(both.cpu().numpy().tobytes()).hexdigest()
    what = json.dumps({"k": k, "temperature": temperature, "tokens": digest})
    done = folder / "what.json"
    if team.told(done.is_file() and done.read_text() == what):
        return
    if team.leads:
        folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    files = text.split(_SEQUENCES_A_FILE)
    for number, sequences in enumerate(files):
        log_ps, ids = [], []
        for part in sequences.split(batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits_BTV = model(**inputs(part.to(device)), use_cache=False).logits[:, :-1]
            best = (logits_BTV.float() / temperature).log_softmax(-1).topk(min(k, logits_BTV.shape[-1]))
            log_ps.append(best.values.to(torch.float16).cpu())
            ids.append(best.indices.to(torch.int32).cpu())
        tensors = {"log_p": torch.cat(log_ps), "ids": torch.cat(ids)}
        if team.leads:
            save_file(tensors, str(folder / f"teacher-{number:05d}.safetensors"))
        progress("asking the teacher", number + 1, len(files))
    if team.leads:
        done.write_text(what)
