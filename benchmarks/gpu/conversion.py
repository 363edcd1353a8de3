"""How long a conversion takes: a random model of some layers of Llama-3-8B's shape, on disk, layer by layer.

Two models of unlike numbers of layers tell what a layer costs and what does not depend on them; 32 layers are then
computed, and said to be.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import latentize

__all__ = ["measure"]


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=pieces[0], bos_token=pieces[0])


def _source(config: LlamaConfig, layers: int, folder: Path, device: torch.device) -> Path:
    """On disk, with weights that are not all alike: attention that looks somewhere."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**{**config.to_dict(), "num_hidden_layers": layers}), dtype=torch.bfloat16
        )
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                gain = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                torch.nn.init.normal_(parameter, std=gain)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def measure(config: LlamaConfig, layers: tuple[int, int], device: torch.device, **recipe: Any) -> dict[str, Any]:
    """Seconds for both numbers of layers, a layer's, and those of 32; off a GPU only that it runs."""
    seconds, told = [], []
    with tempfile.TemporaryDirectory(prefix="latentize-gpu-") as temporary:
        for count in layers:
            source = _source(config, count, Path(temporary) / f"source-{count}", device)
            started = time.perf_counter()
            made = latentize.convert(source, Path(temporary) / f"out-{count}", device=str(device), **recipe)
            seconds.append(time.perf_counter() - started)
            told.append({name: made[name] for name in ("kv_lora_rank", "qk_rope_head_dim", "perplexity")})
    right = all(0 < row["perplexity"] < float("inf") for row in told)
    row: dict[str, Any] = {"layers": list(layers), "recipe": recipe, "results": told, "right": right}
    if device.type == "cuda":
        each = (seconds[1] - seconds[0]) / (layers[1] - layers[0])
        row |= {"seconds": seconds, "seconds_a_layer": each}
        row |= {"seconds_of_32_layers_computed": seconds[0] + (32 - layers[0]) * each}
    return row
