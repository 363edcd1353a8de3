"""A Llama as a GGUF file, as it is: what a converted file is compared with in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from latentize.checkpoint import open_checkpoint
from latentize.formats.gguf import add_vocab
from latentize.formats.gguf_vocab import read_vocab

__all__ = ["write"]


def write(source: Path, out: Path, dtype: type = np.float32) -> None:
    """Write the file.

    Args:
        source: A folder in the layout of the hub, of a Llama with plain RoPE.
        out: The file.
        dtype: Of matrices; norms are float32.
    """
    checkpoint = open_checkpoint(source)
    config, writer = checkpoint.config, gguf.GGUFWriter(out, "llama")
    vocab = read_vocab(source, config["vocab_size"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, value in {
        "vocab_size": config["vocab_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": heads,
        "head_count_kv": kv_heads,
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "rope_dimension_count": config["hidden_size"] // heads,
        "rope_freq_base": config["rope_parameters"]["rope_theta"],
        "file_type": 0 if dtype is np.float32 else 1,
    }.items():
        getattr(writer, f"add_{name}")(value)
    add_vocab(writer, vocab)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name in checkpoint.names():
        tensor = checkpoint.load(name).float()
        # llama.cpp rotates neighbours; transformers rotates halves.
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        matrix = tensor.contiguous().numpy()
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), matrix.astype(dtype) if matrix.ndim > 1 else matrix
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
