"""What is to be done to a model. A recipe decides the bytes of the result; the machine does not belong in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentize.errors import OptionError
from latentize.paths import expanded

__all__ = ["CacheFor", "Decay", "Method", "Recipe", "Request", "Selection", "parse_keep"]

Method = Literal["calibrated", "transmla", "mha2mla", "care"]
Selection = Literal["high", "low", "uniform", "2-norm"]
CacheFor = Literal["q8_0", "q4_0", "fp8", "int8", "int4"]
Decay = Literal["linear", "cosine", "1-sqrt"]

# Enough to refine on; statistics alone settle earlier.
_TOKENS_REFINED, _TOKENS_CLOSED, _TOKENS_EVALUATED = 131_072, 32_768, 16_384


def parse_keep(value: Any) -> Any:
    """``"25%"`` or ``0.25`` to a fraction."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


class Request(BaseModel):
    """What a user asks for, checked. Its fields are options of a command, and mean what stands below them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    # As errors call it that are not about one field.
    called: ClassVar[str]

    @classmethod
    def build(cls, **entries: Any) -> Self:
        """Validate entries from a file or a command line.

        Raises:
            OptionError: an unknown entry, or a value that is out of range.
        """
        try:
            return cls(**entries)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(p) for p in first["loc"]) or cls.called
            got = "" if name == cls.called else f" (got {first.get('input')!r})"
            raise OptionError(first["msg"].removeprefix("Value error, ") + got, where=cls.option(name)) from None

    @classmethod
    def option(cls, name: str) -> str:
        """What a field is called on the command line."""
        extra = getattr(cls.model_fields.get(name), "json_schema_extra", None)
        return str(extra["option"]) if isinstance(extra, dict) else f"--{name.replace('_', '-')}"


class Recipe(Request):
    """A conversion, by ``latentize convert``."""

    called = "recipe"

    keep: float | None = Field(None, gt=0, le=1)
    """Cached values per token and layer, at most this share of the source's, as 25% or 0.25."""
    bytes: float | None = Field(None, gt=0, le=1)
    """Cached bytes, at most this share of the source's in 16 bits, as 12.5%: values get as many bits as they are worth.
    Without ``keep`` or sizes all values stay. Scales and tokens that are stored exactly are counted."""
    bytes_context: int = Field(2048, gt=16)
    """Tokens of the text that ``bytes`` are counted over."""
    cache_for: CacheFor | None = None
    """The cache that will hold the result: llama.cpp's q8_0 or q4_0, fp8 without a scale as vLLM has it, or int8 or
    int4 of ``LatentCache``. Rows get axes and scales in which its rounding costs least. The whole model has to be in
    memory for it."""
    serve_on: str | None = Field(None, json_schema_extra={"option": "--for"})
    """The engine that will serve the result, as vllm@h100: sizes nearest to ``keep`` that its fast kernels take, and
    zeros in un-roped keys and values where those make them fit."""
    kv_lora_rank: int | None = Field(None, gt=0)
    """Size of the latent, instead of ``keep``."""
    qk_rope_head_dim: int | None = Field(None, gt=0)
    """Size of a roped key, beside the size of the latent. A model that has latent attention already keeps its own."""
    to: Literal["mla", "gqa", "mqa"] = "mla"
    """Attention of the result: mla, or gqa and mqa, which pool heads by their mean."""
    method: Method = "calibrated"
    """How latent weights are found: calibrated, which loses least, transmla, mha2mla or care."""
    format: Literal["auto", "deepseek_v3", "deepseek_v2", "native"] = "auto"
    """deepseek_v3 loads everywhere, native holds everything, auto prefers the former. deepseek_v2 has experts that are
    chosen by softmax (Mixtral, Qwen3-MoE, Granite, OLMoE), for vLLM and llama.cpp."""
    preset: Literal["512+64", "256+64"] | None = None
    """512+64 or 256+64: sizes that fast kernels are made for, instead of ``keep``."""
    fast: bool = False
    """Closed form only: seconds instead of minutes."""
    polish: bool | None = None
    """Train all converted layers together for a few steps. The whole model has to be in memory for it. By default
    where it is small."""
    freqfold: int | None = Field(None, gt=0)
    """transmla, care: frequencies that are folded together. Searched if absent."""
    selection: Selection = "2-norm"
    """mha2mla: which pairs keep RoPE, high, low, uniform or 2-norm."""
    svd: Literal["joint", "split"] = "joint"
    """mha2mla: keys and values in one SVD, joint, or in two, split."""
    damping: float = Field(0.01, ge=0)
    """care: fraction of the mean diagonal that is added to the input covariance."""
    data: tuple[str, ...] = ()
    """Text: .txt, .md, .jsonl or .parquet, a folder, - for stdin, or a hub data set. Repeat for several. By default the
    Python standard library's."""
    tokens: int | None = Field(None, gt=0)
    """Calibration tokens of your text. By default 131072, and 32768 if nothing is refined."""
    self_generated: float | None = Field(None, ge=0, le=1)
    """Tokens that the model writes itself beside them, as a share of them. The whole model has to be in memory for it.
    By default 50% where it is small and layers are refined."""
    restyled: float | None = Field(None, ge=0, le=1)
    """Share of them that is your text in other styles (lower case, spaces around marks, no marks, a line for each
    sentence). By default 25% where layers are refined."""
    repeated: float | None = Field(None, ge=0, le=1)
    """Share of them in sequences that end in a passage of theirs once more, without which what copies from far back is
    unlearnt. By default 37.5% where layers are refined."""
    sequence_length: int = Field(512, gt=1)
    """Tokens of a calibration sequence."""
    context: int = Field(32_768, gt=1)
    """Positions that calibration sequences are spread over, at most. Never more than the model's own."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision that weights are saved in: bfloat16, float32, or float16 for what is to run in it."""
    selection_tokens: int = Field(4_096, gt=0)
    """Tokens of held-out calibration text that candidates are compared on."""
    evaluation_tokens: int | None = Field(None, gt=0)
    """Tokens of held-out text that the reported quality is measured on. By default 16384, 4096 with fast."""
    seed: int = 0
    """Draws the calibration sequences."""

    @field_validator("keep", "bytes", "self_generated", "restyled", "repeated", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        return parse_keep(value)

    @model_validator(mode="after")
    def _sizes(self) -> Recipe:
        explicit = self.kv_lora_rank is not None or self.qk_rope_head_dim is not None
        # A rank alone is for a model that has latent attention already; of which model it is nothing is known here.
        alone = self.calibrates and self.qk_rope_head_dim is None
        if explicit and not alone and (self.kv_lora_rank is None or self.qk_rope_head_dim is None):
            raise ValueError("kv_lora_rank and qk_rope_head_dim belong together")
        if explicit and self.keep is not None:
            raise ValueError("give either keep, or kv_lora_rank with qk_rope_head_dim")
        if self.preset is not None and (explicit or self.keep is not None):
            raise ValueError("a preset is a pair of sizes: give no other and no keep beside it")
        if self.bytes is not None and not self.calibrates:
            raise ValueError("only the calibrated method gives values as many bits as they are worth")
        if self.bytes is not None and self.format in ("deepseek_v2", "deepseek_v3"):
            raise ValueError(f"caches of the {self.format} format have one width for all values; use native")
        if self.cache_for is not None and not self.calibrates:
            raise ValueError("only the calibrated method suits rows to a cache")
        if self.cache_for is not None and self.bytes is not None:
            raise ValueError("rows of bits of their own need no cache_for; give one of bytes and cache_for")
        if self.serve_on is not None and (not self.calibrates or self.bytes is not None or self.format == "native"):
            raise ValueError(
                "engines serve portable models by the calibrated method: leave out bytes, method and format"
            )
        if self.block > 1 and self.format == "native":
            raise ValueError(f"{self.cache_for} is llama.cpp's, which takes no native format; int4 and int8 are ours")
        if self.fast and self.polish:
            raise ValueError("fast leaves out what polish would add; give one of them")
        if self.freqfold is not None and self.method not in ("transmla", "care"):
            raise ValueError(f"freqfold belongs to transmla and care, not to '{self.method}'")
        for asked, what in (
            (self.polish, "is polished"),
            (self.self_generated, "learns from text that the model writes"),
            (self.restyled, "learns from text in other styles"),
            (self.repeated, "learns from text that is read twice"),
        ):
            if asked and not self.calibrates:
                raise ValueError(f"only the calibrated method {what}")
        if self.qk_rope_head_dim is not None and self.qk_rope_head_dim % 2:
            raise ValueError("qk_rope_head_dim should be even: RoPE rotates pairs")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether it is latentize's own method; the published ones are as they were published."""
        return self.to == "mla" and self.method == "calibrated"

    @property
    def refines(self) -> bool:
        """Whether layers are trained after the closed form."""
        return self.calibrates and not self.fast

    @property
    def whole(self) -> bool:
        """Whether all values of the source are kept, and only their bits become fewer."""
        return self.bytes is not None and self.keep is None and self.kv_lora_rank is None and self.preset is None

    @property
    def block(self) -> int:
        """What sizes are whole multiples of."""
        return 32 if self.cache_for in ("q8_0", "q4_0") else 1

    @property
    def hurries(self) -> bool:
        """Whether seconds count more than the last digits. The published methods are as they were published."""
        return self.fast and self.calibrates

    @property
    def reach(self) -> int:
        """Positions that the conversion looks at, at most. The published methods are as they were published."""
        return max(self.sequence_length, self.context if self.method == "calibrated" else 0)

    @property
    def calibration_tokens(self) -> int:
        """Calibration tokens of the user's text, the default filled in."""
        if self.tokens is not None:
            return self.tokens
        return _TOKENS_REFINED if self.refines else _TOKENS_CLOSED

    @property
    def held_out_tokens(self) -> int:
        """Tokens that the reported quality is measured on, the default filled in."""
        if self.evaluation_tokens is not None:
            return self.evaluation_tokens
        return _TOKENS_EVALUATED // 4 if self.fast else _TOKENS_EVALUATED

    @property
    def sizes(self) -> tuple[int, int] | None:
        """``(kv_lora_rank, qk_rope_head_dim)`` where both are given."""
        if self.preset is not None:
            rank, rope = self.preset.split("+")
            return int(rank), int(rope)
        if self.kv_lora_rank is None or self.qk_rope_head_dim is None:
            return None
        return self.kv_lora_rank, self.qk_rope_head_dim

    @property
    def budget(self) -> float:
        """The share of the source's cache to keep when no sizes are given."""
        return 0.25 if self.keep is None else self.keep

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Recipe:
        """Read a YAML recipe, or the ``latentize.json`` of an earlier output; ``overrides`` win.

        Raises:
            OptionError: the file is missing, not a mapping, or has an unknown entry.
        """
        import yaml

        path = expanded(path)
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise OptionError(f"the recipe cannot be read: {error}", code="LZ305", where=str(path)) from error
        if not isinstance(entries, dict):
            raise OptionError("a recipe is a mapping of entries", code="LZ305", where=str(path))
        if isinstance(entries.get("recipe"), dict):
            entries = entries["recipe"]
        return cls.build(**{**entries, **overrides})
