"""GGUF files, read back with gguf's own reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tests.common import SMALL, leftovers, text_file
from tests.models import pico, portable, trained_tokenizer

import latentize
from latentize.errors import CheckpointError, FormatError
from latentize.formats.gguf import gguf_reasons, write_gguf
from latentize.formats.gguf_check import check_gguf
from latentize.formats.gguf_types import GgufTensor, check_range

HEADS, RANK, ROPE, NOPE, VALUE = 6, 160, 32, 32, 32


def changed(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy with another config."""
    copy = Path(shutil.copytree(folder, tmp_path / "changed"))
    entries = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**entries, **config}))
    return copy


def values(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def test_keys(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "out.gguf", "f32", name="a model")
    found = values(tmp_path / "out.gguf")
    expected = {
        "general.architecture": "deepseek2",
        "general.name": "a model",
        "general.file_type": 0,
        "deepseek2.block_count": 2,
        "deepseek2.leading_dense_block_count": 2,
        "deepseek2.embedding_length": 96,
        "deepseek2.feed_forward_length": 128,
        "deepseek2.attention.head_count": HEADS,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.q_lora_rank": 0,
        "deepseek2.attention.kv_lora_rank": RANK,
        "deepseek2.attention.key_length": RANK + ROPE,
        "deepseek2.attention.value_length": RANK,
        "deepseek2.attention.key_length_mla": NOPE + ROPE,
        "deepseek2.attention.value_length_mla": VALUE,
        "deepseek2.rope.dimension_count": ROPE,
        "deepseek2.rope.freq_base": 10000.0,
        "deepseek2.expert_shared_count": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["deepseek2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    # llama.cpp asserts that groups are fewer than experts.
    assert not [key for key in found if "expert_group" in key or "expert_count" in key or "expert_used" in key]
    assert not [key for key in found if "rope.scaling" in key]


def test_tensors_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """Computed here in another way: the up-projection is applied, not cut."""
    write_gguf(folder, tmp_path / "out.gguf", "f32")
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in GGUFReader(tmp_path / "out.gguf").tensors}
    source = load_file(folder / "model.safetensors")
    assert not [name for name in tensors if not name.endswith(".weight")]
    assert len(tensors) == len(source) + 2  # of two layers, each has its up-projection in two
    latent_r = torch.randn(RANK, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        both_HdV = (source[f"model.layers.{layer}.self_attn.kv_b_proj.weight"] @ latent_r).view(HEADS, NOPE + VALUE)
        k_HN = torch.einsum("hrn,r->hn", tensors[f"blk.{layer}.attn_k_b.weight"], latent_r)
        v_HV = torch.einsum("hvr,r->hv", tensors[f"blk.{layer}.attn_v_b.weight"], latent_r)
        assert torch.allclose(torch.cat([k_HN, v_HV], dim=1), both_HdV, atol=1e-5)
    for name, original in {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.0.attn_kv_a_norm": "model.layers.0.self_attn.kv_a_layernorm",
        "blk.0.attn_kv_a_mqa": "model.layers.0.self_attn.kv_a_proj_with_mqa",
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
        "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }.items():
        assert torch.equal(tensors[f"{name}.weight"], source[f"{original}.weight"]), name


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_experts_of_a_layer_are_one_tensor(tmp_path: Path, kind: str) -> None:
    source = pico(tmp_path, "glm4_moe", vocab_size=320)
    trained_tokenizer().save_pretrained(source)
    latentize.convert(source, tmp_path / "out", keep="50%", data=[str(text_file(tmp_path))], **SMALL)
    write_gguf(tmp_path / "out", tmp_path / "out.gguf", kind)
    assert check_gguf(tmp_path / "out.gguf", tmp_path / "out")["tensors"]["F32"] > 2
    found, stored = values(tmp_path / "out.gguf"), load_file(tmp_path / "out" / "model.safetensors")
    expected = {"count": 3, "used_count": 2, "shared_count": 1, "feed_forward_length": 32, "gating_func": 2}
    expected |= {"weights_scale": 1.5, "weights_norm": True}
    assert {key: found[f"deepseek2.expert_{key}"] for key in expected} == expected
    assert found["deepseek2.leading_dense_block_count"] == 1
    tensors = {t.name: t for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert not [name for name in tensors if name.startswith("blk.0.") and "exp" in name]
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    bias = torch.from_numpy(np.array(tensors["blk.1.exp_probs_b.bias"].data))
    assert torch.equal(bias, stored["model.layers.1.mlp.gate.e_score_correction_bias"])
    if kind == "f32":
        made = torch.from_numpy(np.array(tensors["blk.1.ffn_down_exps.weight"].data))
        own = [stored[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in range(3)]
        assert torch.equal(made, torch.stack(own))


@pytest.mark.parametrize(
    ("kind", "matrix", "code"), [("f32", "F32", 0), ("f16", "F16", 1), ("q8_0", "Q8_0", 7), ("bf16", "BF16", 32)]
)
def test_types(folder: Path, tmp_path: Path, kind: str, matrix: str, code: int) -> None:
    out = tmp_path / "out.gguf"
    report = write_gguf(folder, out, kind)
    types = {t.name: t.tensor_type.name for t in GGUFReader(out).tensors}
    assert values(out)["general.file_type"] == code
    assert {t for name, t in types.items() if "norm" in name} == {"F32"}
    # What makes the latent's norm linear is too small for fp16.
    assert types["blk.0.attn_kv_a_mqa.weight"] == {"F16": "F32", "Q8_0": "F32"}.get(matrix, matrix)
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == types["blk.1.attn_k_b.weight"] == matrix
    assert report["tensors"] == {name: list(types.values()).count(name) for name in sorted(set(types.values()))}
    assert report["bytes"] == out.stat().st_size
    found = check_gguf(out, folder)
    bound = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-11}
    assert all(error <= bound[name] for name, error in found["largest_error"].items())


def test_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    a, b = (write_gguf(folder, tmp_path / f"{n}.gguf", "q8_0")["sha256"] for n in "ab")
    assert a == b


def test_rows_that_no_block_divides(tmp_path: Path) -> None:
    folder = portable(tmp_path, heads=4, rank=44, rope=20, nope=12, value=32)
    report = write_gguf(folder, tmp_path / "out.gguf", "q8_0")
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert types["blk.0.attn_v_b.weight"] == types["blk.0.attn_k_b.weight"] == "F16"
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert report["notes"] == ["4 matrices stay in F16: blocks of 32 do not divide their rows"]


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "base": lambda c: {"rope_parameters": {**c["rope_parameters"], "rope_theta": 10001.0}},
    "epsilon": lambda _: {"rms_norm_eps": 1e-5},
    "scaling": lambda c: {"rope_parameters": {**c["rope_parameters"], **YARN}},
}


@pytest.mark.parametrize("what", ["tensor", "transposed", "key", "base", "epsilon", "scaling", "truncated", "not GGUF"])
def test_a_file_of_something_else_is_noticed(folder: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out.gguf"
    write_gguf(folder, out, "bf16")
    whole = out.read_bytes()
    if what == "tensor":
        other = portable(tmp_path, heads=HEADS, rank=RANK, rope=ROPE, nope=NOPE, value=VALUE, seed=1)
        write_gguf(other, out, "bf16", overwrite=True)
    elif what == "transposed":  # heads of keys and values exchanged
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        tensors = load_file(copy / "model.safetensors")
        name = "model.layers.1.self_attn.kv_b_proj.weight"
        tensors[name] = tensors[name].unflatten(0, (HEADS, 2, NOPE)).flip(1).flatten(0, 2).contiguous()
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        write_gguf(copy, out, "bf16", overwrite=True)
    elif what == "key":
        at = whole.index(b"deepseek2.attention.q_lora_rank") + len("deepseek2.attention.q_lora_rank") + 4
        out.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    elif what in CHANGES:
        config = json.loads((folder / "config.json").read_text())
        change = CHANGES[what](config)
        # What is asked for is written, whatever it is; it is the check that has to notice.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("latentize.formats.gguf.check_portable", lambda _: None)
            patch.setattr("latentize.formats.gguf.EPS", change.get("rms_norm_eps", config["rms_norm_eps"]))
            write_gguf(changed(folder, tmp_path, **change), out, "bf16", overwrite=True)
    elif what == "truncated":
        out.write_bytes(whole[: len(whole) // 2])
    else:
        out.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(CheckpointError) as error:
        check_gguf(out, folder)
    assert error.value.where == str(out) and error.value.fix
    named = {"tensor": "differs", "transposed": "blk.1.attn_k_b.weight", "key": "q_lora_rank"}
    named |= {"base": "rope.freq_base", "epsilon": "rms_epsilon", "scaling": "rope.scaling"}
    assert named.get(what, "cannot be read") in error.value.what


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "latentize"}, "native"),
        ({"model_type": "llama"}, "only a portable folder"),
        ({"q_lora_rank": 8}, "low-rank query"),
        ({"first_k_dense_replace": 1, "n_group": 2}, "experts in groups"),
        ({"attention_bias": True}, "biases"),
        ({"rope_interleave": False}, "interleaved"),
        ({"rms_norm_eps": 1e-5}, "epsilon"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"tie_word_embeddings": True}, "tied"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}}, "mscale"),
    ],
)
def test_refused_before_anything_is_written(folder: Path, tmp_path: Path, config: dict[str, Any], why: str) -> None:
    bad, out = changed(folder, tmp_path, **config), tmp_path / "out.gguf"
    with pytest.raises(FormatError, match=why) as error:
        write_gguf(bad, out, "f32")
    assert error.value.where == str(bad / "config.json") and error.value.fix
    assert leftovers(tmp_path, out) == []


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"mscale": 1.0}, "one mscale"),
        ({"mscale": 0, "mscale_all_dim": 0}, "one mscale"),
        ({"beta_fast": 4}, "betas"),
        ({"beta_fast": 32, "beta_slow": 1}, None),
        ({"truncate": False}, "truncate"),
        ({"attention_factor": 1.2}, "attention_factor"),
        ({"rope_type": "linear", "mscale": None, "mscale_all_dim": None}, "linear"),
    ],
)
def test_which_scaled_rope_is_exact(folder: Path, change: dict[str, Any], why: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    reasons = gguf_reasons({**config, "rope_parameters": {**YARN, **change}})
    assert (why is None) == (reasons == [])
    assert why is None or why in reasons[0]


def test_scaled_rope_is_carried(folder: Path, tmp_path: Path) -> None:
    write_gguf(changed(folder, tmp_path, rope_parameters=YARN), tmp_path / "out.gguf", "f32")
    found = values(tmp_path / "out.gguf")
    assert found["deepseek2.rope.scaling.type"] == "yarn"
    assert found["deepseek2.rope.scaling.factor"] == 8.0
    assert found["deepseek2.rope.scaling.original_context_length"] == 64
    assert found["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.07)


def test_unknown_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(96)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="no such tensor") as error:
        write_gguf(copy, tmp_path / "out.gguf", "f32")
    assert "o_proj.bias" in error.value.where


@pytest.mark.parametrize(
    ("kind", "of", "scale", "fine"),
    [
        ("f16", "F16", 1.0, True),
        ("f16", "F16", 1e-3, True),
        ("f16", "F16", 1e-5, False),
        ("f16", "F16", 1e6, False),
        ("q8_0", "Q8_0", 1.0, True),
        ("q8_0", "Q8_0", 1e-4, False),
        ("bf16", "BF16", 1e-9, True),
        ("f32", "F32", 1e-9, True),
    ],
)
def test_what_fp16_would_damage(kind: str, of: str, scale: float, fine: bool) -> None:
    t = scale * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    tensor = GgufTensor("blk.0.attn_q.weight", "some.weight", (64, 96), lambda t: t)
    if not fine:
        with pytest.raises(FormatError, match="fp16's normal range") as error:
            check_range(t, tensor, of, kind)
        assert "some.weight" in error.value.where and "bf16" in error.value.fix
        return
    small = check_range(t, tensor, of, kind)
    assert small == (int(((t != 0) & (t.abs() < 2.0**-14)).sum()) if of == "F16" else 0)


def test_damage_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e-6
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for kind in ("f16", "q8_0"):
        with pytest.raises(FormatError, match="normal range"):
            write_gguf(copy, tmp_path / "out.gguf", kind)
    assert leftovers(tmp_path, tmp_path / "out.gguf") == []
    write_gguf(copy, tmp_path / "out.gguf", "bf16")
