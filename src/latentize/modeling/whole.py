"""Multimodal models whose language model has latent attention.

The native format carries along what sees and hears as it was stored. ``AutoModelForCausalLM`` loads the language model
alone, ``AutoModelForImageTextToText`` all of it: transformers' own class of the whole, with latent attention in place.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from latentize.checkpoint.towers import CARRIED
from latentize.errors import CheckpointError, OptionError
from latentize.families import model_spec
from latentize.modeling.native import LatentizeConfig, put_attention

__all__ = ["LatentizeForImageTextToText", "register"]


class LatentizeForImageTextToText:
    """What ``AutoModelForImageTextToText`` asks for a model of the native format; it makes another class's."""

    config_class = LatentizeConfig

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: LatentizeConfig | None = None, **options: Any) -> Any:
        """The whole, an instance of transformers' class of it; arguments as of any model.

        Raises:
            CheckpointError: what sees and hears was not carried along, or not all of it is there.
        """
        if config is None:
            config = LatentizeConfig.from_pretrained(path)
        made, whole, (decoder, head) = _class_of(config, str(path))
        names = {"source.model.": decoder + ".", "source.lm_head.": head + ".", CARRIED: ""}
        names = {f"^{re.escape(ours)}": theirs for ours, theirs in names.items()}
        options.setdefault("dtype", config.dtype or "auto")
        told, options["output_loading_info"] = options.get("output_loading_info"), True
        model, info = made.from_pretrained(path, *args, config=whole, key_mapping=names, **options)
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"missing keys: {', '.join(missing[:3])}", where=str(path), fix="convert again")
        return (model, info) if told else model


def _class_of(config: LatentizeConfig, where: str) -> tuple[Any, Any, list[str]]:
    """transformers' class of the whole, with latent attention put in; its config; what decoder and head are called."""
    if not config.whole_config:
        raise CheckpointError(
            "the model has nothing that sees or hears",
            code="LZ123",
            where=where,
            fix="load it by AutoModelForCausalLM; or convert a multimodal model to the native format (--format native)",
        )
    whole = AutoConfig.for_model(**copy.deepcopy(config.whole_config))
    # For latent caches.
    whole.latent_layers = config.latent_layers
    with torch.device("meta"):
        empty: Any = AutoModelForImageTextToText.from_config(copy.deepcopy(whole))
    kind, called = type(empty), {module: name for name, module in empty.named_modules()}
    decoder = empty.get_decoder()
    # That of Llama 4 has a head.
    roles = [called[getattr(decoder, "model", decoder)], called[empty.get_output_embeddings()]]

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        _put(self.get_submodule(roles[0]), config)

    # By its own name transformers knows how to read the files.
    entries = {"__init__": begin, "__module__": kind.__module__, "save_pretrained": _save_pretrained}
    return type(kind.__name__, (kind,), entries), whole, roles


def _put(body: Any, config: LatentizeConfig) -> None:
    spec = model_spec(config.source_config)
    entries = body.config.rope_parameters or {}
    for attention in put_attention(body, config, spec):
        # A token of an image has three positions.
        attention.given_angles = "mrope_section" in entries


def _save_pretrained(self: Any, *_: Any, **__: Any) -> None:
    raise OptionError(
        "a multimodal model with latent attention is not saved from memory",
        where="save_pretrained",
        fix="its folder has all of it; what changes the language model is latentize heal",
    )


def register() -> None:
    """Make the native format known to ``AutoModelForImageTextToText``."""
    AutoModelForImageTextToText.register(LatentizeConfig, LatentizeForImageTextToText, exist_ok=True)


register()
