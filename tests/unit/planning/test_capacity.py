"""What a machine holds and how fast it could be, against arithmetic written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.models import FAMILIES, ONLY_MHA, pico_config, pico_model

from latentize.errors import OptionError
from latentize.families import model_spec
from latentize.planning.cache_sizes import plan as rows_of
from latentize.planning.capacity import capacities
from latentize.planning.devices import DEVICES, Machine, machine_of
from latentize.planning.inspection import plan

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
OLD_KEYS = {"name", "values_per_token_layer", "bits", "tokens", "cache_bytes", "ratio", "note", "gib"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    return str(path)


def named(result: dict[str, Any], start: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["name"].startswith(start))


def test_llama_3_8b_at_131072_tokens_on_80_gb(config: str) -> None:
    """8.03 billion weights of two bytes leave 55.9 of 72 GB; a cached token has 131,072 bytes, 36,864 as 512 + 64."""
    tokens = 131_072
    result = plan(config, context=tokens, device="h100")
    mlp_and_norms = 3 * 4096 * 14_336 + 2 * 4096
    gqa = 4096 * (4096 + 1024 + 1024 + 4096)
    # Queries of 128 + 64, a latent of 512 with its norm and a roped key of 64, 128 + 128 a head made of it.
    mla = 4096 * 32 * (128 + 64) + 4096 * (512 + 64) + 512 + 512 * 32 * (128 + 128) + 4096 * 4096
    embedding = 128_256 * 4096
    weights = {n: 2 * (2 * embedding + 4096 + 32 * (mlp_and_norms + a)) for n, a in (("GQA (", gqa), ("MLA 512", mla))}
    assert weights["GQA ("] == 2 * 8_030_261_248, "what the model is known to have"
    cache = {"GQA (": 2 * 8 * 128 * 32 * 2, "MLA 512": (512 + 64) * 32 * 2}
    assert cache == {"GQA (": 131_072, "MLA 512": 36_864}
    for name in cache:
        row = named(result, name)
        free = 0.9 * 80e9 - weights[name]
        assert row["weight_bytes"] == weights[name]
        assert row["fits"] is True
        assert row["max_context"] == int(free / cache[name])
        assert row["max_batch"] == int(free / (cache[name] * tokens))
        # Of the input embedding one row is read.
        read = weights[name] - 2 * embedding + cache[name] * tokens
        assert row["step_bytes"] == read
        assert row["tokens_per_second"] == pytest.approx(3350e9 / read)
        assert row["bound"] == row["max_batch_bound"] == "memory"
    source, latent = named(result, "GQA ("), named(result, "MLA 512")
    assert (source["max_context"], source["max_batch"]) == (426_784, 3)
    assert (latent["max_context"], latent["max_batch"]) == (1_506_076, 11)
    # 15.0 + 17.2 GB against 15.4 + 4.8.
    assert latent["speedup"] == pytest.approx(32.190 / 20.261, rel=1e-4)
    assert (source["speedup"], source["break_even_context"]) == (1, None)
    # The latent form has 420 MB more to read and saves 94,208 bytes a token.
    assert latent["break_even_context"] == -(-(weights["MLA 512"] - weights["GQA ("]) // 94_208) == 4453
    assert result["machine"]["origin"] == "NVIDIA H100 datasheet"


def test_full_machines_are_compared_by_all_their_sequences(config: str) -> None:
    result = plan(config, context=131_072, memory=80, bandwidth=3350)
    source, latent = named(result, "GQA ("), named(result, "MLA 512+64")
    for row in (source, latent):
        full = plan(config, context=131_072, batch=row["max_batch"], memory=80, bandwidth=3350)
        same = named(full, row["name"])
        assert same["fits"] and same["tokens_per_second"] == pytest.approx(row["max_batch_tokens_per_second"])
        assert not named(
            plan(config, context=131_072, batch=row["max_batch"] + 1, memory=80, bandwidth=3350), row["name"]
        )["fits"]
        assert named(plan(config, context=row["max_context"], memory=80), row["name"])["fits"]
        assert not named(plan(config, context=row["max_context"] + 1, memory=80), row["name"])["fits"]
    rates = [row["max_batch_tokens_per_second"] for row in (latent, source)]
    assert latent["max_batch_speedup"] == pytest.approx(rates[0] / rates[1])


def test_what_does_not_fit_has_no_speed(config: str) -> None:
    result = plan(config, context=131_072, device="rtx4090")
    source, latent = named(result, "GQA ("), named(result, "MLA 512+64")
    # 21.6 GB, of which weights take 16.1.
    assert source["fits"] is False and source["max_batch"] == 0
    assert source["max_context"] == int((0.9 * 24e9 - 16_060_522_496) / 131_072)
    assert source["tokens_per_second"] is source["speedup"] is source["max_batch_tokens_per_second"] is None
    assert latent["fits"] is True and latent["tokens_per_second"] > 0
    assert latent["speedup"] is None, "over nothing"
    assert named(plan(config, device="rtx4090", weight_bits=64), "GQA (")["max_context"] == 0


def test_a_window_grows_no_further(config: str) -> None:
    row = named(plan(config, context=131_072, window=4096, memory=80, bandwidth=3350), "window 4096")
    assert row["max_context"] is None
    assert row["max_batch"] == int((72e9 - row["weight_bytes"]) / (4096 * 131_072))
    assert row["break_even_context"] == 4096
    small = named(plan(config, context=131_072, window=100_000, memory=26, bandwidth=3350), "window 100000")
    assert small["max_context"] == int((0.9 * 26e9 - small["weight_bytes"]) / 131_072) < 100_000


def test_small_caches_are_counted_with_their_scales(config: str) -> None:
    result = plan(config, context=1000, memory=80)
    # A scale of two bytes for the latent, and one for the roped key.
    assert named(result, "MLA 512+64, int8")["cache_bytes"] == (512 + 2 + 64 + 2) * 32 * 1000
    assert named(result, "MLA 512+64, int4+int8")["cache_bytes"] == (256 + 2 + 64 + 2) * 32 * 1000
    quarter = named(result, "MLA, --keep 25%, int8")
    assert quarter["cache_bytes"] == (448 + 2 + 64 + 2) * 32 * 1000
    assert quarter["ratio"] == pytest.approx(4096 / 516)


def test_arithmetic_bounds_what_memory_does_not(config: str) -> None:
    """Absorbed attention does 2 H (2 r + d_R) operations a cached token and layer, GQA 4 H d."""
    result = plan(config, context=100_000, bandwidth=1e6, tflops=1)
    read = (result["rows"][0]["weight_bytes"] - 2 * 128_256 * 4096) / 2
    for name, attention in (("GQA (", 4 * 32 * 128), ("MLA 512+64", 2 * 32 * (2 * 512 + 64))):
        row = named(result, name)
        weights = read if name == "GQA (" else (row["weight_bytes"] - 2 * 128_256 * 4096) / 2
        assert row["bound"] == "arithmetic"
        assert row["tokens_per_second"] == pytest.approx(1e12 / (2 * weights + attention * 32 * 100_000))
    assert named(result, "MLA 512+64")["speedup"] < 1
    assert named(plan(config, context=100_000, bandwidth=1e6), "MLA 512+64")["bound"] == "memory"


def test_half_of_the_weights_bits(config: str) -> None:
    whole, half = (plan(config, context=1000, memory=80, weight_bits=b) for b in (16, 8))
    assert all(a["weight_bytes"] == 2 * b["weight_bytes"] for a, b in zip(whole["rows"], half["rows"], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_as_it_is_has_the_weights_that_it_has(family: str, tied: bool) -> None:
    model = pico_model(family, 4 if family in ONLY_MHA else 2, tie_word_embeddings=tied)
    spec = model_spec(model.config.to_dict())
    machine = Machine("m", 1e9, 1e9, weight_bits=32)
    rows = rows_of(spec, context=10)
    first, *others = capacities(spec, rows, machine, context=10)
    stored = [*model.parameters(), *(b for n, b in model.named_buffers() if n in model.state_dict())]
    assert first.weight_bytes == 4 * sum(t.numel() for t in stored)
    experts = 4 * sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    read = first.weight_bytes - (0 if tied else 4 * 257 * 64) - round(experts / 3)
    assert first.step_bytes == pytest.approx(read + rows[0].cache_bytes, abs=1)
    if family not in ONLY_MHA:
        assert others[0].weight_bytes > first.weight_bytes, "MHA has more keys and values"


@pytest.mark.parametrize(("family", "unties"), [("llama", True), ("gemma3_text", False), ("qwen3_moe", False)])
def test_a_tied_head_stays_where_only_the_native_format_holds_a_model(family: str, unties: bool) -> None:
    machine = Machine("m", 1e9, 1e9, weight_bits=32)
    stored = []
    for tied in (False, True):
        spec = model_spec(pico_config(family, 2, tie_word_embeddings=tied).to_dict())
        rows = rows_of(spec, context=10)
        of = dict(zip((row.name for row in rows), capacities(spec, rows, machine, context=10), strict=True))
        stored.append(next(found.weight_bytes for name, found in of.items() if name.startswith("MLA")))
    assert stored[0] - stored[1] == (0 if unties else 4 * 257 * 64)


@pytest.mark.parametrize("context", [10, 24, 100])
def test_layers_with_a_window_cache_no_more_than_it(context: int) -> None:
    """One layer of two has a window of 24 tokens, in every row."""
    spec = model_spec(pico_config("gemma3_text", 2).to_dict())
    kept = 64 * 2 * min(context, 24)
    for row in rows_of(spec, context=context, keep=0.25, window=1 << 20):
        if row.bits == 16:
            assert row.cache_bytes == row.values_per_token_layer * 2 * context + kept, row.name
    machine = Machine("m", 2e6, 1e9, weight_bits=16)
    first = capacities(spec, rows_of(spec, context=context), machine, context=context)[0]
    assert first.max_context == int((2e6 * (1 - machine.reserve) - first.weight_bytes - 64 * 2 * 24) / (64 * 2))


def test_a_latent_model_has_the_weights_that_it_has(tmp_path: Path) -> None:
    """A portable checkpoint of these sizes, made by transformers, has as many."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    spec = model_spec(pico_config("llama", 2, tie_word_embeddings=True).to_dict())
    rows = rows_of(spec, context=10, keep=0.5)
    at = next(i for i, row in enumerate(rows) if row.latent)
    rank, rope = rows[at].latent or (0, 0)
    assert rank + rope == 32
    config = DeepseekV3Config(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=16,
        v_head_dim=16, first_k_dense_replace=2, n_routed_experts=1, num_experts_per_tok=1, n_group=1, topk_group=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    found = capacities(spec, rows, Machine("m", weight_bits=8), context=10)[at]
    assert found.weight_bytes == sum(p.numel() for p in model.parameters())


def test_without_a_machine_nothing_is_added(config: str) -> None:
    result = plan(config)
    assert result.keys() == {"model", "context", "batch", "rows"}
    assert all(row.keys() == OLD_KEYS for row in result["rows"])
    assert not any("int4+int8" in row["name"] for row in result["rows"])


def test_only_memory_or_only_bandwidth(config: str) -> None:
    held, fast = plan(config, memory=80), plan(config, bandwidth=1000)
    assert all(row["tokens_per_second"] is None and row["max_batch"] for row in held["rows"])
    assert all(row["tokens_per_second"] and row["max_batch"] is None for row in fast["rows"])
    assert all(row["max_batch_tokens_per_second"] is None for row in held["rows"] + fast["rows"])


def test_numbers_that_are_given_win_over_a_devices() -> None:
    machine = machine_of("a100", memory=40)
    assert machine is not None
    assert (machine.memory_bytes, machine.bytes_per_second) == (40e9, DEVICES["a100"].bytes_per_second)
    assert machine.origin == "NVIDIA A100 datasheet, options"
    assert machine_of() is None


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"device": "abacus"}, "--device"),
        ({"memory": -1}, "--memory"),
        ({"memory": 80, "bandwidth": float("nan")}, "--bandwidth"),
        ({"memory": 80, "tflops": 0}, "--tflops"),
        ({"memory": 80, "tflops": 100}, "--tflops"),
        ({"memory": 80, "weight_bits": 0}, "--weight-bits"),
        ({"memory": 80, "reserve": "100%"}, "--reserve"),
        ({"memory": 80, "reserve": "some"}, "--reserve"),
    ],
)
def test_machines_that_cannot_be(config: str, options: dict[str, Any], where: str) -> None:
    with pytest.raises(OptionError) as caught:
        plan(config, **options)
    assert caught.value.where == where


@pytest.mark.slow
def test_this_machine_is_measured(config: str) -> None:
    machine = plan(config, context=100, device="cpu")["machine"]
    assert machine["memory_bytes"] > 1e8 and machine["bytes_per_second"] > 1e8 and machine["flops_per_second"] > 1e8
    assert machine["origin"] == "measured here, now"


def test_what_runs_it_is_said(config: str) -> None:
    result = plan(config, memory=80)
    assert "FlashMLA" in named(result, "MLA 512+64")["kernels"]
    assert "Triton" in named(result, "MLA, --keep")["kernels"]
    assert named(result, "GQA (")["kernels"] == ""
