"""Outputs as files: reproducible, independent of how the source was stored, loadable where they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.common import FP32, SMALL, logits, random_tokens, relative_error, run_python
from tests.models import pico

import latentize
from latentize.checkpoint import MANIFEST_NAME, Manifest

# Loads a model in a fresh process and saves its logits.
LOAD = """
import sys, torch
folder, tokens, out = sys.argv[1:4]
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.load(tokens)).logits, out)
"""
# The library is installed, so an import has to be stopped.
WITHOUT_LATENTIZE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latentize":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
try:
    import latentize
except ModuleNotFoundError:
    pass
else:
    sys.exit("latentize was imported")
from transformers import AutoModelForCausalLM
"""

# One setting, so that no candidates have to be compared.
FOLDED = {"method": "transmla", "keep": "50%", "freqfold": 8}


def loaded_elsewhere(preamble: str, folder: Path, tmp_path: Path) -> torch.Tensor:
    """Logits on random tokens, computed by another process in another folder."""
    tokens, result = tmp_path / "tokens.pt", tmp_path / "logits.pt"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save(random_tokens(), tokens)
    done = run_python(preamble + LOAD, folder, tokens, result, cwd=elsewhere, flags=("-I",))
    assert done.returncode == 0, done.stderr
    return torch.load(result)


@pytest.mark.parametrize(
    ("family", "config"), [("llama", {"rms_norm_eps": 1e-5}), ("mistral", {"tie_word_embeddings": True})]
)
def test_portable_output_needs_no_latentize(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    report = latentize.convert(source(family, 2, **config), out, data=(text,), **FOLDED, **SMALL)
    assert report["format"] == "deepseek_v3"
    assert "latentize" not in (out / "config.json").read_text()
    got = loaded_elsewhere(WITHOUT_LATENTIZE, out, tmp_path)
    assert relative_error(got, logits(out, random_tokens())) <= FP32


@pytest.mark.parametrize("first", ["transformers", "latentize"])
def test_native_output_loads_in_both_import_orders(
    source: Callable[..., Path], text: str, tmp_path: Path, first: str
) -> None:
    out = tmp_path / "out"
    options = {"method": "mha2mla", "selection": "high", "keep": "50%", "format": "native"}
    latentize.convert(source("qwen2", 2), out, data=(text,), **options, **SMALL)
    imports = ["from transformers import AutoModelForCausalLM", "import latentize"]
    preamble = "\n".join(imports if first == "transformers" else imports[::-1])
    got = loaded_elsewhere(preamble, out, tmp_path)
    assert relative_error(got, logits(out, random_tokens())) <= FP32


def test_native_output_does_not_load_without_latentize(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """It says so; it does not compute something else."""
    out = tmp_path / "out"
    options = {"method": "mha2mla", "selection": "high", "keep": "50%", "format": "native"}
    latentize.convert(source("llama", 2), out, data=(text,), **options, **SMALL)
    done = run_python(WITHOUT_LATENTIZE + LOAD, out, "-", "-", flags=("-I",))
    assert done.returncode != 0
    assert "latentize" in done.stderr


def test_native_output_in_bf16_keeps_its_frequencies(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Loaded in bf16, long after the weights are rounded, positions still turn as before."""
    from transformers import AutoModelForCausalLM

    model, out = source("llama", 2), tmp_path / "out"
    options = {"method": "mha2mla", "selection": "low", "keep": "50%", "format": "native"}
    latentize.convert(model, out, data=(text,), **options, **SMALL)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    ladder = torch.tensor([1e4 ** (-2 * f / 16) for f in range(8)])
    for layer in loaded.source.model.layers:
        frequencies = layer.self_attn.frequencies()
        assert frequencies.dtype == torch.float32
        wanted = ladder[-frequencies.shape[1] :].expand_as(frequencies)
        assert torch.allclose(frequencies, wanted, rtol=1e-6)


def hashes(folder: Path) -> dict[str, str]:
    return Manifest.load(folder).files


def test_the_same_seed_gives_the_same_bytes(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    folders = [tmp_path / name / "out" for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        latentize.convert(source("llama", 2), folder, keep="50%", seed=seed, data=(text,), **SMALL)
    one, same, other = folders
    assert hashes(one) == hashes(same)
    for name in (*hashes(one), MANIFEST_NAME):
        assert (one / name).read_bytes() == (same / name).read_bytes(), name
    assert hashes(one)["model.safetensors"] != hashes(other)["model.safetensors"]


def test_a_recipe_out_of_a_manifest_gives_the_same_bytes(
    source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    from latentize.recipe import Recipe

    model = source("llama", 2)
    latentize.convert(model, tmp_path / "a", method="care", keep="50%", seed=3, data=(text,), **SMALL)
    latentize.convert(model, tmp_path / "b", Recipe.load(tmp_path / "a" / MANIFEST_NAME))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize("recipe", [FOLDED, {"method": "mha2mla", "format": "native"}, {"to": "mqa"}])
def test_shards_of_the_source_do_not_matter(text: str, tmp_path: Path, recipe: dict[str, Any]) -> None:
    whole, sharded = pico(tmp_path, name="whole"), pico(tmp_path, name="sharded", shard="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    results = []
    for folder in (whole, sharded):
        out = folder.with_name(f"{folder.name}-out")
        latentize.convert(folder, out, data=(text,), **recipe, **SMALL)
        results.append({k: v for k, v in hashes(out).items() if k != "README.md"})
    assert results[0] == results[1]
    assert "model.safetensors" in results[0]


def test_the_manifest_says_what_was_done(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    model, out = source("llama", 2), tmp_path / "out"
    report = latentize.convert(model, out, method="mha2mla", keep="50%", data=(text,), **SMALL)
    manifest = Manifest.load(out)
    assert manifest.format == "native"
    assert manifest.source["model_type"] == "llama"
    from latentize.checkpoint.manifest import sha256

    assert manifest.source["files"] == {"model.safetensors": sha256(model / "model.safetensors")}
    assert manifest.measurements["perplexity"] == report["perplexity"]
    assert manifest.measurements["calibration_tokens"] == report["calibration_tokens"] == 2048
    assert len(manifest.layers) == 2
    assert manifest.recipe["data"] == [text]
    assert manifest.notes
    assert "one a kv head" in manifest.notes[0], "why not the portable format"
    card = (out / "README.md").read_text()
    for words in ("mha2mla", "32 instead of 64", "2,048 tokens", "import latentize"):
        assert words in card


def test_tokenizer_and_generation_settings_travel(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, out = source("llama", 2), tmp_path / "out"
    latentize.convert(model, out, **FOLDED, data=(text,), **SMALL)
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (model / "generation_config.json").read_bytes()
    line = "Grüße, 世界\n"
    assert (
        AutoTokenizer.from_pretrained(out)(line)["input_ids"] == AutoTokenizer.from_pretrained(model)(line)["input_ids"]
    )
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["native", "deepseek_v3"])
def test_tied_and_untied_heads(source: Callable[..., Path], text: str, tmp_path: Path, form: str, tied: bool) -> None:
    """Tied stays tied in the native format; the portable one scales the embedding and so unties it."""
    from transformers import AutoModelForCausalLM

    model, out = source("llama", 2, tie_word_embeddings=tied, rms_norm_eps=1e-5), tmp_path / "out"
    latentize.convert(model, out, format=form, data=(text,), **FOLDED, **SMALL)
    stored = load_file(str(out / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    same = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert same == (tied and form == "native")
    assert any("lm_head" in name for name in stored) != same
    head = load_file(str(model / "model.safetensors"))["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(loaded.get_output_embeddings().weight, head)


@pytest.mark.parametrize("form", ["native", "deepseek_v3"])
def test_a_batch_with_padding_is_as_each_alone(
    source: Callable[..., Path], text: str, tmp_path: Path, form: str
) -> None:
    """Left padding and a mask, through ``generate``."""
    from latentize.modeling.load import load_model

    out = tmp_path / "out"
    latentize.convert(source("llama", 2), out, format=form, data=(text,), **FOLDED, **SMALL)
    model, prompt = load_model(out), random_tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), prompt[:, :5]], dim=1)
    batch = torch.cat([prompt, padded])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=batch, attention_mask=mask, **options)[:, 9:]
    for row, alone in enumerate((prompt, prompt[:, :5])):
        single = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(together[row], single[0, alone.shape[1] :])


def hub_cache(model: Path, cache: Path, name: str = "someone/pico") -> None:
    """The layout of huggingface_hub: blobs by hash, a revision of links, a name for it."""
    revision, repo = "a" * 40, cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, repo / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))


HUB = """
import sys
from latentize.checkpoint import resolve
from latentize.planning.inspection import inspect, plan
from latentize.errors import CheckpointError
folder = resolve("someone/pico")
assert folder.name == "a" * 40, folder
assert inspect("someone/pico")["layers"] == 2
assert plan("someone/pico", context=64)["rows"]
import latentize
options = {"to": "mqa", "data": (sys.argv[2],), "tokens": 64, "sequence_length": 32}
print(latentize.convert("someone/pico", sys.argv[1], **options)["format"])
for unknown in ("someone/else", "pico"):
    try:
        resolve(unknown)
    except CheckpointError as error:
        assert unknown in error.where and error.fix
    else:
        sys.exit("resolved " + unknown)
"""


def test_a_hub_id_is_found_in_the_local_cache(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Offline, with the weights behind the cache's links."""
    hub_cache(source("llama", 2), tmp_path / "hub")
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = run_python(HUB, tmp_path / "out", text, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "llama"
    assert Manifest.load(tmp_path / "out").source["model"] == "someone/pico"
