"""Factors of keys stay as they are, wherever rows are seen as they are stored and others as they came."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.common import FP32, relative_error
from tests.unit.layers import attention_spec, inputs, random_attention
from torch import Tensor
from transformers import DynamicCache

from latentize.attention.coding import Rounding
from latentize.methods.closed_form import convert_layer
from latentize.methods.setting import Setting
from latentize.methods.statistics import Needed, gather
from latentize.modeling.attention import LatentAttention


@dataclass
class Halves(Rounding):
    """Stored rows are half as large: latents and roped keys, not what follows these."""

    sinks: int
    newest: int

    def rounded(self, c: Tensor, k_rope: Tensor, exact_BT: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        assert k_rope.shape[-1] == 8, "roped keys alone"
        return c / 2, k_rope / 2


def module(newest: int) -> tuple[LatentAttention, Tensor]:
    spec = attention_spec(2, qk_norm=True)
    generator = torch.Generator().manual_seed(0)
    norms = {f"{name}_norm_d": 0.2 + torch.rand(16, generator=generator).double() for name in "qk"}
    w = random_attention(spec)
    w = type(w)(**{**vars(w), **norms})
    stats = gather(inputs(), w.to(torch.float32), spec, Needed(distances=True, cross=True))
    made = LatentAttention.from_weights(
        convert_layer(w, spec, stats, Setting("calibrated", 12, 8, key_scales=2)).to(torch.float32)
    )
    made.watch = Halves(0, newest)
    return made, inputs(1, 10).float()


@pytest.mark.parametrize("newest", [0, 1, 3])
def test_each_token_sees_its_newest_rows_and_all_factors_as_they_are(newest: int) -> None:
    attention, x = module(newest)
    together = attention(x)[0]
    for token in range(1, x.shape[1] + 1):
        alone = attention(x[:, :token])[0][:, -1]
        assert relative_error(together[:, token - 1], alone) <= FP32
    # Continued, fewer rows are new than there are.
    cache, parts = DynamicCache(), []
    for part in x.split([6, 3, 1], dim=1):
        past = cache.get_seq_length()
        at = torch.arange(past, past + part.shape[1])[None]
        parts.append(attention(part, at, past_key_values=cache)[0])
    assert relative_error(torch.cat(parts, dim=1), together) <= FP32
    attention.watch = Halves(0, x.shape[1] + 1)
    exact = attention(x)[0]
    attention.watch = None
    assert relative_error(exact, attention(x)[0]) <= FP32, "where all are new nothing is rounded"
    assert relative_error(together, exact) > 1e-3
