"""Tables of what engines take: whole, and read right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import call_cli
from tests.models import portable

from latentize.attention.spec import LatentSpec
from latentize.engines.contracts import ENGINES, HARDWARE, Backend, Served, contract, machine_of, served, sizes_of
from latentize.errors import OptionError, UnsupportedModelError
from latentize.planning.serving import required_serving, serving

SIZES = {"kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "row", "qk", "heads"}


def spec(rank: int, rope: int, nope: int, v: int, heads: int = 32) -> LatentSpec:
    return LatentSpec(4096, heads, rank, rope, nope, v, rope_heads=1, up_heads=heads, softmax_scale=1.0)


def phases(engine: str, machine: str, shape: LatentSpec, **changes: Any) -> dict[str, Served]:
    options = {"cache": "bf16", "dtype": "bfloat16", **changes}
    return {made.phase: made for made in served(engine, machine_of(engine, machine), sizes_of(shape), **options)}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_entry_says_what_where_and_from_where(engine: str) -> None:
    table = contract(engine)
    assert table.engine == engine and table.version and re.fullmatch(r"20\d\d-\d\d-\d\d", table.read)
    assert {backend.phase for backend in table.backends} <= {"prefill", "decode"}
    for entry in (*table.limits, *table.backends):
        assert entry.hardware and set(entry.hardware) <= set(HARDWARE.values()), entry
        assert all(set(shape) <= SIZES for shape in entry.shapes), entry
        # transformers is read where it is used.
        assert engine == "transformers" or re.search(r"\.\w+:\d+$", entry.source), entry


PRESET, ROPED = spec(512, 64, 128, 128), spec(224, 64, 64, 64, heads=9)


@pytest.mark.parametrize(
    ("machine", "changes", "prefill", "decode", "fast"),
    [
        ("h100", {}, "FLASH_ATTN", "FLASH_ATTN_MLA", True),
        ("h100", {"cache": "fp8"}, "FLASH_ATTN", "FLASHMLA", True),
        ("b200", {}, "FLASH_ATTN", "FLASHINFER_MLA", True),
        ("a100", {}, "FLASH_ATTN", "TRITON_MLA", False),
        ("rtx4090", {}, "FLASH_ATTN", "TRITON_MLA", False),
        ("cpu", {}, "CPU_SDPA", "CPU_MLA", False),
    ],
)
def test_what_vllm_serves_the_preset_with(
    machine: str, changes: dict[str, str], prefill: str, decode: str, fast: bool
) -> None:
    made = phases("vllm", machine, PRESET, **changes)
    assert [made[phase].backend and made[phase].backend.name for phase in ("prefill", "decode")] == [prefill, decode]
    assert made["decode"].fast == fast and not any(phase.refused for phase in made.values())


def test_a_refusal_says_what_is_missed_and_where_it_stands() -> None:
    made = phases("vllm", "h100", ROPED)
    assert "v_head_dim 64, not 128" in str(made["prefill"].refused) and ".py:" in str(made["prefill"].refused)
    assert "row 288" in str(made["decode"].refused) and not made["decode"].padded
    assert made["prefill"].padded == {"v_head_dim": 128} and made["prefill"].padded_backend == "FLASH_ATTN"
    assert [name for name, _ in made["decode"].declined] == ["FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA"]
    assert any("kv_lora_rank 512" in words for words in made["decode"].made_for)


def test_zeros_fill_what_is_not_cached_and_nothing_else() -> None:
    made = phases("vllm", "h100", spec(512, 64, 96, 64))
    assert made["prefill"].padded == {"qk_nope_head_dim": 128, "v_head_dim": 128}
    assert phases("flashinfer", "h100", spec(512, 64, 64, 128))["prefill"].padded == {}, "128 + 128 is taken as it is"
    assert phases("flashinfer", "h100", spec(512, 64, 100, 128))["prefill"].padded == {"qk_nope_head_dim": 128}
    assert not phases("flashmla", "h100", spec(256, 64, 128, 128))["decode"].padded, "never the latent"


@pytest.mark.parametrize(("rank", "rope", "refused"), [(224, 64, False), (144, 48, True), (160, 32, False)])
def test_blocks_of_a_quantised_cache_are_whole(rank: int, rope: int, refused: bool) -> None:
    for cache in ("q8_0", "q4_0"):
        made = phases("llama.cpp", "cpu", spec(rank, rope, 64, 64), cache=cache, dtype="float32")["decode"]
        assert (made.refused is not None) == refused
    assert phases("llama.cpp", "cpu", spec(144, 48, 64, 64), cache="f16")["decode"].refused is None


def test_ranks_share_heads() -> None:
    assert sizes_of(PRESET, 4)["heads"] == 8
    with pytest.raises(OptionError, match="9 heads cannot be shared by 2"):
        sizes_of(ROPED, 2)


def test_bounds_are_read_as_they_are_meant() -> None:
    entry = {"name": "x", "phase": "decode", "hardware": ["cpu"], "source": "a.py:1"}
    entry["shapes"] = [{"heads": {"least": 16, "most": 64, "multiple_of": 16}}, {"heads": [3]}]
    backend = Backend.read(entry)
    taken = [heads for heads in range(1, 100) if backend.declines({"heads": heads}, "bf16", "bfloat16") is None]
    assert taken == [3, 16, 32, 48, 64]


def test_what_nobody_knows() -> None:
    with pytest.raises(OptionError, match="no table of 'tgi'"):
        contract("tgi")
    with pytest.raises(OptionError, match="no machine 'h900'"):
        machine_of("vllm", "h900")


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    folder = portable(tmp_path, heads=4, rank=512, rope=64, nope=128, value=128, stored=torch.bfloat16)
    done = call_cli(capsys, "inspect", folder, "--for", "vllm@h100", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["served"] and [phase["phase"] for phase in found["phases"]] == ["prefill", "decode"]
    assert found["sizes"]["kv_lora_rank"] == 512 and found["version"] == contract("vllm").version
    done = call_cli(capsys, "inspect", folder, "--for", "sglang@a100", "--tensor-parallel", "2")
    assert done.returncode == 0 and "triton" in done.stdout
    assert call_cli(capsys, "inspect", folder, "--for", "vllm@h900").returncode == 2


def test_what_becomes_of_scaled_rope(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    folder = portable(
        tmp_path, heads=4, rank=512, rope=64, nope=128, value=128, stored=torch.bfloat16, rope_parameters=rope
    )
    assert "lose what only they have" in required_serving(str(folder), "vllm@h100")["scaled_rope"]
    assert "softmax" in required_serving(str(folder), "llama.cpp@cpu")["scaled_rope"]
    assert serving(str(folder), "transformers@cpu")["rope"]


def test_a_model_without_latents(source: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="none"):
        serving(str(source("llama", 2)), "vllm@h100")
