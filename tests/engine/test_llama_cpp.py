"""llama.cpp runs exported files, and computes what transformers does in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.common import logits, random_tokens, relative_error, text_file
from tests.engine.conftest import Record
from tests.latent_models import mixture
from tests.models import pico_model, portable, trained_tokenizer
from tests.sentencepieces import STEPS, sentencepiece

import latentize
from latentize.engines.run import run_engine

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.engine, pytest.mark.slow]
ODD, FAST, CONVERTED = "random 160 + 32, 6 heads", "random 512 + 64", "converted 32 + 32"
# KL from transformers in float32, nats a token.
LIMITS = {"f32": 1e-6, "f16": 1e-6, "bf16": 1e-4}


@pytest.fixture(autouse=True)
def _engine(needs: Callable[[str], None]) -> None:
    needs("llama.cpp")


@pytest.mark.parametrize("name", [FAST, ODD, CONVERTED])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_logits_and_greedy_tokens(models: Callable[[str], Path], record: Record, name: str, kind: str) -> None:
    """10 prompts, 64 tokens after each. Rounded weights may decide a tie otherwise: never by more than they are off."""
    found = record(name, latentize.verify(models(name), engine="llama.cpp", kind=kind))
    assert found["kl"] <= LIMITS[kind]
    assert (found["prompts"], found["new_tokens"]) == (10, 64)
    assert found["texts_cut_alike"] == found["texts"] > 10
    if kind == "f32":
        assert found["greedy_identical"] == 10
    assert found["greedy_margin"] <= 2 * found["largest_logprob_error"]


@pytest.mark.parametrize("kind", STEPS)
def test_sentencepiece(tmp_path: Path, record: Record, kind: str) -> None:
    """Llama 2's, Mistral's and Gemma's ways with spaces, and bytes of what is unknown: the same tokens, and the same
    model."""
    folder = portable(tmp_path, heads=4, rank=64, rope=32, nope=32, value=32, vocab_size=600)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    sentencepiece(kind, 600).save_pretrained(folder)
    found = record(f"SentencePiece, {kind}", latentize.verify(folder, engine="llama.cpp", prompts=4, new_tokens=16))
    assert found["texts_cut_alike"] == found["texts"] > 10
    assert found["kl"] <= LIMITS["f32"] and found["greedy_identical"] == 4


def test_a_deepseek_v2_of_others(tmp_path: Path) -> None:
    """As DeepSeek-V2-Lite: queries that are not compressed, experts by softmax beside a shared one."""
    model = mixture("deepseek_v2-lite", n_group=1, topk_group=1, vocab_size=320, rms_norm_eps=1e-6)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    trained_tokenizer().save_pretrained(tmp_path)
    found = latentize.verify(tmp_path, engine="llama.cpp", prompts=4, new_tokens=16)
    assert found["kl"] <= LIMITS["f32"] and found["greedy_identical"] == 4


@pytest.mark.parametrize("name", [FAST, ODD])
def test_q8_0_costs_no_more_for_the_linear_norm(
    models: Callable[[str], Path], record: Record, tmp_path: Path, name: str
) -> None:
    """Against a DeepSeek-V3 of the same weights whose norm is one."""
    shape = {FAST: {"heads": 4, "rank": 512, "rope": 64}, ODD: {"heads": 6, "rank": 160, "rope": 32}}[name]
    plain = portable(tmp_path, nope=32, value=32, linear=False, stored=torch.bfloat16, **shape)
    ours, theirs = (latentize.verify(folder, engine="llama.cpp", kind="q8_0") for folder in (models(name), plain))
    record(name, {**ours, "plain_kl": theirs["kl"]})
    assert ours["kl"] <= 1.2 * theirs["kl"]


def test_q8_0_perplexity(models: Callable[[str], Path], record: Record) -> None:
    sizes = {"prompts": 16, "prompt_tokens": 256, "new_tokens": 8}
    q8, bf16 = (latentize.verify(models(CONVERTED), engine="llama.cpp", kind=k, **sizes) for k in ("q8_0", "bf16"))
    record(CONVERTED, {**q8, "bf16_perplexity": bf16["perplexity"]})
    assert q8["perplexity"] == pytest.approx(bf16["perplexity"], rel=0.01)


def test_a_cache_in_q4_0_loses_less_where_rows_are_suited_to_it(tmp_path: Path) -> None:
    """Against the same model with a cache in float32."""
    prompts = torch.randint(1000, (4, 256), generator=torch.Generator().manual_seed(0)).tolist()
    lost = {}
    for cache in (None, "q4_0"):
        folder, file = tmp_path / str(cache), tmp_path / f"{cache}.gguf"
        sizes = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "fast": True, "evaluation_tokens": 512}
        latentize.convert(ROOT / "models" / "tiny-llama-gqa", folder, cache_for=cache, **sizes)
        latentize.export(folder, file, kind="f32")
        exact, rounded = (run_engine("llama.cpp", file, prompts, new_tokens=0, cache=c) for c in ("f32", "q4_0"))
        assert rounded.settings["cache"] == "q4_0"
        log_p, log_q = (torch.from_numpy(np.stack(a.logits_TV)).log_softmax(-1) for a in (exact, rounded))
        lost[cache] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert 0 < lost["q4_0"] < 0.9 * lost[None], lost


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
    ],
)
def test_scaled_rope_is_exact(tmp_path: Path, record: Record, rope: dict[str, Any]) -> None:
    config = {"rope_parameters": {"rope_theta": 10_000.0, **rope}}
    folder = portable(tmp_path, heads=4, rank=64, rope=32, nope=32, value=32, **config)
    found = record(
        f"random, {rope['rope_type']}", latentize.verify(folder, engine="llama.cpp", prompts=4, new_tokens=16)
    )
    assert found["kl"] <= 1e-6
    # The scaling matters: without it the same weights are another model, and the file is not that model's.
    tokens = random_tokens(2, 48, vocab=300)
    scaled = logits(folder, tokens)
    entries = json.loads((folder / "config.json").read_text())
    out = tmp_path / "scaled.gguf"
    latentize.export(folder, out, kind="f32")
    entries["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    (folder / "config.json").write_text(json.dumps(entries))
    assert relative_error(logits(folder, tokens), scaled) > 0.01
    with pytest.raises(latentize.errors.CheckpointError, match=r"rope\.scaling"):
        latentize.verify(out, engine="llama.cpp", folder=folder, prompts=4, new_tokens=4)


def test_a_file(models: Callable[[str], Path], tmp_path: Path) -> None:
    """An exported file, by its own type."""
    out = tmp_path / "out.gguf"
    latentize.export(models(ODD), out, kind="f16")
    found = latentize.verify(out, engine="llama.cpp", folder=models(ODD), prompts=2, new_tokens=8)
    assert found["type"] == "f16" and found["kl"] <= LIMITS["f16"]
    assert found["tensors"]["F16"] > 10 and found["ok"]


def test_zeros_change_nothing(tmp_path: Path, record: Record) -> None:
    """Six heads padded to eight, for kernels that this machine has not."""
    source = tmp_path / "source"
    pico_model("llama", 2, vocab_size=320, hidden_size=192, num_attention_heads=6, head_dim=96).to(
        torch.bfloat16
    ).save_pretrained(source)
    trained_tokenizer().save_pretrained(source)
    options = {"kv_lora_rank": 128, "qk_rope_head_dim": 64, "tokens": 4096, "sequence_length": 64, "fast": True}
    options |= {"selection_tokens": 256, "evaluation_tokens": 512, "data": (text_file(tmp_path),)}
    report = latentize.convert(source, tmp_path / "out", serve_on="llama.cpp@rtx4090", **options)
    assert any("heads from 6 to 8" in note for note in report["notes"])
    found = record(
        "padded with zeros", latentize.verify(tmp_path / "out", engine="llama.cpp", prompts=4, new_tokens=16)
    )
    assert found["kl"] <= 1e-6 and found["greedy_identical"] == 4
