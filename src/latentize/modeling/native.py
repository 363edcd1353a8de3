"""The native format: the source's own architecture with its attention replaced.

It holds what the portable format cannot: a roped key for each kv head, biases, per-head norms, any frequencies.
Loaded through ``AutoModelForCausalLM`` after ``import latentize``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from latentize.attention.spec import LatentSpec, LongTable
from latentize.checkpoint.towers import CARRIED
from latentize.errors import OptionError
from latentize.families import ModelSpec, families, model_spec
from latentize.modeling.attention import LatentAttention
from latentize.modeling.body import body_of
from latentize.modeling.refusals import no_paging, no_probabilities

__all__ = ["LatentizeConfig", "LatentizeForCausalLM", "put_attention", "register"]

# Entries that generation and caches look for on any config.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)


# Those of them that a loaded model's methods change.
_CHANGING = ("vocab_size", "tie_word_embeddings")
# Entries that say what a call returns.
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "use_cache")


class LatentizeConfig(PreTrainedConfig):
    """Configuration of the native format.

    Attributes:
        source_config: ``config.json`` of the source.
        latent_layers: For each layer the fields of ``LatentSpec`` and which biases and norms it has; ``None`` where it
            is the source's own.
        frequency_table: Radians per position that the layers' ``rope_pairs`` choose from.
        whole_config: ``config.json`` of the multimodal model that the source is a part of; empty where it is not.
    """

    model_type = "latentize"

    def __init__(
        self,
        source_config: dict[str, Any] | None = None,
        latent_layers: list[dict[str, Any] | None] | None = None,
        frequency_table: list[float] | None = None,
        whole_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.whole_config = whole_config or {}
        self.source_config = source_config or {}
        self.latent_layers = latent_layers or []
        self.frequency_table = frequency_table or []
        aliases = _aliases(self.source_config)
        for key in _SHARED:
            for name in (key, aliases.get(key)):
                if name in self.source_config:
                    kwargs.setdefault(key, self.source_config[name])
        super().__init__(**kwargs)


def _aliases(config: dict[str, Any]) -> Mapping[str, str]:
    """By what name a family has an entry."""
    table = families().get(str(config.get("model_type")))
    return {} if table is None else table.aliases


def _empty_attention(
    entry: dict[str, Any], layer_idx: int, table: tuple[float, ...], beyond: LongTable | None = None
) -> LatentAttention:
    # What earlier versions did not write is as it was then.
    spec_fields = {k: entry[k] for k in LatentSpec.__dataclass_fields__ if k in entry}
    options = {k: v for k, v in entry.items() if k not in spec_fields}
    return LatentAttention(LatentSpec(**spec_fields), layer_idx, frequency_table=table, beyond=beyond, **options)


def put_attention(body: nn.Module, config: LatentizeConfig, spec: ModelSpec) -> list[LatentAttention]:
    """Put latent attention, empty, into the layers that were converted.

    Args:
        body: The source's decoder.
        config: What became of it.
        spec: The source's shape.
    """
    table, name, put = tuple(config.frequency_table), spec.module("attention"), []
    layers = getattr(body, spec.module("layers"))
    for index, (layer, entry) in enumerate(zip(layers, config.latent_layers, strict=True)):
        if entry is not None:
            put.append(_empty_attention(entry, index, table, spec.beyond))
            setattr(layer, name, put[-1])
    return put


class LatentizeForCausalLM(PreTrainedModel, GenerationMixin):
    """A source architecture, by composition, with latent attention in every layer that was converted."""

    config_class = LatentizeConfig
    base_model_prefix = "source"
    # What sees and hears beside a language model is loaded by :mod:`latentize.modeling.whole`.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [rf"^{re.escape(CARRIED)}"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: LatentizeConfig) -> None:
        # LatentAttention takes any mask or none, as SDPA does; bent logits of kept layers have no fused form.
        spec = model_spec(config.source_config)
        self._attention = ("eager",) if spec.additive_masks else ("sdpa", "eager")
        super().__init__(config)
        source_config = AutoConfig.for_model(**config.source_config)
        source_config._attn_implementation = config._attn_implementation
        for key in _CHANGING:
            if key not in config.source_config:
                # The family's default, not that of any config.
                setattr(config, key, getattr(source_config, key))
        self.source = AutoModelForCausalLM.from_config(source_config, dtype=config.dtype)
        put_attention(body_of(self.source), config, spec)
        # Phi-3's makes its cache anew where a text becomes so long that all of it turns otherwise.
        anew = "prepare_inputs_for_generation" in vars(type(self.source))
        self._usual_length = spec.attention.rope.length if anew else 0
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As of any model, but for sources that turn all of a text otherwise once it is long: its rows are made anew,
        in the same cache."""
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        longer = inputs_embeds is None and cached <= self._usual_length < input_ids.shape[1]
        if past_key_values is not None and cached and longer:
            past_key_values.reset()
            kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        """Which attention the layers that stay as they were have, and what masks all get.

        Raises:
            OptionError: one whose masks latent attention does not read, or that would leave out what the source does.
        """
        possible = self._attention
        # "latentize" is what `accelerate` sets; a model made from an accelerated one's config is not accelerated.
        if attn_implementation in (None, "latentize") or (is_init_check and attn_implementation == "sdpa"):
            return possible[0]
        if attn_implementation not in possible:
            raise OptionError(
                f"the native format has no attention '{attn_implementation}'",
                where="attn_implementation",
                fix=f"{' or '.join(possible)}; what attends to latents is latentize's own in any case",
            )
        return attn_implementation

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_input_embeddings(self) -> nn.Module:
        return self.source.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.source.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.source.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.source.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of any model; the source's config follows."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self._follow()
        return embeddings

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        """As of any model; ``config.tie_word_embeddings`` decides."""
        self._follow()
        return super().tie_weights(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As of any model. What sees and hears beside it is not here, and is not said to be in what is saved."""
        self._follow()
        self.config.whole_config = {}
        return super().save_pretrained(*args, **kwargs)

    def _follow(self) -> None:
        """What may change after loading stands in the source's config, too."""
        changed = {key: getattr(self.config, key) for key in _CHANGING}
        self.config.source_config = {**self.config.source_config, **changed}
        for key, value in changed.items():
            setattr(self.source.config, key, value)
        if hasattr(self.source, "vocab_size"):
            self.source.vocab_size = changed["vocab_size"]

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Raises:
        OptionError: there is no paged cache of latents.
        """
        raise no_paging()

    # The names that transformers and peft look for in a signature.
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the source's ``forward``; what this model's own config says about outputs counts.

        Raises:
            OptionError: attention probabilities are asked for.
        """
        given: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            **kwargs,
        }
        for name in _OUTPUTS:
            if given.get(name) is None:
                given[name] = getattr(self.config, name, None)
        if given.pop("output_attentions"):
            raise no_probabilities()
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
            given["logits_to_keep"] = logits_to_keep
        # A family of somebody else's may not know all of them.
        return self.source(input_ids=input_ids, **{name: value for name, value in given.items() if value is not None})


def register() -> None:
    """Make ``model_type: "latentize"`` known to transformers' Auto classes."""
    AutoConfig.register("latentize", LatentizeConfig, exist_ok=True)
    AutoModelForCausalLM.register(LatentizeConfig, LatentizeForCausalLM, exist_ok=True)
    # transformers 5.23 has this language model, and does not list it here. By name: nothing is imported.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mistral4", "Mistral4ForCausalLM")


register()
# The whole of a multimodal model, which is made of the above.
importlib.import_module("latentize.modeling.whole")
