"""Scales within a portable layer: they change nothing that it computes, and make its matrices fit to be quantised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.common import SMALL, random_tokens
from tests.models import portable
from tests.unit.formats.test_formats import CONFIG, RANK, H, N, latent_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import latentize
from latentize.attention.latent import LatentWeights, latent_attention
from latentize.errors import CheckpointError
from latentize.formats.balance import KEY, Balance, balances, rebalance, spread, unbalance, unbalanced
from latentize.formats.deepseek_v3 import LatentNorm, balance_of, decode_attention, encode_attention
from latentize.formats.gguf import write_gguf

NORM = LatentNorm.of(2.0, 1.0)
# Far apart, and none of them 2 to the same power.
ODD = Balance(-19, -17, -22)
WITHIN = 16
# Layers whose parts are of other sizes than their neighbours by far.
SIZES: dict[str, dict[str, float]] = {
    "alike": {},
    "large roped keys": {"k_rope_PRD": 300.0},
    "small roped keys": {"k_rope_PRD": 1e-3},
    "small roped queries": {"q_rope_HRD": 1e-3},
    "large un-roped queries": {"q_nope_HND": 300.0},
    "small values": {"v_up_UVr": 1e-3},
    "large un-roped keys": {"k_up_UNr": 300.0},
    "all at once": {"k_rope_PRD": 50.0, "q_nope_HND": 1e-2, "v_up_UVr": 200.0},
}


def sized(**factors: float) -> LatentWeights:
    w = latent_weights(torch.float32)
    return replace(w, **{name: getattr(w, name) * factor for name, factor in factors.items()})


def parts(tensors: dict[str, Tensor], heads: int, nope: int, rank: int) -> dict[str, tuple[float, float]]:
    """Root mean squares of the two parts of each matrix that has two."""

    def rms(t: Tensor) -> float:
        return float(t.double().square().mean().sqrt())

    q, kv_b = (tensors[f"{name}.weight"].unflatten(0, (heads, -1)) for name in ("q_proj", "kv_b_proj"))
    kv_a = tensors["kv_a_proj_with_mqa.weight"]
    return {
        "q_proj": (rms(q[:, :nope]), rms(q[:, nope:])),
        "kv_a_proj_with_mqa": (rms(kv_a[:rank]), rms(kv_a[rank:])),
        "kv_b_proj": (rms(kv_b[:, :nope]), rms(kv_b[:, nope:])),
    }


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("largest", [1e-2, 2.0, 300.0])
def test_parts_of_a_matrix_are_of_one_size(sizes: dict[str, float], largest: float) -> None:
    w, norm = sized(**sizes), LatentNorm.of(largest, largest / 2)
    tensors = encode_attention(w, norm, balance=balance_of(w, norm, torch.bfloat16))
    found = parts(tensors, H, N, RANK)
    assert all(max(two) <= 2**1.5 * min(two) for two in found.values())


@pytest.mark.parametrize("name", ["k_rope_PRD", "kv_a_rD", "q_nope_HND", "v_up_UVr", "k_up_UNr"])
def test_one_large_weight_does_not_decide(name: str) -> None:
    w = latent_weights(torch.float32)
    getattr(w, name).view(-1)[0] = 1000.0
    tensors = encode_attention(w, NORM, balance=balance_of(w, NORM, torch.bfloat16))
    assert all(max(two) <= 4 * min(two) for two in parts(tensors, H, N, RANK).values())


def test_there_is_something_to_balance() -> None:
    found = parts(encode_attention(latent_weights(), NORM), H, N, RANK)["kv_a_proj_with_mqa"]
    assert max(found) > 1e5 * min(found)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_it_is_undone_to_the_bit(sizes: dict[str, float]) -> None:
    w = sized(**sizes)
    found = balance_of(w, NORM, torch.float32)
    plain, stored = encode_attention(w, NORM), encode_attention(w, NORM, balance=found)
    assert all(torch.equal(unbalanced(name, stored[name], found, CONFIG), plain[name]) for name in plain)
    expected, back = decode_attention(plain, CONFIG), found.undone(decode_attention(stored, CONFIG))
    for name, tensor in vars(expected).items():
        assert not isinstance(tensor, Tensor) or torch.equal(getattr(back, name), tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_computes_the_same_bits(dtype: torch.dtype) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    w, x = latent_weights(torch.float32), (2.0**-10 * torch.randn(2, 9, 24)).to(dtype)
    config = DeepseekV3Config(**CONFIG, hidden_size=24, num_key_value_heads=H, q_lora_rank=None)
    config._attn_implementation = "sdpa"
    rotary = DeepseekV3RotaryEmbedding(config)(x, torch.arange(9)[None])
    made = []
    for balance in (Balance(), ODD):
        attention = DeepseekV3Attention(config, 0).eval()
        attention.load_state_dict(encode_attention(w, NORM, balance=balance))
        with torch.no_grad():
            made.append(attention.to(dtype)(x, position_embeddings=rotary, attention_mask=None)[0])
    assert torch.equal(*made)


def test_weights_for_float16_are_not_balanced() -> None:
    assert balance_of(latent_weights(), NORM, torch.float16) == Balance()


@pytest.mark.parametrize("part", ["q_nope_HND", "q_rope_HRD", "k_rope_PRD", "k_up_UNr", "v_up_UVr", "kv_a_rD"])
def test_a_part_that_is_zero_is_of_any_size(part: str) -> None:
    w = sized(**{part: 0.0})
    tensors = encode_attention(w, NORM, balance=balance_of(w, NORM, torch.bfloat16))
    assert all(torch.isfinite(t.bfloat16()).all() for t in tensors.values())


@pytest.mark.parametrize(
    "said",
    [
        [[0, 0, 0]],
        [[0, 0, 0]] * 3,
        [[0, 0], [0, 0]],
        [[0, 0, 0.5], [0, 0, 0]],
        [[0, 0, 1000], [0, 0, 0]],
        [[0, 0, True], [0, 0, 0]],
        [[0, 0, "1"], [0, 0, 0]],
        {"0": [0, 0, 0], "1": [0, 0, 0]},
        [None, None],
        "ab",
        7,
    ],
    ids=repr,
)
def test_what_is_no_balance(said: Any) -> None:
    with pytest.raises(CheckpointError, match=KEY):
        balances({"num_hidden_layers": 2, KEY: said})


def test_what_was_written_without_is_read() -> None:
    assert balances({"num_hidden_layers": 2}) == [Balance(), Balance()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder as it was written before there were factors, and the same model with them."""
    before = portable(
        tmp_path_factory.mktemp("before"), heads=4, rank=32, rope=32, nope=32, value=32, stored=torch.bfloat16
    )
    after = tmp_path_factory.mktemp("after") / before.name
    shutil.copytree(before, after)
    config, tensors = json.loads((after / "config.json").read_text()), load_file(after / "model.safetensors")
    inverse = Balance(*(-e for e in astuple(ODD)))
    for name in tensors:
        tensors[name] = unbalanced(name.partition(".self_attn.")[2], tensors[name], inverse, config).contiguous()
    save_file(tensors, after / "model.safetensors", metadata={"format": "pt"})
    (after / "config.json").write_text(json.dumps({**config, KEY: [list(astuple(ODD))] * 2}))
    return before, after


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "q8_0"])
def test_the_file_for_llama_cpp_is_the_same(folders: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    a, b = (write_gguf(f, tmp_path / f"{i}.gguf", kind, name="m")["sha256"] for i, f in enumerate(folders))
    assert a == b


def test_the_same_logits_and_a_config_that_survives(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tokens = random_tokens(2, 24, vocab=300)
    before, after = (load(folder) for folder in folders)
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)
    after.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())[KEY] == [list(astuple(ODD))] * 2


def test_accelerating_takes_it_out_and_back(folders: tuple[Path, Path]) -> None:
    """Caches in fp16 hold roped keys then; a second model of the same config keeps its own."""
    before, after = (load(folder) for folder in folders)
    other = AutoModelForCausalLM.from_config(after.config)
    stored = {name: t.clone() for name, t in after.state_dict().items()}
    latentize.accelerate(after)
    assert all(torch.equal(t, before.state_dict()[name]) for name, t in after.state_dict().items())
    assert not hasattr(after.config, KEY) and hasattr(other.config, KEY)
    latentize.decelerate(after)
    assert all(torch.equal(t, stored[name]) for name, t in after.state_dict().items())
    assert hasattr(after.config, KEY)


def _half(model: Any) -> None:
    model.half()


def _adapted(model: Any) -> None:
    class Adapted(nn.Linear):
        pass

    model.model.layers[1].self_attn.o_proj.__class__ = Adapted


def _unnamed(model: Any) -> None:
    delattr(model.config, KEY)


@pytest.mark.parametrize("change", [_half, _adapted, _unnamed])
def test_matrices_that_somebody_has_replaced_stay(folders: tuple[Path, Path], change: Callable[[Any], None]) -> None:
    model = load(folders[1])
    change(model)
    stored = {name: t.clone() for name, t in model.state_dict().items()}
    assert not unbalance(model)
    rebalance(model)
    assert all(torch.equal(t, stored[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_is_converted(source: Callable[..., Path], text: str, tmp_path: Path, family: str, dtype: str) -> None:
    out = tmp_path / "out"
    latentize.convert(source(family), out, format="deepseek_v3", keep="25%", data=(text,), **{**SMALL, "dtype": dtype})
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    if dtype == "float16":
        assert KEY not in config
        return
    for layer, balance in enumerate(balances(config)):
        prefix = f"model.layers.{layer}.self_attn."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        shape = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]
        assert balance != Balance()
        assert all(max(two) <= WITHIN * min(two) for two in parts(own, *shape).values())


@pytest.mark.parametrize("train", ["attention", "all"])
def test_healing_sees_what_it_saw_before(folders: tuple[Path, Path], train: str) -> None:
    """The same coordinates to the bit, and what it writes is balanced as the config says."""
    from latentize.checkpoint import open_checkpoint
    from latentize.healing.recipe import Healing
    from latentize.healing.student import Student

    students = [Student(folder, Healing(train=train)) for folder in folders]
    first, second = (student.state_dict() for student in students)
    assert all(torch.equal(first[name], second[name]) for name in first)
    tokens, config = random_tokens(2, 24, vocab=300), open_checkpoint(folders[1]).config
    written = [
        dict(student.stored(open_checkpoint(folder), tokens)) for student, folder in zip(students, folders, strict=True)
    ]
    for name, tensor in written[0].items():
        inner = name.partition(".self_attn.")[2]
        assert torch.equal(unbalanced(inner, written[1][name].float(), ODD, config), tensor.float()), name


@pytest.mark.parametrize("shared", [False, True])
def test_random_axes_change_nothing(shared: bool) -> None:
    w = latent_weights(torch.float64)
    w = replace(w, q_nope_bias_HN=torch.randn(w.q_nope_HND.shape[:2], dtype=torch.float64))
    if shared:
        w = replace(w, k_up_UNr=w.k_up_UNr[::2], v_up_UVr=w.v_up_UVr[::2])
    x_BTD = torch.randn(2, 9, w.spec.hidden_size, dtype=torch.float64)
    made = spread(w, 3)
    for absorb in (False, True):
        expected = latent_attention(x_BTD, w, absorb=absorb)
        torch.testing.assert_close(latent_attention(x_BTD, made, absorb=absorb), expected, rtol=1e-10, atol=1e-12)
    for name in ("q_nope_HND", "kv_a_rD", "o_DHV"):
        assert not torch.allclose(getattr(made, name), getattr(w, name)), name
    # Each query head has axes of its own.
    assert len(made.k_up_UNr) == len(made.v_up_UVr) == w.spec.num_heads
    for name in ("q_rope_HRD", "k_rope_PRD"):
        assert getattr(made, name) is getattr(w, name), name
    assert torch.equal(spread(w, 3).kv_a_rD, made.kv_a_rD) and not torch.equal(spread(w, 4).kv_a_rD, made.kv_a_rD)


def test_random_axes_spread_what_stands_out() -> None:
    """Latents in order of what they hold, as conversion makes them, and one dimension of a head that is larger."""
    w = latent_weights(torch.float64)
    falling = torch.logspace(0, -3, len(w.kv_a_rD), dtype=torch.float64)
    w = replace(w, kv_a_rD=w.kv_a_rD * falling[:, None], k_up_UNr=w.k_up_UNr * falling)
    w.k_up_UNr[:, 0] *= 30
    made = spread(w, 0)

    def steepness(t: Tensor) -> float:
        """Largest by typical weight."""
        return float(t.abs().amax() / t.square().mean().sqrt())

    assert steepness(made.k_up_UNr) < 0.6 * steepness(w.k_up_UNr)
    rows = made.kv_a_rD.norm(dim=1)
    assert rows.max() < 10 * rows.min() and steepness(made.kv_a_rD) < steepness(w.kv_a_rD)


def test_latents_are_balanced() -> None:
    """No others that compute the same have a smaller product of norms: it is the nuclear norm of what they compute."""
    w = latent_weights(torch.float64)
    share = w.spec.num_heads // w.spec.up_heads
    w = replace(
        w,
        kv_a_rD=w.kv_a_rD * torch.logspace(0, -3, len(w.kv_a_rD), dtype=torch.float64)[:, None],
        k_up_UNr=w.k_up_UNr.repeat_interleave(share, dim=0) / w.k_up_UNr.norm(),
        v_up_UVr=w.v_up_UVr.repeat_interleave(share, dim=0) / w.v_up_UVr.norm(),
    )

    def up(w: LatentWeights) -> Tensor:
        return torch.cat([w.k_up_UNr.flatten(0, 1), w.v_up_UVr.flatten(0, 1)])

    made = spread(w, 0)
    least = float(torch.linalg.matrix_norm(up(w) @ w.kv_a_rD, "nuc"))
    assert float(up(made).norm() * made.kv_a_rD.norm()) == pytest.approx(least)
    assert float(up(w).norm() * w.kv_a_rD.norm()) > 1.1 * least


@pytest.mark.parametrize("part", ["kv_a_rD", "k_up_UNr", "v_up_UVr", "two latents alike", "more latents than inputs"])
def test_degenerate_layers_have_axes_too(part: str) -> None:
    w = latent_weights(torch.float64)
    if part == "two latents alike":
        w.kv_a_rD[1] = w.kv_a_rD[0]
    elif part == "more latents than inputs":
        few = w.spec.kv_lora_rank // 2
        w = replace(w, **{n: getattr(w, n)[..., :few] for n in ("q_nope_HND", "q_rope_HRD", "kv_a_rD", "k_rope_PRD")})
        w = replace(w, o_DHV=w.o_DHV[:few])
    else:
        w = replace(w, **{part: torch.zeros_like(getattr(w, part))})
    x_BTD = torch.randn(2, 9, w.spec.hidden_size, dtype=torch.float64)
    made = latent_attention(x_BTD, spread(w, 0), absorb=True)
    torch.testing.assert_close(made, latent_attention(x_BTD, w, absorb=True), rtol=1e-8, atol=1e-10)
