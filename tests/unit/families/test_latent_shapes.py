"""Shapes of models that have latent attention as they come, against transformers and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.common import SMALL
from tests.latent_models import MIXTURES, mixture, saved
from transformers import AutoConfig, AutoModelForCausalLM

from latentize import convert, evaluate
from latentize.errors import ConfigError, LatentizeError, UnsupportedModelError
from latentize.families import is_latent, latent_model, model_spec
from latentize.families.latent_types import LATENT_TYPES
from latentize.planning.inspection import inspect, plan
from latentize.planning.reading import read_spec, shapes
from latentize.recipe import Recipe

PUBLISHED = ("deepseek-v2-lite", "deepseek-v3", "glm-4.7-flash", "kimi-k2")


def rows(model: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in plan(model, **options)["rows"]}


@pytest.mark.parametrize("model_type", LATENT_TYPES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    theirs = AutoConfig.for_model(model_type)
    for name, value in LATENT_TYPES[model_type].items():
        assert getattr(theirs, name) == value, name
    bare = {"model_type": model_type}
    if model_type == "deepseek_v2":
        # It has no default for this one.
        bare["num_experts_per_tok"] = 6
    assert latent_model(bare).attention.v_head_dim == theirs.v_head_dim


@pytest.mark.parametrize("name", MIXTURES)
def test_tensors_and_parameters_are_the_models_own(name: str) -> None:
    model = mixture(name)
    ours = latent_model(model.config.to_dict())
    prefix = "model.layers.1.self_attn."
    theirs = {n.removeprefix(prefix): tuple(t.shape) for n, t in model.state_dict().items() if n.startswith(prefix)}
    assert ours.attention_shapes() == theirs
    assert ours.parameters == model.num_parameters()


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "glm-4.7-flash"])
def test_published_shapes_are_models_of_transformers(name: str) -> None:
    """What config.json says is all that its class needs, and both count the same parameters."""
    config = json.loads(shapes()[name].read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert latent_model(config).parameters == model.num_parameters()


def test_deepseek_v3_by_hand() -> None:
    """61 layers, three of them dense; 256 experts of 3 · 7168 · 2048: 671 billion parameters."""
    model = latent_model(json.loads(shapes()["deepseek-v3"].read_text()))
    hidden, expert = 7168, 3 * 7168 * 2048
    queries = 7168 * 1536 + 1536 + 1536 * 128 * (128 + 64)
    latent = 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    attention = queries + latent + 128 * 128 * 7168
    dense, sparse = 3 * 7168 * 18_432, 256 * expert + expert + 256 * 7168
    layers = 61 * (attention + 2 * hidden) + 3 * dense + 58 * sparse
    assert model.parameters == layers + hidden + 2 * 129_280 * hidden == 671_026_404_352
    # A cached token: 576 values of two bytes in each of 61 layers. 128 heads of 192 + 128 would be 71 times as many.
    table = rows("deepseek-v3", context=32_768)
    assert table["MLA (the model as it is)"]["cache_bytes"] == 576 * 2 * 61 * 32_768
    assert table["MHA, for comparison"]["values_per_token_layer"] == 128 * (192 + 128) == 40_960
    assert table["MHA, for comparison"]["ratio"] == pytest.approx(576 / 40_960)
    quarter = table["MLA, --keep 25%"]
    assert quarter["values_per_token_layer"] == 144
    assert quarter["ratio"] == 4
    # 512 latents of 4 bits, 64 roped values of 8, two scales of 16.
    small = table["MLA (the model as it is), int4+int8"]
    assert small["cache_bytes"] == (512 * 4 + 64 * 8 + 32) // 8 * 61 * 32_768


def test_deepseek_v2_lite_on_a_machine() -> None:
    """Weights of two bytes; a step of one sequence goes through 6 of 64 experts, one of many through nearly all."""
    few = plan("deepseek-v2-lite", context=4096, memory=40, bandwidth=1000)
    many = plan("deepseek-v2-lite", context=4096, batch=64, memory=40, bandwidth=1000)
    shape = latent_model(json.loads(shapes()["deepseek-v2-lite"].read_text()))
    routed = 26 * 64 * 3 * 2048 * 1408
    assert shape.routed_parameters == routed
    stored, always = 2 * 15_706_484_224, 2 * (15_706_484_224 - routed - 102_400 * 2048)
    cache = 576 * 2 * 27 * 4096
    first, crowd = few["rows"][0], many["rows"][0]
    assert first["weight_bytes"] == crowd["weight_bytes"] == stored
    assert first["step_bytes"] == pytest.approx(always + 2 * routed * 6 / 64 + cache)
    assert crowd["step_bytes"] == pytest.approx(always + 2 * routed * (1 - (58 / 64) ** 64) + 64 * cache)
    assert first["max_batch"] == int((0.9 * 40e9 - stored) / cache)
    # Fewer values to cache, fewer weights to make them and to read them with.
    half = next(row for row in few["rows"] if row["name"] == "MLA, half the rank: 256")
    gone = 27 * (256 * 2048 + 256 + 256 * 16 * 256)
    assert half["weight_bytes"] == stored - 2 * gone
    assert half["break_even_context"] == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_shape_of_the_fast_kernels(name: str) -> None:
    result = plan(name)
    model = result["model"]
    assert (model["attention"], model["kv_lora_rank"], model["qk_rope_head_dim"]) == ("MLA", 512, 64)
    assert model["cache_values_per_token_layer"] == 576
    assert result["context"] == model["max_position_embeddings"]


@pytest.mark.parametrize("name", MIXTURES)
def test_inspect(tmp_path: Path, name: str) -> None:
    model = mixture(name)
    result = inspect(str(saved(model, tmp_path / "model")))
    assert (result["attention"], result["kv_lora_rank"], result["cache_values_per_token_layer"]) == ("MLA", 32, 40)
    assert result["q_lora_rank"] == model.config.q_lora_rank
    # Beside parameters, the files have what balances experts.
    assert model.num_parameters() <= result["parameters"] <= model.num_parameters() + 16
    assert [(m["method"], m["result"]) for m in result["methods"]] == [("lower rank", name.split("-")[0])]


def test_a_type_whose_rank_is_not_lowered_is_inspected(tmp_path: Path) -> None:
    entries = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    entries |= {"kv_lora_rank": 14, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "vocab_size": 257}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("minicpm3", num_key_value_heads=4, **entries))
    assert latent_model(model.config.to_dict()).parameters == model.num_parameters()
    result = inspect(str(saved(model, tmp_path / "model")))
    assert [m["result"] for m in result["methods"]] == ["refused"]


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lora_rank": 0},
        {"qk_rope_head_dim": 7},
        {"qk_nope_head_dim": 1 << 20},
        {"num_hidden_layers": "2"},
        {"num_experts_per_tok": None},
        {"first_k_dense_replace": "x"},
        {"rope_parameters": 3},
        {"rope_theta": "x"},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense(change: dict[str, Any]) -> None:
    config = {**json.loads(shapes()["deepseek-v2-lite"].read_text()), "rope_scaling": None, **change}
    with pytest.raises(ConfigError):
        latent_model(config)


def test_a_keep_that_the_roped_key_exceeds() -> None:
    """A tenth of 576 values is less than the roped key: there is no such row."""
    assert not any("--keep" in name for name in rows("deepseek-v3", keep="10%"))


# Types whose layers are not all alike; and what the first of them caches of a token, in bytes, by hand.
BEYOND: dict[str, tuple[str, dict[str, Any], int]] = {
    "Mistral Small 4, 119 B": ("mistral4", {}, 2 * 36 * (256 + 64)),
    "DeepSeek-V3.2, 672 B": ("deepseek_v32", {}, 2 * 61 * (512 + 64 + 128)),
    "GLM-5, 744 B": ("glm_moe_dsa", {}, 2 * 78 * (512 + 64 + 128)),
    # Layers 0, 1, 5, 9 … of 78 have an index; others take what the last one chose.
    "GLM-5, an index every fourth": ("glm_moe_dsa", {"index_topk_freq": 4}, 2 * (78 * (512 + 64) + 21 * 128)),
    "Kimi Linear, 49 B": ("kimi_linear", {}, 2 * 6 * (512 + 64)),
    "Kimi Linear, as its files say it": (
        "kimi_linear",
        {
            "linear_attn_config": {
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                "kda_layers": [n for n in range(1, 27) if n % 4],
                "head_dim": 64,
                "num_heads": 16,
                "short_conv_kernel_size": 4,
            },
            "num_experts": 64,
            "num_experts_per_token": 4,
            "num_shared_experts": 2,
            "model_max_length": 4096,
        },
        2 * 7 * (512 + 64),
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_indices_and_layers_of_other_attention_are_counted(name: str) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_PRETRAINING_MAPPING_NAMES, MODEL_MAPPING_NAMES

    model_type, entries, of_token = BEYOND[name]
    class_name = MODEL_MAPPING_NAMES[model_type].replace("Model", "ForCausalLM")
    assert MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(model_type, class_name) == class_name
    config = AutoConfig.for_model(model_type, **entries)
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    ours = latent_model({"model_type": model_type, **entries})
    assert ours.parameters == model.num_parameters()
    assert ours.describe()["cache_bytes_per_token"] == of_token
    assert ours.max_positions == config.max_position_embeddings
    # What transformers writes is read as what it was made of, but that it states RoPE's defaults.
    assert {**latent_model(config.to_dict()).describe(), "rope": None} == {**ours.describe(), "rope": None}


def test_an_index_reads_its_keys_and_the_latents_that_it_chose(tmp_path: Path) -> None:
    """Of 131,072 tokens 2,048 are attended to, and all keys of the index are looked at."""
    path, context = tmp_path / "config.json", 131_072
    path.write_text(json.dumps({"model_type": "deepseek_v32"}))
    planned = plan(str(path), context=context, batch=4, memory=2000, bandwidth=8000)
    source, half = (next(r for r in planned["rows"] if r["name"].startswith(n)) for n in ("MLA (", "MLA, half"))
    latents, index = 2 * 61 * 576, 2 * 61 * 128
    assert source["cache_bytes"] == 4 * context * (latents + index)
    assert half["cache_bytes"] == 4 * context * (2 * 61 * (256 + 64) + index)
    wide = plan(str(path), context=2 * context, batch=4, memory=2000, bandwidth=8000)["rows"][0]
    assert wide["step_bytes"] - source["step_bytes"] == 4 * context * index
    assert source["max_context"] == int((0.9 * 2000e9 - source["weight_bytes"]) / (4 * (latents + index)))
    small = next(r for r in planned["rows"] if r["name"] == "MLA (the model as it is), int4+int8")
    assert small["cache_bytes"] == 4 * context * (61 * (512 * 4 + 64 * 8 + 32) // 8 + index)


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("kimi_linear", {"layer_types": ["linear_attention"] * 27}),
        ("kimi_linear", {"linear_attn_config": {"kda_layers": list(range(1, 28))}}),
        ("kimi_linear", {"linear_attn_config": {"num_heads": "x"}}),
        ("glm_moe_dsa", {"index_head_dim": 0}),
        ("glm_moe_dsa", {"index_n_heads": None, "index_topk": -1}),
    ],
)
def test_such_a_config_that_makes_no_sense(model_type: str, change: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, UnsupportedModelError)):
        latent_model({"model_type": model_type, **change})


def test_language_models_of_multimodal_ones_are_planned(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}))
    assert plan(str(path), context=4096)["model"]["kv_lora_rank"] == 256
    path.write_text(json.dumps({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}}))
    assert plan(str(path), context=4096)["model"]["model_type"] == "deepseek_v3"
    # As published: a trillion parameters.
    assert plan("kimi-k2")["model"]["parameters"] == 1_026_408_209_408


def test_mistral_small_4_inside_a_multimodal_model(tmp_path: Path, text: str) -> None:
    """Its language model gets a smaller latent, and is known by ``AutoModelForCausalLM``."""
    folder, out = saved(mixture("mistral4"), tmp_path / "model"), tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": config}))
    tensors = load_file(folder / "model.safetensors")
    whole = {
        name.replace("model.", "language_model.model.", 1): t for name, t in tensors.items() if name != "lm_head.weight"
    }
    whole |= {"language_model.lm_head.weight": tensors["lm_head.weight"], "vision_tower.x": torch.ones(2)}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    small = {name: value for name, value in SMALL.items() if name != "dtype"}
    report = convert(folder, out, keep="75%", data=(text,), **small)
    assert report["format"] == "mistral4"
    assert AutoModelForCausalLM.from_pretrained(out).config.kv_lora_rank == report["kv_lora_rank"] < 32
    assert evaluate(out, folder, data=(text,), tokens=512, sequence_length=64)["kl"] < 0.2


def test_kimi_k2_is_deepseek_v3(tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Files that come with code of their own; it is not run, and nobody is asked whether it may be."""
    folder, out = saved(mixture("deepseek_v3"), tmp_path / "model"), tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2", "auto_map": code}))
    assert inspect(str(folder))["methods"][0]["result"] == "deepseek_v3"
    small = {name: value for name, value in SMALL.items() if name != "dtype"}
    report = convert(folder, out, keep="75%", data=(text,), **small)
    assert report["format"] == "deepseek_v3"
    assert evaluate(out, folder, data=(text,), tokens=512, sequence_length=64)["kl"] < 0.1
    assert "Do you wish" not in "".join(capfd.readouterr())
    assert AutoModelForCausalLM.from_pretrained(out).config.kv_lora_rank == report["kv_lora_rank"]


@pytest.mark.parametrize("model_type", ["deepseek_v4", "longcat_flash"])
def test_other_latent_models_are_refused_by_name(model_type: str) -> None:
    config = {"model_type": model_type, "kv_lora_rank": 512}
    assert not is_latent(config)
    with pytest.raises(LatentizeError) as caught:
        model_spec(config)
    assert caught.value.code == "LZ203"


def test_a_rank_alone_is_for_such_models_only() -> None:
    from latentize.attention.spec import AttentionSpec, RopeSpec
    from latentize.methods.registry import settings

    recipe = Recipe.build(kv_lora_rank=8)
    with pytest.raises(LatentizeError, match="belong together"):
        settings(recipe, AttentionSpec(64, 4, 2, 16, RopeSpec(10_000.0, 16)))
    for other in ({"method": "care"}, {"to": "gqa"}):
        with pytest.raises(LatentizeError, match="belong together"):
            Recipe.build(kv_lora_rank=8, **other)


def test_bytes_of_a_token_are_counted_once() -> None:
    for name in PUBLISHED:
        model = read_spec(name)
        assert model.describe()["cache_bytes_per_token"] == math.prod((576, 2, model.layers))
