"""A lower rank for models that have latent attention already: exact where nothing is lost."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, STREAM, call_cli, last_json, logits, random_tokens, relative_error
from tests.latent_models import MIXTURES, mixture, saved
from tests.models import portable

import latentize
from latentize.checkpoint import Manifest, open_checkpoint
from latentize.conversion import lowered
from latentize.errors import LatentizeError
from latentize.methods.lower_rank import LatentMoments, lower
from latentize.modeling.load import load_model
from latentize.training.refine import Refinement

LOWER: dict[str, Any] = {k: v for k, v in SMALL.items() if k != "dtype"}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and smaller steps of refinement."""
    monkeypatch.setattr(lowered, "Refinement", functools.partial(Refinement, steps=24, tokens=256))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of random models, not to be changed: ``model(name)``."""
    made: dict[str, Path] = {}

    def make(name: str, **changes: Any) -> Path:
        key = repr((name, changes))
        if key not in made:
            made[key] = saved(mixture(name, **changes), tmp_path_factory.mktemp("mla") / name)
        return made[key]

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.load(name) for name in checkpoint.names()}


def low_rank_(model: Any, rank: int) -> None:
    """Latents that lie in few directions, all of them: a lower rank is then exact but for the norm."""
    for layer in model.model.layers:
        attention = layer.self_attn
        full = attention.kv_lora_rank
        down = attention.kv_a_proj_with_mqa.weight.data
        basis = torch.linalg.qr(torch.randn(full, rank, generator=torch.Generator().manual_seed(3)))[0]
        down[:full] = basis @ basis.T @ down[:full]


@pytest.mark.parametrize("name", MIXTURES)
def test_what_changes_and_what_stays(tmp_path: Path, model: Callable[..., Path], text: str, name: str) -> None:
    """Only a layer's latent is other than it was; what is reported is what the files compute."""
    folder, out = model(name), tmp_path / "out"
    report = latentize.convert(folder, out, keep="60%", data=(text,), **LOWER)
    assert (report["format"], report["method"]) == (name.split("-")[0], "lower-rank")
    assert (report["kv_lora_rank"], report["qk_rope_head_dim"]) == (16, 8)
    assert report["cache_values_per_token_layer"] == 24
    assert report["source_cache_values_per_token_layer"] == 40
    assert report["keep"] == 0.6
    before, after = stored(folder), stored(out)
    assert before.keys() == after.keys()
    changed = {n.split("self_attn.")[-1] for n, t in after.items() if not torch.equal(t, before[n])}
    bias = {"kv_a_proj_with_mqa.bias"} if name.endswith("bias") else set()
    assert changed == {"kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight"} | bias
    for key in (n for n in after if n.endswith("kv_a_proj_with_mqa.weight")):
        assert torch.equal(after[key][16:], before[key][32:]), "the roped key"
    config = json.loads((out / "config.json").read_text())
    source_config = json.loads((folder / "config.json").read_text())
    assert {k for k, v in config.items() if source_config.get(k) != v} == {"kv_lora_rank"}
    measured = latentize.evaluate(out, folder, data=(text,), tokens=1024, sequence_length=64, split="heldout")
    assert measured["kl"] == pytest.approx(report["kl"], abs=STREAM, rel=1e-3)
    assert measured["perplexity"] == pytest.approx(report["perplexity"], rel=1e-3)
    checked = latentize.verify(out)
    assert checked["ok"] and checked["cache_values_per_token_layer"] == 24
    assert 0 < checked["absorbed_error"] < FP32
    card = (out / "README.md").read_text()
    assert "a latent of 16 instead of 32 values" in card and "smaller `kv_lora_rank`" in card
    assert "latents of 32" in (out / "report.html").read_text()


@pytest.mark.parametrize("name", ["deepseek_v2-lite", "deepseek_v3"])
def test_the_whole_rank_is_the_model_itself(tmp_path: Path, model: Callable[..., Path], text: str, name: str) -> None:
    out = tmp_path / "out"
    report = latentize.convert(model(name), out, keep="100%", data=(text,), **LOWER)
    assert report["kl"] == 0 == report["excess_loss"]
    before, after = stored(model(name)), stored(out)
    assert all(torch.equal(after[n], t) for n, t in before.items())


def latent(model: Any) -> list[Any]:
    """The attention of its layers, where it is latent."""
    return [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn, "kv_lora_rank")]


def observed(model: Any, tokens: torch.Tensor) -> list[LatentMoments]:
    """Moments of every layer on all tokens."""
    found, hooks, seen = [], [], {}
    for index, attention in enumerate(latent(model)):
        queries = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
        for part, module in (("y", attention.kv_a_proj_with_mqa), ("q", queries)):
            keep = lambda m, a, out, key=(index, part): seen.__setitem__(key, out)  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, a in enumerate(latent(model)):
        moments = LatentMoments(a.kv_a_layernorm.variance_epsilon)
        q_nHN = seen[index, "q"].flatten(0, 1).unflatten(-1, (-1, a.qk_head_dim))[..., : a.qk_nope_head_dim]
        moments.add(seen[index, "y"].flatten(0, 1)[:, : a.kv_lora_rank], q_nHN)
        found.append(moments)
    return found


def with_rank(model: Any, rank: int, tokens: torch.Tensor) -> tuple[Any, list[float]]:
    """A model of a lower rank, every layer from what the given one does."""
    spreads, moments = [], observed(model, tokens)
    for a, seen in zip(latent(model), moments, strict=True):
        made = lower(a.state_dict(), seen, rank, scale=float(a.scaling))
        a.kv_lora_rank = rank
        for name, tensor in made.tensors.items():
            module, _, kind = name.rpartition(".")
            setattr(a.get_submodule(module), kind, torch.nn.Parameter(tensor))
        spreads.append(made.norm_spread)
    return model, spreads


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_at_the_whole_rank_the_closed_form_is_exact(name: str) -> None:
    """Turned, weighted and folded, yet the same model; on tokens that no statistic has seen as well."""
    tokens = random_tokens(8, 48)
    made, spreads = with_rank(mixture(name), 32, tokens)
    fresh = random_tokens(2, 48, seed=9)
    assert relative_error(made(fresh).logits, mixture(name)(fresh).logits) <= FP32
    assert max(spreads) < FP32


@torch.no_grad()
def test_directions_that_no_latent_has_cost_nothing() -> None:
    """Latents of rank 12 in 32 values: 12 are enough, and the norm is the same one."""
    source = mixture("deepseek_v3")
    low_rank_(source, 12)
    fresh, tokens = random_tokens(2, 48, seed=9), random_tokens(16, 48)
    expected = source(fresh).logits
    made, spreads = with_rank(source, 12, tokens)
    assert max(spreads) < 1e-4
    # The second moment's damping, 1e-5 of its mean, is what is left.
    assert relative_error(made(fresh).logits, expected) <= 1e-4


@torch.no_grad()
def test_fitted_scales_keep_the_norm_nearer_than_one_scale() -> None:
    from latentize.methods.lower_rank import _scales

    generator = torch.Generator().manual_seed(0)
    size_r = torch.linspace(0.2, 3.0, 24, dtype=torch.float64)
    y_nr = torch.randn(4000, 24, generator=generator, dtype=torch.float64) * size_r
    wanted = y_nr.square().mean(-1)

    def wrong(w_ns: torch.Tensor) -> float:
        ratio = w_ns.square().mean(-1) / wanted
        return float((ratio / ratio.mean() - 1).std())

    for rank in (12, 18, 23):
        w_ns = y_nr[:, -rank:]
        assert wrong(w_ns * _scales(w_ns, y_nr, 1e-6).sqrt()) <= wrong(w_ns)
    assert torch.allclose(_scales(y_nr, y_nr, 1e-6), torch.ones(24, dtype=torch.float64))


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "norm"])
def test_our_own_portable_output(tmp_path: Path, text: str, linear: bool) -> None:
    """A norm that was made linear stays so, at its scale: tokens of the result are as far below epsilon as before."""
    folder = portable(tmp_path, heads=4, rank=32, rope=8, nope=16, value=16, linear=linear)
    out = tmp_path / "out"
    report = latentize.convert(folder, out, kv_lora_rank=24, data=(text,), **LOWER)
    assert report["format"] == "deepseek_v3" and report["kv_lora_rank"] == 24
    assert latentize.verify(out)["ok"]
    assert all(layer["linear_norm"] is linear for layer in report["layers"])
    healing = {"tokens": 256, "selection_tokens": 64, "evaluation_tokens": 64, "sequence_length": 64, "data": (text,)}
    if linear:
        assert latentize.heal(out, tmp_path / "healed", folder, **healing)["kl"] >= 0
    else:
        with pytest.raises(LatentizeError, match="cannot be healed"):
            latentize.heal(out, tmp_path / "healed", folder, **healing)
    sizes = []
    for path in (folder, out):
        found: list[torch.Tensor] = []
        loaded = load_model(path)
        norm = loaded.model.layers[1].self_attn.kv_a_layernorm
        norm.register_forward_pre_hook(lambda m, args, kept=found: kept.append(args[0].square().mean(-1)))
        with torch.no_grad():
            loaded(random_tokens(vocab=320))
        sizes.append((float(found[0].max()), float(found[0].mean())))
    (largest, mean), (new_largest, new_mean) = sizes
    assert new_mean == pytest.approx(mean, rel=0.3)
    assert new_largest < 2 * largest
    assert (new_largest < 1e-7) is linear


@pytest.mark.usefixtures("hasty")
def test_refined_it_loses_less(tmp_path: Path, model: Callable[..., Path], text: str) -> None:
    """Refinement trains what surrounds the latent, too; experts, compressed queries and the roped key stay."""
    folder, out = model("deepseek_v3", num_hidden_layers=3), tmp_path / "out"
    options = {**LOWER, "fast": False, "tokens": 8192, "data": (text,)}
    report = latentize.convert(folder, out, kv_lora_rank=6, **options)
    assert report["closed_form_excess_loss"] is not None
    assert all(layer["error_after_refine"] < layer["error_before_refine"] for layer in report["layers"])
    before, after = stored(folder), stored(out)
    changed = {n.split("layers.2.")[-1] for n, t in after.items() if "layers.2." in n and not torch.equal(t, before[n])}
    assert changed == {
        f"self_attn.{name}.weight"
        for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "q_b_proj", "o_proj")
    }
    assert latentize.verify(out)["ok"]


@pytest.mark.usefixtures("hasty")
def test_killed_it_goes_on(tmp_path: Path, model: Callable[..., Path], text: str) -> None:
    """What was refined is not refined again, and the bytes are the same."""
    folder, options = model("deepseek_v2-lite"), {**LOWER, "fast": False, "data": (text,), "kv_lora_rank": 8}

    def stop(what: str, done: int, total: int, detail: str = "") -> None:
        if what == "converting layers" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latentize.convert(folder, tmp_path / "out", progress=stop, **options)
    latentize.convert(folder, tmp_path / "out", resume=True, **options)
    latentize.convert(folder, tmp_path / "whole", **options)
    left, right = (stored(tmp_path / name) for name in ("out", "whole"))
    assert all(torch.equal(left[name], tensor) for name, tensor in right.items())


def test_layers_that_predict_further_tokens_and_code_are_left_out(
    tmp_path: Path, model: Callable[..., Path], text: str
) -> None:
    """A checkpoint as DeepSeek-V3's: one layer more than the model has, and code of its own that is not needed."""
    from safetensors.torch import save_file

    folder = saved(mixture("deepseek_v3"), tmp_path / "source")
    extra = {n.replace("layers.1.", "layers.2."): t for n, t in stored(folder).items() if "layers.1." in n}
    tensors = {**stored(folder), **{n: t.clone() for n, t in extra.items()}}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    more = {"num_nextn_predict_layers": 1, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    out = tmp_path / "out"
    report = latentize.convert(folder, out, kv_lora_rank=16, data=(text,), **LOWER)
    assert not any("layers.2." in name for name in stored(out))
    assert any("multi-token prediction" in note for note in report["notes"])
    made = json.loads((out / "config.json").read_text())
    assert made["num_nextn_predict_layers"] == 0 and "auto_map" not in made
    assert logits(out, random_tokens()).isfinite().all()


def test_precision_is_the_sources(tmp_path: Path, text: str) -> None:
    folder, out = saved(mixture("glm4_moe_lite"), tmp_path / "source", torch.bfloat16), tmp_path / "out"
    latentize.convert(folder, out, kv_lora_rank=16, data=(text,), **LOWER)
    checkpoint = open_checkpoint(folder)
    assert all(t.dtype == checkpoint.load(n).dtype for n, t in stored(out).items())
    # The manifest is a recipe.
    again = latentize.Recipe.load(out / "latentize.json")
    assert (again.dtype, again.kv_lora_rank) == ("bfloat16", 16)
    latentize.convert(folder, tmp_path / "again", again)
    assert Manifest.load(tmp_path / "again").files["model.safetensors"] == Manifest.load(out).files["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "LZ203"),
        ({"to": "mqa"}, "LZ203"),
        ({"method": "care", "keep": 0.5}, "LZ203"),
        ({"keep": 0.5, "format": "native"}, "LZ202"),
        ({"keep": 0.5, "format": "deepseek_v3"}, "LZ202"),
        ({"keep": 0.5, "polish": True}, "LZ301"),
        ({"keep": 0.5, "bytes": 0.1}, "LZ203"),
        ({"keep": 0.5, "cache_for": "int4"}, "LZ203"),
        ({"keep": 0.5, "dtype": "float16"}, "LZ301"),
        ({"keep": 0.2}, "LZ304"),
        ({"kv_lora_rank": 33}, "LZ303"),
        ({"kv_lora_rank": 16, "qk_rope_head_dim": 4}, "LZ303"),
        ({"preset": "512+64"}, "LZ303"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, model: Callable[..., Path], options: dict[str, Any], code: str
) -> None:
    with pytest.raises(LatentizeError) as caught:
        latentize.convert(model("glm4_moe_lite"), tmp_path / "out", **options)
    assert caught.value.code == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "code"),
    [("rank", "LZ109"), ("layers", "LZ110"), ("missing", "LZ111"), ("expert", "LZ111"), ("quantised", "LZ204")],
)
def test_what_contradicts_its_config_is_refused(tmp_path: Path, text: str, damage: str, code: str) -> None:
    from safetensors.torch import save_file

    folder = saved(mixture("deepseek_v3"), tmp_path / "source")
    config, tensors = json.loads((folder / "config.json").read_text()), stored(folder)
    changes: dict[str, Any] = {
        "rank": {"kv_lora_rank": 30},
        "layers": {"num_hidden_layers": 4},
        "quantised": {"quantization_config": {"quant_method": "fp8"}},
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes.get(damage, {})}))
    gone = {
        "missing": "model.layers.1.self_attn.kv_b_proj.weight",
        "expert": "model.layers.1.mlp.experts.2.up_proj.weight",
    }
    kept = {n: t for n, t in tensors.items() if n != gone.get(damage)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LatentizeError) as caught:
        latentize.convert(folder, tmp_path / "out", kv_lora_rank=8, data=(text,), **LOWER)
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(
    tmp_path: Path, model: Callable[..., Path], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--data", text, "--fast", "--tokens", 2048, "--sequence-length", 64)
    done = call_cli(capsys, "convert", model("deepseek_v2-lite"), tmp_path / "out", "--keep", "50%", *quick, "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["kv_lora_rank"] == 12
    done = call_cli(capsys, "inspect", tmp_path / "out")
    assert done.returncode == 0 and "lower rank" in done.stdout
    done = call_cli(capsys, "plan", tmp_path / "out", "--context", "64", "--device", "h100")
    assert done.returncode == 0 and "half the rank: 6" in done.stdout
