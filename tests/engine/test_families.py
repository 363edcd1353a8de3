"""What becomes of each family, and whether each engine then computes what transformers does.

Small random models, converted in closed form to the portable format. Makes the support matrix of the documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import text_file
from tests.engine.conftest import Record
from tests.models import LLAMA3_SCALING, PECULIAR, YARN_SCALING, pico_model, trained_tokenizer

import latentize
from latentize.errors import LatentizeError

# Label → model_type, entries of its config, and how the portable format holds it.
CONVERTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama 2, SmolLM2, TinyLlama": ("llama", {}, "exact"),
    "Llama 3.1+, scaled RoPE": ("llama", {"rope_parameters": LLAMA3_SCALING}, "approximate"),
    "Qwen2.5 for long texts, YaRN": ("qwen2", {"rope_parameters": YARN_SCALING}, "approximate"),
    "older long Llamas, linear RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
        "approximate",
    ),
    "Mistral 0.2+": ("mistral", {}, "exact"),
    "Granite 3": ("granite", {}, "exact"),
    "Phi-4": ("phi3", {}, "exact"),
    "Qwen2, Qwen2.5, biases": ("qwen2", {}, "approximate"),
    "Qwen3, qk-norm": ("qwen3", {}, "approximate"),
    "Hunyuan, qk-norm after RoPE": ("hunyuan_v1_dense", {}, "approximate"),
    "SmolLM3, layers without RoPE": ("smollm3", {}, "exact"),
    "Phi-4-mini, RoPE on parts of heads": ("phi3", {"partial_rotary_factor": 0.75}, "exact"),
    "GLM-4 of 2024, half of a head rotates, biases": ("glm", {}, "approximate"),
    "GLM-4.5, experts, half of a head rotates": ("glm4_moe", PECULIAR["glm4_moe"], "approximate"),
}
# The same in DeepSeek-V2's layout. transformers does not weigh chosen experts so.
SOFTMAX: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mixtral, experts (deepseek_v2)": ("mixtral", {"num_local_experts": 4}, "exact"),
    "Granite 3 with experts (deepseek_v2)": ("granitemoe", {**PECULIAR["granitemoe"], "num_local_experts": 4}, "exact"),
    "Qwen3-MoE, a first layer without experts (deepseek_v2)": (
        "qwen3_moe",
        {**PECULIAR["qwen3_moe"], "num_experts": 4, "mlp_only_layers": [0]},
        "approximate",
    ),
    "OLMoE, weights that do not sum to one (deepseek_v2)": (
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2},
        "approximate",
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral 0.1, sliding window": ("mistral", {"sliding_window": 16}),
    "gpt-oss, learnt sinks (native format)": ("gpt_oss", PECULIAR["gpt_oss"]),
    "Gemma 2 (native format)": ("gemma2", {}),
    "DeepSeek-V3.2, latents with an index": ("deepseek_v32", {"kv_lora_rank": 16, "num_hidden_layers": 1}),
}
ENGINES = ("transformers", "llama.cpp", "vllm")


def source(folder: Path, model_type: str, config: dict[str, Any]) -> Path:
    pico_model(model_type, 2, vocab_size=320, **config).to(torch.bfloat16).save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """The portable folder of a family, and what ``convert`` reported."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(label: str) -> tuple[Path, dict[str, Any]]:
        if label not in made:
            folder = tmp_path_factory.mktemp("family")
            model_type, config, _ = {**CONVERTED, **SOFTMAX}[label]
            model = source(folder / "source", model_type, config)
            sizes = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "sequence_length": 64}
            tokens = {"tokens": 4096, "selection_tokens": 256, "evaluation_tokens": 512}
            layout = "deepseek_v2" if label in SOFTMAX else "deepseek_v3"
            options = {"fast": True, "format": layout, "data": (text_file(folder),), **sizes, **tokens}
            made[label] = folder / "out", latentize.convert(model, folder / "out", **options)
        return made[label]

    return make


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "engine"),
    # That of OLMoE runs in transformers as it is.
    [
        (label, engine)
        for label in (*CONVERTED, *SOFTMAX)
        for engine in ENGINES[label in SOFTMAX and "OLMoE" not in label :]
    ],
)
def test_a_family_in_an_engine(
    converted: Callable[[str], tuple[Path, dict[str, Any]]],
    needs: Callable[[str], None],
    record: Record,
    label: str,
    engine: str,
) -> None:
    if engine != "transformers":
        needs(engine)
    folder, report = converted(label)
    approximations = [note for note in report["notes"] if "approximate" in note]
    held = "approximate" if approximations else "exact"
    assert held == {**CONVERTED, **SOFTMAX}[label][2], report["notes"]
    found = latentize.verify(folder, engine=engine, prompts=4, new_tokens=16)
    record(label, {**found, "family": label, "held": held})
    assert found["kl"] <= 1e-6
    assert found["greedy_identical"] == found["prompts"] == 4


@pytest.mark.parametrize("label", REFUSED)
def test_a_family_that_is_refused(tmp_path: Path, record: Record, label: str) -> None:
    model_type, config = REFUSED[label]
    model, out = source(tmp_path / "source", model_type, config), tmp_path / "out"
    with pytest.raises(LatentizeError) as error:
        latentize.convert(model, out, keep="50%", fast=True, format="deepseek_v3", data=(text_file(tmp_path),))
    assert error.value.what and not list(tmp_path.glob("out*"))
    record(label, {"family": label, "held": "refused", "why": error.value.what})
