"""DeepSeek's equations as they are written: against transformers' model, and in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tests.common import relative_error
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from latentize.attention.cache import GrowingCache
from latentize.attention.mla import MlaWeights, multi_head_latent_attention

PAGE = Path(__file__).parents[3] / "docs" / "attention.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def deepseek() -> tuple[DeepseekV3Attention, DeepseekV3Config]:
    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=10,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = DeepseekV3Attention(config, 0).double().eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention, config


def weights(attention: DeepseekV3Attention, config: DeepseekV3Config) -> MlaWeights:
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    q = attention.q_b_proj.weight.detach().unflatten(0, (4, nope + rope))
    kv = attention.kv_b_proj.weight.detach().unflatten(0, (4, nope + config.v_head_dim))
    down, k_rope = attention.kv_a_proj_with_mqa.weight.detach().split([config.kv_lora_rank, rope])
    pairs = torch.arange(rope // 2, dtype=torch.float64)
    return MlaWeights(
        dq_QD=attention.q_a_proj.weight.detach(),
        uq_HNQ=q[:, :nope],
        qr_HRQ=q[:, nope:],
        dkv_rD=down,
        uk_HNr=kv[:, :nope],
        uv_HVr=kv[:, nope:],
        kr_RD=k_rope,
        o_DHV=attention.o_proj.weight.detach().unflatten(1, (4, -1)),
        frequencies_F=100.0 ** (-2 * pairs / rope),
        q_norm_Q=attention.q_a_layernorm.weight.detach(),
        kv_norm_r=attention.kv_a_layernorm.weight.detach(),
        norm_eps=attention.kv_a_layernorm.variance_epsilon,
    )


@pytest.mark.parametrize("absorb", [False, True], ids=["expanded", "absorbed"])
def test_against_transformers(absorb: bool, deepseek: tuple[DeepseekV3Attention, DeepseekV3Config]) -> None:
    attention, config = deepseek
    h_BTD = torch.randn(2, 9, 32, dtype=torch.float64)
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    cos_sin = DeepseekV3RotaryEmbedding(config)(h_BTD, torch.arange(9)[None])
    with torch.no_grad():
        expected = attention(h_BTD, position_embeddings=cos_sin, attention_mask=mask)[0]
    # transformers' angles are float32.
    assert relative_error(multi_head_latent_attention(h_BTD, weights(*deepseek), absorb=absorb), expected) < 1e-6


def test_token_by_token(deepseek: tuple[DeepseekV3Attention, DeepseekV3Config]) -> None:
    w, cache = weights(*deepseek), GrowingCache()
    h_BTD = torch.randn(1, 7, 32, dtype=torch.float64)
    whole = multi_head_latent_attention(h_BTD, w, absorb=False)
    steps = [multi_head_latent_attention(h_BTD[:, t : t + 1], w, absorb=True, cache=cache) for t in range(7)]
    assert relative_error(torch.cat(steps, dim=1), whole) < 1e-12
    assert cache.values_per_token() == 12 + 6


def test_the_page_runs() -> None:
    """Code of ``docs/attention.md``, block after block, with its assertions."""
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
