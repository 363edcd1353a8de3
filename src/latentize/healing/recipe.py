"""What is to be done to heal a model. It decides the bytes of the result; the machine does not belong in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from latentize.recipe import Decay, Request

if TYPE_CHECKING:
    from latentize.training.descent import Schedule

__all__ = ["Healing"]

_RATES = {"muon": 0.01, "adamw": 3e-4, "lora": 2e-3}


class Healing(Request):
    """A healing, by ``latentize heal``."""

    called = "heal"

    data: tuple[str, ...] = ()
    """Text: .txt, .md, .jsonl or .parquet, a folder, - for stdin, or a hub data set. Repeat for several. By default the
    Python standard library's."""
    tokens: int = Field(262_144, gt=0)
    """Different tokens to learn from, at most."""
    epochs: int = Field(1, gt=0)
    """How often each is learnt from."""
    train: Literal["attention", "all", "lora"] = "attention"
    """What learns: the attention layers, all of the model, or lora: adapters on the attention's projections, merged at
    the end."""
    ce: float = Field(0.0, ge=0, le=1)
    """Share of the cross-entropy with the true next token. The rest is the KL divergence from the teacher."""
    temperature: float = Field(1.0, gt=0)
    """Of both distributions in that divergence."""
    top_k: int | None = Field(None, gt=0)
    """Keep so many of the teacher's most likely tokens, written to disk before training starts, so that the two models
    are never in memory together."""
    match_hidden: float = Field(0.0, ge=0)
    """Weight of the relative squared error of every layer's hidden states."""
    cache: str | None = None
    """Formats of a latent cache, LATENT[+ROPE], as int4 or int4+bf16, whose rounding is simulated while learning."""
    optimiser: Literal["muon", "adamw"] | None = None
    """muon with steps relative to each tensor, or adamw with absolute ones. By default muon, and adamw for lora."""
    rate: float | None = Field(None, gt=0)
    """Size of a full step. By default 0.01 for muon, 0.0003 for adamw, 0.002 for lora."""
    warmup: int = Field(5, ge=0)
    """Steps of linear warm-up."""
    decay: Decay = "linear"
    """Shape of the decay to zero after it: linear, cosine or 1-sqrt."""
    step_tokens: int = Field(1024, gt=0)
    """Tokens of a step, rounded to whole sequences."""
    sequence_length: int = Field(512, gt=1)
    """Tokens of a sequence."""
    context: int = Field(32_768, gt=1)
    """Positions that sequences are spread over, at most. Never more than the model's own."""
    lora_rank: int = Field(16, gt=0)
    """Of the adapters."""
    lora_alpha: int = Field(32, gt=0)
    """Of the adapters."""
    looks: int = Field(5, gt=0)
    """How often held-out text is looked at, evenly. The best of what was seen is kept."""
    patience: int | None = Field(None, gt=0)
    """Looks without a gain after which training ends. By default never."""
    selection_tokens: int = Field(8192, gt=0)
    """Tokens that are not learnt from and tell what is best."""
    evaluation_tokens: int = Field(32_768, gt=0)
    """Tokens of held-out text that the result is measured on."""
    seed: int = 1
    """Draws the sequences. Another one than a conversion's draws other text."""

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
        from latentize.training.descent import Schedule

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
