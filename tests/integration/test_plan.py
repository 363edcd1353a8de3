"""Bytes of the published shapes, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.common import call_cli
from tests.models import FAMILIES, ONLY_MHA, pico_config

from latentize.errors import CheckpointError, ConfigError, OptionError
from latentize.families import ModelSpec
from latentize.planning.inspection import plan
from latentize.planning.reading import read_spec, shapes

GIB = 2**30


def rows(model: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in plan(model, **options)["rows"]}


def row(table: dict[str, dict[str, Any]], start: str) -> dict[str, Any]:
    found = [r for name, r in table.items() if name.startswith(start)]
    assert found, f"{start} is not among {list(table)}"
    return found[0]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496), ("llama-3.1-405b", 405_853_388_800)],
)
def test_shapes_have_the_parameters_that_are_published(name: str, parameters: int) -> None:
    spec = read_spec(name)
    assert isinstance(spec, ModelSpec)
    assert sum(math.prod(shape) for shape in spec.tensor_shapes().values()) == parameters


def test_llama_2_7b_at_4096() -> None:
    """32 layers of 32 heads of 128, keys and values, two bytes: 2 GiB. One latent of 512 + 64: 0.14."""
    table = rows("llama-2-7b", context=4096)
    source = row(table, "MHA (")
    assert source["values_per_token_layer"] == 2 * 32 * 128 == 8192
    assert source["cache_bytes"] == 8192 * 32 * 4096 * 2 == 2 * GIB
    mla = row(table, "MLA 512+64")
    assert mla["cache_bytes"] == (512 + 64) * 32 * 4096 * 2
    assert mla["gib"] == pytest.approx(0.1406, abs=1e-4)
    assert mla["ratio"] == pytest.approx(8192 / 576)
    mqa = row(table, "MQA")
    assert mqa["cache_bytes"] == 2 * 128 * 32 * 4096 * 2 == GIB // 16
    assert row(table, "GQA 8")["cache_bytes"] == GIB // 2


@pytest.mark.parametrize(
    ("model", "layers", "context", "gib"),
    [("llama-3-8b", 32, 8192, 1.0), ("mistral-7b", 32, 32_768, 4.0), ("qwen3-8b", 36, 40_960, 5.625)],
)
def test_models_of_eight_kv_heads(model: str, layers: int, context: int, gib: float) -> None:
    """8 kv heads of 128: 2048 values. The model's own context is the default."""
    result = plan(model)
    assert result["context"] == context
    table = {r["name"]: r for r in result["rows"]}
    source = row(table, "GQA (")
    assert source["values_per_token_layer"] == 2 * 8 * 128 == 2048
    assert source["cache_bytes"] == 2048 * layers * context * 2 == gib * GIB
    assert row(table, "MHA, for comparison")["cache_bytes"] == 4 * gib * GIB
    assert row(table, "MLA 512+64")["cache_bytes"] == 576 * layers * context * 2
    quarter = row(table, "MLA, --keep 25%")
    assert (quarter["values_per_token_layer"], quarter["cache_bytes"]) == (512, gib * GIB / 4)
    assert quarter["ratio"] == 4
    # 32 numbers of 4 bits with a scale and an offset of 16 bits: 5 bits each.
    assert row(table, "GQA int4")["cache_bytes"] == source["cache_bytes"] * 5 / 16
    assert row(table, "GQA int8")["cache_bytes"] == source["cache_bytes"] * 9 / 16
    assert row(table, "window 4096")["cache_bytes"] == 2048 * layers * 4096 * 2


def test_batch_and_window() -> None:
    one, many = rows("llama-3-8b", context=1000), rows("llama-3-8b", context=1000, batch=7)
    assert all(many[name]["cache_bytes"] == 7 * one[name]["cache_bytes"] for name in one)
    assert not any(name.startswith("window") for name in one), "a window larger than the context keeps all"
    windowed = rows("llama-3-8b", context=1000, window=100)
    assert row(windowed, "window 100")["ratio"] == 10


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "mistral-7b", "qwen3-8b"])
def test_shapes_that_ship(name: str) -> None:
    assert name in shapes()
    assert plan(name)["model"]["num_attention_heads"] == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_file_and_a_folder(tmp_path: Path, family: str) -> None:
    path = tmp_path / "config.json"
    heads = 4 if family in ONLY_MHA else 2
    path.write_text(pico_config(family, heads).to_json_string(use_diff=False))
    # Convolutions and DeltaNet cache no keys and values.
    layers = 1 if family in ("lfm2", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next") else 2
    for model in (path, tmp_path):
        result = plan(str(model), context=10)
        assert result["rows"][0]["cache_bytes"] == 2 * heads * 16 * layers * 10 * 2
        assert result["model"]["model_type"] == family


def test_mha_is_the_model_itself_when_it_is_mha(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(pico_config("llama", 4).to_json_string(use_diff=False))
    table = rows(str(path), context=10, keep=0.5)
    assert not any("comparison" in name for name in table)
    assert row(table, "MLA, --keep 50%")["values_per_token_layer"] == 64
    assert not any("512+64" in name for name in table), "larger than the source"


@pytest.mark.parametrize("keep", ["0%", "200%", "much", -1, None, "nan%", float("nan")])
def test_a_keep_that_is_no_share(keep: Any) -> None:
    with pytest.raises(OptionError) as caught:
        plan("llama-3-8b", keep=keep)
    assert caught.value.where == "--keep"


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        plan("./nowhere")
    assert "llama-3-8b" in caught.value.fix


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_config_that_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError):
        plan(str(tmp_path))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        plan(str(tmp_path))


def test_rows_are_json() -> None:
    assert json.loads(json.dumps(plan("qwen3-8b")))["rows"]


def test_ranks_share_heads_and_hold_all_of_a_latent() -> None:
    whole, shared = (plan("llama-3-8b", context=32_768, tensor_parallel=n) for n in (1, 16))
    assert "tensor_parallel" not in whole and all("rank_bytes" not in row for row in whole["rows"])
    held = {row["name"]: row["cache_bytes"] / row["rank_bytes"] for row in shared["rows"]}
    assert held["GQA (the model as it is)"] == 8, "one head a rank, and each head twice"
    assert held["MHA, for comparison"] == 16
    assert held["MQA"] == held["MLA 512+64"] == 1
    latent = plan("deepseek-v2-lite", context=32_768, tensor_parallel=4)
    held = {row["name"]: row["cache_bytes"] / row["rank_bytes"] for row in latent["rows"]}
    assert held["MLA (the model as it is)"] == 1 and held["MHA, for comparison"] == 4


def test_ranks_in_the_table(capsys: Any) -> None:
    done = call_cli(capsys, "plan", "llama-3-8b", "--context", 32768, "--tensor-parallel", 8)
    assert done.returncode == 0 and "on each of 8" in done.stdout
    assert "on each" not in call_cli(capsys, "plan", "llama-3-8b", "--context", 32768).stdout
    with_machine = call_cli(capsys, "plan", "llama-3-8b", "--device", "h100", "--tensor-parallel", 8)
    assert with_machine.returncode == 0
