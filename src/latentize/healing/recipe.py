"""What is to be done to heal a model. It decides the bytes of the result; the machine does not belong in it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentize.errors import OptionError
from latentize.training.descent import Decay, Schedule

__all__ = ["Healing"]

_RATES = {"muon": 0.01, "adamw": 3e-4, "lora": 2e-3}


class Healing(BaseModel):
    """A healing.

    Attributes:
        train: What learns: the ``attention`` layers, ``all`` of the model, or ``lora`` adapters on
            the attention's projections, merged at the end.
        tokens: Different tokens to learn from, at most.
        epochs: How often each is learnt from.
        step_tokens: Tokens a step, rounded to whole sequences.
        sequence_length: Tokens of a sequence.
        context: Positions that sequences are spread over, at most; never more than the model's own.
        optimiser: ``muon`` with steps relative to each tensor, or ``adamw`` with absolute ones.
        rate: Size of a full step; by default one that suits the optimiser.
        warmup: Steps of linear warm-up.
        decay: Shape of the decay to zero after it.
        ce: Share of the cross-entropy with the true next token; the rest is the KL divergence from the teacher.
        temperature: Of both distributions in that divergence.
        top_k: Keep only the teacher's most likely tokens, written to disk before training starts, so that the two
            models are never in memory together. Without it the teacher runs along.
        match_hidden: Weight of the relative squared error of every layer's hidden states.
        cache: Formats of a latent cache, ``LATENT[+ROPE]``, whose rounding is simulated while learning.
        lora_rank, lora_alpha: Of the adapters.
        looks: How often held-out text is looked at, evenly; the best of what was seen is kept.
        patience: Looks without a gain after which training ends.
        data: Text files or hub data sets; without any, the Python standard library's text.
        selection_tokens: Tokens that are not learnt from and tell what is best.
        evaluation_tokens: Tokens of held-out text that the result is measured on.
        seed: Draws the sequences. Another one than a conversion's draws other text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: Literal["attention", "all", "lora"] = "attention"
    tokens: int = Field(262_144, gt=0)
    epochs: int = Field(1, gt=0)
    step_tokens: int = Field(1024, gt=0)
    sequence_length: int = Field(512, gt=1)
    context: int = Field(32_768, gt=1)
    optimiser: Literal["muon", "adamw"] | None = None
    rate: float | None = Field(None, gt=0)
    warmup: int = Field(5, ge=0)
    decay: Decay = "linear"
    ce: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, gt=0)
    match_hidden: float = Field(0.0, ge=0)
    cache: str | None = None
    lora_rank: int = Field(16, gt=0)
    lora_alpha: int = Field(32, gt=0)
    looks: int = Field(5, gt=0)
    patience: int | None = Field(None, gt=0)
    data: tuple[str, ...] = ()
    selection_tokens: int = Field(8192, gt=0)
    evaluation_tokens: int = Field(32_768, gt=0)
    seed: int = 1

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.top_k is not None and self.match_hidden:
            raise ValueError("match_hidden needs the teacher itself, top_k does without it")
        if self.train == "lora" and self.optimiser == "muon":
            raise ValueError("adapters start at zero, muon's steps are relative: use adamw")
        return self

    @property
    def method(self) -> Literal["muon", "adamw"]:
        """The optimiser, the default filled in."""
        return self.optimiser or ("adamw" if self.train == "lora" else "muon")

    @property
    def teaches(self) -> bool:
        """Whether a teacher is asked at all."""
        return self.ce < 1 or self.match_hidden > 0

    def schedule(self, sequences: int) -> Schedule:
        """The steps that learn from ``sequences`` sequences, ``epochs`` times."""
        rate = self.rate or _RATES["lora" if self.train == "lora" else self.method]
        size = min(max(1, self.step_tokens // self.sequence_length), sequences)
        return Schedule(
            steps=max(1, sequences // size * self.epochs),
            tokens=size * self.sequence_length,
            rate=rate,
            warmup=self.warmup,
            decay=self.decay,
            seed=self.seed,
        )

    @classmethod
    def build(cls, **entries: Any) -> Healing:
        """Validate entries from a command line.

        Raises:
            OptionError: an unknown entry, or a value that is out of range.
        """
        try:
            return cls(**entries)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(p) for p in first["loc"]) or "heal"
            got = "" if name == "heal" else f" (got {first.get('input')!r})"
            raise OptionError(f"{first['msg']}{got}", where=f"--{name.replace('_', '-')}") from None
