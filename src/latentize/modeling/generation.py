"""What a ``generation_config.json`` asks for, as far as it can be had here.

How text is drawn (penalties, bans, where it ends, beams) is kept, where it makes sense for the model. What would need
another cache, code from the hub, or gives other than one continuation is left out, and said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from latentize.checkpoint.gguf import is_gguf

__all__ = ["NAME", "settle", "stored_settings", "without_guesses"]

NAME = "generation_config.json"
# Beams are so many models' caches; long strings to stop at are compared with every token of the vocabulary.
_MOST_BEAMS, _MOST_LETTERS = 32, 1000
# Settings of a command, or of what transformers does around the text: nothing is to be said of them.
_SILENT = {
    "max_length", "max_new_tokens", "do_sample", "temperature", "transformers_version", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "decoder_start_token_id",
    "is_encoder_decoder", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "disable_compile", "compile_config", "low_memory", "cache_config", "max_cache_len", "diversity_penalty",
    "prefill_chunk_size", "continuous_batching_config",
}  # fmt: skip
# What is not done: the value that asks for nothing, and why it is not.
_HUB, _AHEAD = "it needs code from the hub", "it guesses ahead, which changes the speed only"
_OVERRIDDEN: dict[str, tuple[Any, str]] = {
    "num_return_sequences": (1, "one continuation is given"),
    "penalty_alpha": (0, f"contrastive search: {_HUB}"),
    "dola_layers": (None, _HUB),
    "constraints": (None, _HUB),
    "force_words_ids": (None, _HUB),
    "num_beam_groups": (1, _HUB),
    "custom_generate": (None, _HUB),
    "assistant_early_exit": (None, _AHEAD),
    "assistant_ensemble_weight": (None, _AHEAD),
    "speculation_type": (None, _AHEAD),
    "use_mtp": (False, _AHEAD),
    "cache_implementation": (None, "the model has its own cache"),
    "use_cache": (True, "text is generated from a cache"),
    "token_healing": (False, "the prompt stays as it is"),
    "guidance_scale": (1, "it needs a second cache"),
}
# Whether a value makes sense, given how many tokens there are.
_Check = Callable[[Any, int], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> _Check:
    def check(value: Any, _: int) -> bool:
        above = _is_number(value) and (low < value if open_low else low <= value)
        return above and (value < high if open_high else value <= high)

    return check


def _count(low: int, high: int = 1 << 31) -> _Check:
    return lambda value, _: isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def _id(value: Any, tokens: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < tokens


def _ids(value: Any, tokens: int) -> bool:
    return isinstance(value, list) and bool(value) and all(_id(one, tokens) for one in value)


def _id_or_ids(value: Any, tokens: int) -> bool:
    return _id(value, tokens) or _ids(value, tokens)


def _words(value: Any, tokens: int) -> bool:
    return isinstance(value, list) and bool(value) and all(_ids(one, tokens) for one in value)


def _biases(value: Any, tokens: int) -> bool:
    pairs = isinstance(value, list) and bool(value) and all(isinstance(p, list) and len(p) == 2 for p in value)
    return pairs and all(_ids(ids, tokens) and isinstance(bias, float) and _is_number(bias) for ids, bias in value)


def _decay(value: Any, _: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _count(0)(value[0], 0)
        and _number(0, 1e6, open_low=True)(value[1], 0)
    )


def _strings(value: Any, _: int) -> bool:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not strings or not all(isinstance(s, str) and s for s in strings):
        return False
    return sum(map(len, strings)) <= _MOST_LETTERS


def _watermark(value: Any, _: int) -> bool:
    from transformers.generation.configuration_utils import WatermarkingConfig

    # It checks some of its entries, and trusts the others.
    if not isinstance(value, dict) or not all(_is_number(v) or isinstance(v, str) for v in value.values()):
        return False
    try:
        WatermarkingConfig.from_dict(value).validate()
    except (ValueError, TypeError, KeyError):
        return False
    return True


_SHARE, _BELOW_ONE = _number(0, 1), _number(0, 1, open_high=True)
_FACTOR = _number(0, 1e6, open_low=True)
_KEPT: dict[str, _Check] = {
    "bos_token_id": _id,
    "pad_token_id": _id,
    "eos_token_id": _id_or_ids,
    "top_k": _count(0),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "top_h": _number(0, 1, open_low=True),
    "typical_p": _number(0, 1, open_low=True),
    "epsilon_cutoff": _BELOW_ONE,
    "eta_cutoff": _BELOW_ONE,
    "repetition_penalty": _FACTOR,
    "encoder_repetition_penalty": _FACTOR,
    "no_repeat_ngram_size": _count(0),
    "encoder_no_repeat_ngram_size": _count(0),
    "bad_words_ids": _words,
    "sequence_bias": _biases,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "forced_bos_token_id": _id,
    "forced_eos_token_id": _id_or_ids,
    "exponential_decay_length_penalty": _decay,
    "renormalize_logits": lambda value, _: isinstance(value, bool),
    "remove_invalid_values": lambda value, _: isinstance(value, bool),
    "min_length": _count(0),
    "min_new_tokens": _count(0),
    "max_time": _number(0, 1e9, open_low=True),
    "stop_strings": _strings,
    "watermarking_config": _watermark,
    "num_beams": _count(1, _MOST_BEAMS + 1),
    "early_stopping": lambda value, _: isinstance(value, bool) or value == "never",
    "length_penalty": _number(-1e3, 1e3),
    "prompt_lookup_num_tokens": _count(1, 65),
    "max_matching_ngram_size": _count(1, 65),
}
# transformers wants these with a point.
_FLOATS = {"top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty"}
_FLOATS |= {"repetition_penalty", "encoder_repetition_penalty"}
# Without a token that ends a text transformers cannot apply it.
_WANTS_END = ("exponential_decay_length_penalty", "forced_eos_token_id")


def stored_settings(path: Path) -> dict[str, Any] | None:
    """Entries of a model's ``generation_config.json``; ``None`` where transformers takes those of ``config.json``.

    Args:
        path: A folder, or a GGUF file.
    """
    file = path / NAME
    if is_gguf(path) or not file.is_file():
        return None
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    # transformers, too, goes on without a file that is no JSON.
    except (OSError, ValueError, RecursionError):
        return None
    return entries if isinstance(entries, dict) else {}


def settle(model: Any, entries: Mapping[str, Any]) -> list[str]:
    """Give a loaded model the settings that it can generate with.

    Args:
        model: Loaded; its ``generation_config`` is replaced.
        entries: What it is asked for.

    Returns:
        What is left out, and why, in sentences.
    """
    from transformers import GenerationConfig

    tokens = model.get_input_embeddings().weight.shape[0]
    notes: list[str] = []
    kept: dict[str, Any] = {}
    for name, value in entries.items():
        if value is None or name in _SILENT or name.startswith("_"):
            continue
        if name in _OVERRIDDEN:
            neutral, why = _OVERRIDDEN[name]
            if value != neutral:
                notes.append(f"{name} = {_shown(value)} is left out: {why}")
        elif name not in _KEPT:
            notes.append(f"{name} is left out: it is not known here")
        elif name == "eos_token_id" and isinstance(value, list) and any(_id(one, tokens) for one in value):
            # Some lists end with what a larger vocabulary has.
            kept[name] = [one for one in cast("list[Any]", value) if _id(one, tokens)]
        elif not _KEPT[name](value, tokens):
            notes.append(f"{name} = {_shown(value)} is left out: it makes no sense for this model")
        else:
            kept[name] = float(cast("float", value)) if name in _FLOATS else value
    notes += [
        f"{name} is left out: no token ends a text"
        for name in _WANTS_END
        if name in kept and "eos_token_id" not in kept
    ]
    if "eos_token_id" not in kept:
        kept = {name: value for name, value in kept.items() if name not in _WANTS_END}
    try:
        model.generation_config = GenerationConfig(**kept)
    # Settings that contradict each other.
    except Exception as error:
        notes.append(f"all but the tokens that end a text are left out: {(str(error) or repr(error)).splitlines()[0]}")
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: kept[name] for name in ids if name in kept})
    return [f"{NAME}: {note}" for note in notes]


def without_guesses(model: Any) -> list[str]:
    """Guess nothing ahead, for a cache that cannot take back what it has let go of; what is left out, in sentences."""
    config = model.generation_config
    if config.prompt_lookup_num_tokens is None:
        return []
    config.prompt_lookup_num_tokens = None
    return [f"{NAME}: prompt_lookup_num_tokens is left out: a window cannot take back a wrong guess"]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
