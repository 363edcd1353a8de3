"""A GGUF file, read back and held against the folder that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentize.checkpoint import Checkpoint, open_checkpoint
from latentize.errors import CheckpointError
from latentize.formats.gguf import check_portable, expert_keys, gguf_tensors
from latentize.formats.gguf_types import BLOCK, GgufTensor, gguf_module, rounded
from latentize.formats.gguf_vocab import Vocab, read_vocab

__all__ = ["check_gguf", "read_gguf"]

# Of a block's largest value: half a step of 127, and fp16's rounding of the step; and where the step is subnormal, half
# of fp16's smallest number, 127 times.
_Q8_ERROR = 0.5 / 127 + 2.0**-11
_Q8_SMALLEST = 127 * 2.0**-25
# What GGUF calls them.
_ID_NAMES = {"unk": "unknown", "pad": "padding"}


def read_gguf(path: Path) -> Any:
    """The file, mapped: ``fields`` and ``tensors`` of ``gguf.GGUFReader``.

    Raises:
        CheckpointError: it is not there, not GGUF, or truncated.
    """
    gguf = gguf_module()
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"the GGUF file cannot be read: {error}", code="LZ118", where=str(path), fix="export it again"
        ) from error


def _expected_rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    keys = {"rope.dimension_count": config["qk_rope_head_dim"], "rope.freq_base": rope["rope_theta"]}
    if rope.get("rope_type", "default") == "default":
        return keys
    return {
        **keys,
        "rope.scaling.type": rope["rope_type"],
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
    }


def _expected_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    vocab = read_vocab(checkpoint.path, config["vocab_size"])
    shape = {
        "block_count": config["num_hidden_layers"],
        **expert_keys(config),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        **_expected_rope(config),
    }
    return {
        "general.architecture": "deepseek2",
        **{f"deepseek2.{key}": value for key, value in shape.items()},
        "tokenizer.ggml.model": vocab.model,
        "tokenizer.ggml.pre": vocab.pre,
        "tokenizer.ggml.tokens": vocab.tokens,
        "tokenizer.ggml.token_type": vocab.types,
        **_expected_pieces(vocab),
        **{f"tokenizer.ggml.{_ID_NAMES.get(name, name)}_token_id": n for name, n in vocab.special.items()},
        **_expected_templates(vocab),
    }


def _expected_pieces(vocab: Vocab) -> dict[str, Any]:
    if vocab.scores is None:
        return {"tokenizer.ggml.merges": vocab.merges}
    return {"tokenizer.ggml.scores": vocab.scores, "tokenizer.ggml.add_space_prefix": vocab.space_prefix}


def _expected_templates(vocab: Vocab) -> dict[str, Any]:
    keys: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in vocab.named_templates.items()}
    if vocab.named_templates:
        keys["tokenizer.chat_templates"] = list(vocab.named_templates)
    return keys if vocab.chat_template is None else {**keys, "tokenizer.chat_template": vocab.chat_template}


def _same(found: Any, wanted: Any) -> bool:
    # GGUF's numbers with a point are float32.
    if isinstance(wanted, list) and wanted and isinstance(wanted[0], float):
        return bool(np.array_equal(np.array(found, np.float32), np.array(wanted, np.float32)))
    return bool(np.float32(found) == np.float32(wanted)) if isinstance(wanted, float) else found == wanted


def _key_problems(reader: Any, expected: dict[str, Any]) -> list[str]:
    problems = []
    for key, value in expected.items():
        field = reader.fields.get(key)
        if field is None:
            problems.append(f"key {key} is missing")
        elif not _same(field.contents(), value):
            problems.append(f"key {key} is not what the folder says")
    # A rotation that is scaled where it should not be computes something else; one group of one expert stops llama.cpp.
    unwanted = {key for key in reader.fields if "rope.scaling" in key} - expected.keys()
    problems += [f"key {key} should not be there" for key in sorted(unwanted)]
    problems += [f"key {key} should not be there" for key in reader.fields if "expert_group" in key]
    return problems


def _tensor(entry: Any) -> Tensor:
    """In float32, shaped as numpy has it."""
    gguf = gguf_module()
    values = gguf.quants.dequantize(entry.data, entry.tensor_type)
    return torch.from_numpy(values.copy()).reshape([int(n) for n in reversed(entry.shape)])


def _tensor_problem(entry: Any, tensor: GgufTensor, source: Tensor) -> tuple[str | None, float]:
    """What is wrong with a tensor, if anything; and its largest error, in units of its largest value."""
    found, exact = _tensor(entry), source.float()
    if tuple(found.shape) != tensor.shape:
        return f"{tensor.name} is {list(found.shape)} instead of {list(tensor.shape)}", 0.0
    error = (found - exact).abs()
    largest = float(error.max() / exact.abs().max().clamp_min(1e-30))
    kind = entry.tensor_type.name
    if kind == "Q8_0":
        most = exact.abs().unflatten(-1, (-1, BLOCK)).amax(-1, keepdim=True) * _Q8_ERROR + _Q8_SMALLEST
        wrong = bool((error.unflatten(-1, (-1, BLOCK)) > most).any())
    else:
        wrong = not torch.equal(found, rounded(exact, kind))
    return (
        f"{tensor.name} differs from {tensor.source} by {largest:.1e} of its largest value" if wrong else None
    ), largest


def check_gguf(path: Path, folder: Path) -> dict[str, Any]:
    """Compare every tensor, and the keys that decide what is computed, with the folder.

    Returns:
        ``tensors`` (GGML type → number), ``largest_error`` (GGML type → of a tensor's largest value), ``keys``.

    Raises:
        CheckpointError: the file cannot be read, or something in it is not what the folder has.
        FormatError: the folder is not one that can be exported.
    """
    checkpoint, reader = open_checkpoint(folder), read_gguf(path)
    check_portable(checkpoint)
    expected = _expected_keys(checkpoint)
    problems = _key_problems(reader, expected)
    entries = {entry.name: entry for entry in reader.tensors}
    tensors = gguf_tensors(checkpoint)
    problems += [f"tensor {name} should not be there" for name in sorted(entries.keys() - {t.name for t in tensors})]
    counts: dict[str, int] = {}
    largest: dict[str, float] = {}
    for tensor in tensors:
        if tensor.name not in entries:
            problems.append(f"tensor {tensor.name} is missing")
            continue
        entry = entries[tensor.name]
        problem, error = _tensor_problem(entry, tensor, tensor.load(checkpoint))
        kind = entry.tensor_type.name
        counts[kind], largest[kind] = counts.get(kind, 0) + 1, max(largest.get(kind, 0.0), error)
        if problem:
            problems.append(problem)
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError("; ".join(problems[:3]) + more, code="LZ118", where=str(path), fix="export it again")
    return {"tensors": counts, "largest_error": largest, "keys": len(expected)}
