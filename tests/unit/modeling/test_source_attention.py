"""The attention that a source's layers run with is transformers' own, whichever way it is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tests.common import FP32, random_tokens, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

from latentize.families.opening import open_source
from latentize.modeling.blocks import causal_blocks, suit_blocks
from latentize.modeling.precision import Precision, Use
from latentize.modeling.source import SourceModel
from latentize.text.tokens import Passages

# No multiple of the queries of a block.
TOKENS = 200


def _predicted(folder: Path, tokens_NT: Tensor, *, fast: bool = False, blocks: bool = True) -> Tensor:
    """Logarithms of what the layers predict, run one by one."""
    checkpoint, spec = open_source(folder)
    model, positions_NT = SourceModel(checkpoint, spec), torch.arange(TOKENS).expand(len(tokens_NT), -1)
    # As on a machine that is faster in bfloat16.
    model.precision = Precision(faster=True)
    text = model.embed(Passages(tokens_NT, positions_NT))
    module = "latentize.modeling.attending"
    with (
        patch(f"{module}.causal_blocks", wraps=causal_blocks) as called,
        patch(f"{module}.suit_blocks", side_effect=lambda *args: blocks and suit_blocks(*args)),
    ):
        for layer in model.layers():
            layer.run(text, use=Use.LEARNT if fast else Use.MEASURED)
    assert called.called == blocks
    with torch.no_grad():
        return model.head()(text.hidden_NTD.flatten(0, 1)).unflatten(0, tokens_NT.shape).log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "glm4"])
def test_layers_in_blocks_against_transformers(source: Callable[..., Path], family: str) -> None:
    """Grouped heads, biases, RoPE on a part of each head."""
    folder, tokens = source(family), random_tokens(2, TOKENS)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(tokens).logits.log_softmax(-1)
    assert relative_error(_predicted(folder, tokens), expected) <= FP32


def test_blocks_in_bfloat16_are_nearly_as_exact_as_fused_attention(source: Callable[..., Path]) -> None:
    """Their scores are rounded once more, beside queries, keys, probabilities and every projection."""
    folder, tokens = source("llama"), random_tokens(2, TOKENS)
    expected = _predicted(folder, tokens)
    made, fused = (_predicted(folder, tokens, fast=True, blocks=blocks) for blocks in (True, False))
    assert 0 < relative_error(made, expected) <= 2 * relative_error(fused, expected)
