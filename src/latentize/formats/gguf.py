"""GGUF: a portable checkpoint as one file for llama.cpp, architecture ``deepseek2``.

llama.cpp attends in the absorbed form, so the file holds the up-projection in two parts, ``attn_k_b`` transposed. Its
keys are those that llama.cpp's own converter writes for DeepSeek, but for these: ``attention.q_lora_rank`` is 0, since
the key has to be there; no count of groups of experts, since one group stops llama.cpp; and where no layer has experts,
no count of those, and ``leading_dense_block_count`` is the number of layers.

    letters: H heads, N un-roped key, R roped key, V value, r kv_lora_rank, D hidden
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from latentize.checkpoint import Checkpoint, open_checkpoint
from latentize.checkpoint.journal import locked, sync
from latentize.checkpoint.manifest import sha256
from latentize.errors import FormatError, OptionError, OutputError
from latentize.formats.balance import Balance, balances, unbalanced
from latentize.formats.deepseek_v3 import EPS
from latentize.formats.gguf_types import BLOCK, TYPES, GgufTensor, check_range, ggml_type, gguf_module, stored
from latentize.formats.gguf_vocab import Vocab, read_vocab
from latentize.formats.portable import PORTABLE
from latentize.paths import expanded

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["add_vocab", "check_portable", "expert_keys", "gguf_reasons", "gguf_tensors", "write_gguf"]

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj$")
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_reasons(config: dict[str, Any]) -> list[str]:
    """Why llama.cpp's ``deepseek2`` cannot run a DeepSeek-V3 of this config; empty if it can."""
    reasons = []
    if config.get("q_lora_rank") is not None:
        reasons.append("it has a low-rank query")
    if _has_experts(config) and config.get("n_group", 1) != 1:
        reasons.append("it chooses experts in groups")
    if _has_experts(config) and config.get("moe_layer_freq", 1) != 1:
        reasons.append("not every layer after the first ones has experts")
    if config.get("attention_bias"):
        reasons.append("its attention has biases, for which deepseek2 has no tensors")
    if not config.get("rope_interleave", True):
        reasons.append("its roped pairs are not interleaved")
    if config.get("rms_norm_eps") != EPS:
        reasons.append(
            f"its norms have epsilon {config.get('rms_norm_eps')}, that of the latent is {EPS} in transformers"
        )
    if config.get("hidden_act", "silu") != "silu":
        reasons.append(f"its MLP has '{config['hidden_act']}'")
    if config.get("tie_word_embeddings"):
        reasons.append("its output head is tied")
    return reasons + _rope_reasons(config.get("rope_parameters") or {})


def _rope_reasons(rope: dict[str, Any]) -> list[str]:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return []
    if kind == "linear":
        # kq_scale of its deepseek2 is (1 + 0.1 log factor)² too large unless yarn cancels that: KL 0.016 on random
        # weights.
        return ["its RoPE is scaled by 'linear', and llama.cpp scales deepseek2's softmax by that, too"]
    if kind != "yarn":
        return [f"its RoPE is scaled by '{kind}', which llama.cpp does not apply to deepseek2"]
    reasons = []
    if not rope.get("mscale") or rope.get("mscale") != rope.get("mscale_all_dim"):
        reasons.append("its yarn has not one mscale for both parts of a key, which is all that llama.cpp reads")
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
        reasons.append("its yarn has other betas than 32 and 1, which llama.cpp does not read")
    if not rope.get("truncate", True):
        reasons.append("its yarn does not truncate, llama.cpp's does")
    if rope.get("attention_factor") not in (None, 1, 1.0):
        reasons.append("its yarn has an attention_factor of its own")
    return reasons


def _same(t: Tensor) -> Tensor:
    return t


def _plain(inner: str, balance: Balance, config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A tensor of a layer in fp16's range, as llama.cpp's caches, kernels and steps of blocks are."""
    name = f"{inner.removeprefix('self_attn.')}.weight"
    return partial(unbalanced, name, balance=balance, config=config) if inner.startswith("self_attn.") else _same


def gguf_tensors(checkpoint: Checkpoint) -> list[GgufTensor]:
    """All tensors of the file, in its order.

    Raises:
        FormatError: the folder has a tensor that the file has no place for.
        CheckpointError: its config does not say how it is balanced.
    """
    config = checkpoint.config
    balance = {str(layer): found for layer, found in enumerate(balances(config))}
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    nope, v_dim = config["qk_nope_head_dim"], config["v_head_dim"]

    def k_up(t: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        return plain(t).unflatten(0, (heads, nope + v_dim))[:, :nope].transpose(1, 2).contiguous()  # HrN

    def v_up(t: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        return plain(t).unflatten(0, (heads, nope + v_dim))[:, nope:].contiguous()  # HVr

    found: list[GgufTensor] = []
    for source in checkpoint.names():
        stem, _, kind = source.rpartition(".")
        prefix, name, plain = "", _TOP.get(stem), _same
        if stem.startswith("model.layers."):
            number, _, inner = stem.removeprefix("model.layers.").partition(".")
            prefix, name = f"blk.{number}.", _LAYER.get(inner)
            plain = _plain(inner, balance.get(number, Balance()), config)
            expert = _EXPERT.fullmatch(inner)
            if expert is not None and kind == "weight":
                if expert[1] == "0":
                    found.append(_experts(checkpoint, source, f"{prefix}ffn_{expert[2]}_exps.weight"))
                continue
            if source.endswith(".mlp.gate.e_score_correction_bias"):
                found.append(GgufTensor(f"{prefix}exp_probs_b.bias", source, checkpoint.shape(source), _same))
                continue
            if inner == "self_attn.kv_b_proj" and kind == "weight":
                found.append(
                    GgufTensor(f"{prefix}attn_k_b.weight", source, (heads, rank, nope), partial(k_up, plain=plain))
                )
                found.append(
                    GgufTensor(f"{prefix}attn_v_b.weight", source, (heads, v_dim, rank), partial(v_up, plain=plain))
                )
                continue
        if name is None or kind != "weight":
            raise FormatError("deepseek2 has no such tensor", where=f"{checkpoint.path}, tensor {source}")
        found.append(GgufTensor(f"{prefix}{name}.weight", source, checkpoint.shape(source), plain))
    return found


def _experts(checkpoint: Checkpoint, first: str, name: str) -> GgufTensor:
    """One tensor for all experts of a layer."""
    count = checkpoint.config["n_routed_experts"]
    names = tuple(first.replace(".experts.0.", f".experts.{number}.") for number in range(count))
    return GgufTensor(name, first, (count, *checkpoint.shape(first)), _same, names)


def _add_shape(writer: GGUFWriter, config: dict[str, Any]) -> None:
    heads, rank, rope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)  # absorbed: one key of the latent and the roped part, for all heads
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    for key, value in expert_keys(config).items():
        if isinstance(value, bool):
            writer.add_bool(f"deepseek2.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"deepseek2.{key}", value)
        else:
            writer.add_uint32(f"deepseek2.{key}", int(value))
    _add_rope(writer, config)


def _scoring(config: dict[str, Any]) -> str:
    """``sigmoid`` or ``softmax``; each version has its own where nothing is said."""
    return str(config.get("scoring_func") or ("softmax" if config["model_type"] == "deepseek_v2" else "sigmoid"))


def _has_experts(config: dict[str, Any]) -> bool:
    return config.get("first_k_dense_replace", 0) < config["num_hidden_layers"]


def expert_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Keys that say which layers have experts, and how they are chosen."""
    if not _has_experts(config):
        # Two more have to be there all the same.
        return {
            "leading_dense_block_count": config["num_hidden_layers"],
            "expert_feed_forward_length": config["intermediate_size"],
            "expert_shared_count": 0,
        }
    return {
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_gating_func": int(getattr(gguf_module().ExpertGatingFuncType, _scoring(config).upper())),
    }


def _add_rope(writer: GGUFWriter, config: dict[str, Any]) -> None:
    gguf, rope = gguf_module(), config["rope_parameters"]
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    # llama.cpp multiplies by ten for this architecture, what its converter wrote from the beginning.
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def add_vocab(writer: GGUFWriter, vocab: Vocab) -> None:
    """Write the tokenizer."""
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.scores is None:
        writer.add_token_merges(vocab.merges)
    else:
        writer.add_token_scores(vocab.scores)
        writer.add_add_space_prefix(vocab.space_prefix)
    writer.add_add_bos_token(vocab.add_bos)
    for name, number in vocab.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    if vocab.chat_template is not None:
        writer.add_chat_template(vocab.chat_template)
    # ``add_chat_template`` takes several, and lists their names in an order that changes.
    keys = gguf_module().Keys.Tokenizer
    for name, template in vocab.named_templates.items():
        writer.add_string(keys.CHAT_TEMPLATE_N.format(name=name), template)
    if vocab.named_templates:
        writer.add_array(keys.CHAT_TEMPLATES, list(vocab.named_templates))


def check_portable(checkpoint: Checkpoint) -> None:
    """Raise unless the folder is a DeepSeek-V3 that llama.cpp's ``deepseek2`` can run.

    Raises:
        FormatError: it is native, of another architecture, or has what ``deepseek2`` has not.
    """
    kind, where = checkpoint.config.get("model_type"), str(checkpoint.config_path)
    if kind == "latentize":
        raise FormatError(
            "a folder in the native format has no counterpart in llama.cpp",
            where=where,
            fix="convert the source with --format deepseek_v3, and export that",
        )
    if kind not in PORTABLE:
        raise FormatError(
            f"only a portable folder can be exported, this is '{kind}'",
            where=where,
            fix="convert it first: latentize convert MODEL OUT --format deepseek_v3",
        )
    if reasons := gguf_reasons(checkpoint.config):
        raise FormatError(
            "llama.cpp's deepseek2 cannot run this model: " + "; ".join(reasons),
            where=where,
            fix="export what latentize convert --format deepseek_v3 has written",
        )


def write_gguf(folder: Path, out: Path, kind: str, *, name: str = "", overwrite: bool = False) -> dict[str, Any]:
    """Write a portable folder as one GGUF file: whole, or not at all.

    One tensor is in memory at a time.

    Args:
        folder: A portable DeepSeek-V3 checkpoint, with its tokenizer.
        out: The file.
        kind: Of matrices: ``f32``, ``bf16``, ``f16`` or ``q8_0``; norms are float32.
        name: Of the model, in the file.
        overwrite: Replace a file that is there.

    Returns:
        ``file``, ``to``, ``type``, ``bytes``, ``sha256``, ``tensors`` (GGML type → number), ``pre_tokenizer``,
        ``fp16_subnormal`` (share of the weights stored in fp16), ``notes``, ``seconds``.

    Raises:
        FormatError: llama.cpp cannot hold the model or its tokenizer, or the type damages it.
        OptionError: there is no such type, or the ``gguf`` package is missing.
        OutputError: the file exists or cannot be written.
    """
    started = time.time()
    if kind not in TYPES:
        raise OptionError(f"no such type: '{kind}'", where="--type", fix=", ".join(TYPES))
    out = expanded(out).absolute()
    if out.exists() and (not overwrite or not out.is_file()):
        raise OutputError(
            "the output exists already", code="LZ401", where=str(out), fix="remove it, or give --overwrite"
        )
    gguf_module()
    checkpoint = open_checkpoint(folder)
    check_portable(checkpoint)
    tensors = gguf_tensors(checkpoint)
    vocab = read_vocab(folder, checkpoint.config["vocab_size"])
    partial = out.with_name(f"{out.name}.partial-export")
    try:
        # One that was killed left this file, and is made again from its beginning.
        stream = locked(partial)
    except OSError as error:
        raise OutputError(f"cannot write the file: {error.strerror}", code="LZ403", where=str(out)) from error
    try:
        share = _write(partial, checkpoint, tensors, vocab, kind, name or folder.name)
        sync(partial)
        digest, size = sha256(partial), partial.stat().st_size
        partial.replace(out)
        sync(out.parent)
    except OSError as error:
        raise OutputError(f"cannot write the file: {error.strerror}", code="LZ403", where=str(out)) from error
    finally:
        partial.unlink(missing_ok=True)
        stream.close()
    types = [ggml_type(tensor, kind) for tensor in tensors]
    notes = list(vocab.notes)
    if kind == "q8_0" and "F16" in types:
        notes.append(f"{types.count('F16')} matrices stay in F16: blocks of {BLOCK} do not divide their rows")
    return {
        "file": str(out),
        "to": "gguf",
        "type": kind,
        "bytes": size,
        "sha256": digest,
        "tensors": {each: types.count(each) for each in sorted(set(types))},
        "pre_tokenizer": vocab.pre,
        "fp16_subnormal": share,
        "notes": notes,
        "seconds": round(time.time() - started, 2),
    }


def _write(
    path: Path, checkpoint: Checkpoint, tensors: list[GgufTensor], vocab: Vocab, kind: str, name: str
) -> float | None:
    """Write the file; the share of fp16's subnormals among what is stored in fp16."""
    gguf = gguf_module()
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(TYPES[kind][1])
    _add_shape(writer, checkpoint.config)
    add_vocab(writer, vocab)
    for tensor in tensors:
        ggml = gguf.GGMLQuantizationType[ggml_type(tensor, kind)]
        block, size = gguf.GGML_QUANT_SIZES[ggml]
        count = int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count // block * size, raw_dtype=ggml)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        small = halves = 0
        for tensor, t in _loaded(checkpoint, tensors):
            of = ggml_type(tensor, kind)
            found = check_range(t, tensor, of, kind)
            if of == "F16":
                small, halves = small + found, halves + t.numel()
            writer.write_tensor_data(stored(t, of))
    finally:
        writer.close()
    return small / halves if halves else None


def _loaded(checkpoint: Checkpoint, tensors: list[GgufTensor]) -> Iterator[tuple[GgufTensor, Tensor]]:
    for tensor in tensors:
        yield tensor, tensor.load(checkpoint)
