"""Each command as users run it: one JSON object last, errors with a code and no traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tests.common import call_cli, last_json, leftovers, run_cli

SIZES = ("--tokens", 2048, "--sequence-length", 64, "--dtype", "float32", "--fast")
CONVERT_KEYS = {
    "format",
    "method",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "rope_theta",
    "cache_values_per_token_layer",
    "source_cache_values_per_token_layer",
    "keep",
    "calibration_tokens",
    "seconds",
    "peak_rss_bytes",
    "layers",
    "source_perplexity",
    "perplexity",
    "kl",
    "top1_agreement",
}
EVAL_KEYS = {
    "perplexity",
    "reference_perplexity",
    "kl",
    "top1_agreement",
    "top5_agreement",
    "calibration_error",
    "reference_calibration_error",
    "by_position",
    "tokens",
}


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ok(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a command with ``--json``: its last line of stdout is one object."""

    def ask(*args: object) -> dict[str, Any]:
        done = call_cli(capsys, *args, "--json")
        assert done.returncode == 0, done.stderr
        result = last_json(done.stdout)
        assert isinstance(result, dict)
        return result

    return ask


def test_it_says_which_version_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    done = call_cli(capsys, "--version")
    assert done.returncode == 0
    assert done.stdout == f"latentize {version('latentize')}\n"


@pytest.fixture(scope="module")
def converted(
    source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """One conversion in a process of its own, as a user's shell starts it."""
    out = tmp_path_factory.mktemp("cli") / "out"
    done = run_cli("convert", source("llama", 2), out, "--keep", "50%", "--data", text, *SIZES, "--json")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return out, last_json(done.stdout)


def test_convert(converted: tuple[Path, dict[str, Any]]) -> None:
    out, result = converted
    assert result.keys() >= CONVERT_KEYS
    assert result["format"] == "deepseek_v3"
    assert result["method"] == "calibrated"
    assert result["kv_lora_rank"] + result["qk_rope_head_dim"] == result["cache_values_per_token_layer"] == 32
    assert result["source_cache_values_per_token_layer"] == 64
    assert result["keep"] == 0.5
    assert result["calibration_tokens"] == 2048
    assert len(result["layers"]) == 2
    assert all(entry.keys() >= {"error_before_refine", "error_after_refine"} for entry in result["layers"])
    assert all(0 < entry["error_after_refine"] < 2 for entry in result["layers"])
    assert result["seconds"] > 0
    assert 50e6 < result["peak_rss_bytes"] < 50e9
    assert result["perplexity"] > 1 < result["source_perplexity"]
    assert result["kl"] > 0
    assert 0 < result["top1_agreement"] <= 1
    assert json.loads((out / "config.json").read_text())["kv_lora_rank"] == result["kv_lora_rank"]


def test_verify(ok: Ask, converted: tuple[Path, dict[str, Any]]) -> None:
    result = ok("verify", converted[0])
    assert result["ok"] is True
    assert result["cache_values_per_token_layer"] == 32
    assert result.keys() >= {"absorbed_error", "decode_error", "files", "tensors", "tolerance"}


def test_eval(ok: Ask, converted: tuple[Path, dict[str, Any]], source: Callable[..., Path], text: str) -> None:
    options = ("--data", text, "--tokens", 1024, "--sequence-length", 64)
    result = ok("eval", converted[0], "--reference", source("llama", 2), *options)
    assert result.keys() >= EVAL_KEYS
    assert result["tokens"] == 16 * 63
    assert result["kl"] > 0
    assert result["top1_agreement"] <= result["top5_agreement"] <= 1
    assert [(b["from"], b["to"]) for b in result["by_position"]] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 31),
        (32, 63),
    ]
    mean = sum(b["tokens"] * b["kl"] for b in result["by_position"]) / result["tokens"]
    assert mean == pytest.approx(result["kl"], rel=1e-6)
    alone = ok("eval", converted[0], *options)
    assert alone.keys() >= EVAL_KEYS
    assert alone["kl"] is alone["reference_perplexity"] is alone["top1_agreement"] is None
    assert alone["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)


def test_eval_of_what_lies_far_back(
    ok: Ask, converted: tuple[Path, dict[str, Any]], source: Callable[..., Path], text: str
) -> None:
    model = source("llama", 2)
    options = ("--data", text, "--tokens", 128, "--sequence-length", 64, "--lengths", 256, "--samples", 1)
    with pytest.raises(AssertionError, match="no room"):
        ok("eval", converted[0], "--data", text, "--tokens", 128, "--sequence-length", 64, "--lengths", 64)
    found = ok("eval", converted[0], "--reference", model, *options, "--window", 200)["probes"]
    assert {row["probe"] for row in found["rows"]} == {"needle", "needles", "tracking", "copy", "recall"}
    assert len(found["cells"]) == 3 * len(found["rows"]) == 15
    for row in found["rows"]:
        assert row["gain_lost"] == pytest.approx(row["reference_gain"] - row["gain"])
        assert row["gain_error"] is None and row["examples"] == 3
    assert "probes" not in ok("eval", converted[0], "--tokens", 128, "--sequence-length", 64)


def test_compare(
    ok: Ask,
    converted: tuple[Path, dict[str, Any]],
    source: Callable[..., Path],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--data", text, "--tokens", 256, "--sequence-length", 64, "--cache", "int8")
    plot = tmp_path / "pareto.svg"
    result = ok("compare", source("llama", 2), converted[0], *options, "--plot", plot)
    assert [r["name"] for r in result["rows"] if "source" not in r["name"]] == ["out", "out, int8"]
    for row in result["rows"]:
        assert row.keys() >= {"excess_loss", "kl", "top1_agreement", "cache_bytes_per_token", "dominated_by"}
    assert plot.read_text().startswith("<svg")
    done = call_cli(capsys, "compare", source("llama", 2), converted[0], *options)
    assert done.returncode == 0, done.stderr
    assert "out, int8" in done.stdout and "worse than" in done.stdout


@pytest.mark.parametrize(("cache", "smaller"), [("bf16", 1.9), ("int8", 3.3), ("int4", 5.0), ("int4+int4", 5.5)])
def test_generate_and_evaluate_from_a_smaller_cache(
    ok: Ask, converted: tuple[Path, dict[str, Any]], cache: str, smaller: float
) -> None:
    out, made = converted
    plain, small = (ok("generate", out, "some words", "--max-new-tokens", 6, *o) for o in ((), ("--cache", cache)))
    assert small["cache_bytes"] < plain["cache_bytes"] / smaller
    r, rope = made["kv_lora_rank"], made["qk_rope_head_dim"]
    # Each half has a scale of two bytes where it has one.
    row = {"bf16": 2 * (r + rope), "int8": r + rope + 4, "int4": r // 2 + rope + 4, "int4+int4": (r + rope) // 2 + 4}
    assert small["cache_bytes_per_token_layer"] == row[cache]
    exact, lossy = (ok("eval", out, "--tokens", 512, *o) for o in ((), ("--cache", cache)))
    assert lossy["perplexity"] != exact["perplexity"]
    assert lossy["perplexity"] == pytest.approx(exact["perplexity"], rel=0.3 if "int4" in cache else 0.03)


def test_bench(ok: Ask, converted: tuple[Path, dict[str, Any]], source: Callable[..., Path], tmp_path: Path) -> None:
    plot = tmp_path / "bench.svg"
    options = ("--context", "20,40", "--batch", "1,2", "--cache", "int4", "--steps", 2, "--dtype", "float32")
    result = ok("bench", converted[0], "--reference", source("llama", 2), *options, "--plot", plot)
    names = ["latentize", "latentize, int4+int8", "transformers", "source, transformers"]
    assert [(r["batch"], r["context"], r["name"]) for r in result["rows"]] == [
        (b, c, n) for b in (1, 2) for c in (20, 40) for n in names
    ]
    fast, small, stock, grouped = result["rows"][4:8]
    # Two layers of 32 values, of 64 in the source, at 40 tokens in float32.
    assert stock["cache_bytes"] == 2 * 32 * 4 * 40 and grouped["cache_bytes"] == 2 * 64 * 4 * 40
    assert small["cache_bytes"] < fast["cache_bytes"] / 4
    for row in result["rows"]:
        assert row["prefill_tokens_per_second"] > 0 < row["milliseconds_per_token"]
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch"] * 1e3 / row["milliseconds_per_token"])
        assert 0 < row["roofline_share"] < 1
    assert result["copy_bytes_per_second"] > 1e8
    drawn = plot.read_text()
    assert drawn.startswith("<svg") and "latentize, int4+int8, batch 2" in drawn


def test_generate_in_a_window(ok: Ask, converted: tuple[Path, dict[str, Any]]) -> None:
    out, _ = converted
    whole, windowed = (
        ok("generate", out, "some words " * 30, "--max-new-tokens", 40, *o) for o in ((), ("--window", 32))
    )
    assert 1 <= windowed["tokens"] <= 40
    assert windowed["cache_bytes"] <= whole["cache_bytes"]


def test_generate(ok: Ask, converted: tuple[Path, dict[str, Any]]) -> None:
    out, _ = converted
    result = ok("generate", out, "some words", "--max-new-tokens", 6)
    assert isinstance(result["text"], str)
    assert 1 <= result["tokens"] <= 6
    assert result["cache_values_per_token_layer"] == 32 and result["cache_bytes_per_token_layer"] == 32 * 4
    # float32, two layers; the last token is not cached, and there is room for 64 more.
    cached = len("some words") + result["tokens"] - 1
    assert 32 * 2 * 4 * cached <= result["cache_bytes"] <= 32 * 2 * 4 * (cached + 64)
    assert ok("generate", out, "some words", "--max-new-tokens", 6)["text"] == result["text"]
    sampled = [
        ok("generate", out, "some words", "--max-new-tokens", 6, "--temperature", 1.5, "--seed", seed)["text"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("family", "others"), [("llama", ["deepseek_v3", "deepseek_v3", "native"]), ("qwen3", ["refused"] * 3)]
)
def test_inspect(ok: Ask, source: Callable[..., Path], family: str, others: list[str]) -> None:
    result = ok("inspect", source(family, 2))
    assert result["model_type"] == family
    assert (result["attention"], result["layers"], result["head_dim"]) == ("GQA", 2, 16)
    assert result["cache_values_per_token_layer"] == 64
    assert result["cache_bytes_per_token"] == 64 * 2 * 2
    assert result["qk_norm"] == (family == "qwen3")
    attention = 64 * 64 * 2 + 2 * 64 * 32 + (32 if family == "qwen3" else 0)
    assert result["parameters"] == 2 * 257 * 64 + 64 + 2 * (attention + 3 * 64 * 96 + 2 * 64)
    assert [entry["method"] for entry in result["methods"]] == ["calibrated", "transmla", "care", "mha2mla"]
    assert [entry["result"] for entry in result["methods"]] == ["deepseek_v3", *others]
    assert ("linear fit (approximate)" in result["methods"][0]["why"]) == (family == "qwen3")
    assert all(entry["why"] for entry in result["methods"] if entry["result"] != "deepseek_v3")


def test_plan(ok: Ask) -> None:
    result = ok("plan", "llama-2-7b", "--context", 4096)
    assert result["context"] == 4096
    assert result["batch"] == 1
    assert [r["gib"] for r in result["rows"] if r["name"].startswith(("MHA (", "MLA 512"))] == [2.0, 0.1406]
    for row in result["rows"]:
        assert row.keys() >= {"name", "values_per_token_layer", "bits", "tokens", "cache_bytes", "ratio", "gib"}


def test_tables_for_people(
    converted: tuple[Path, dict[str, Any]], source: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ``--json``: plain text with the same numbers, also where the output is not a terminal."""
    out, _ = converted
    for args, words in (
        (("inspect", source("llama", 2)), ["GQA", "transmla", "64"]),
        (("plan", "llama-2-7b", "--context", 4096), ["2.00", "0.14", "MLA 512+64"]),
        (("plan", "llama-3-8b", "--context", 131072, "--device", "h100"), ["H100", "426,784", "4,453", "Triton"]),
        (("verify", out), ["is whole", "32"]),
        (("eval", out, "--tokens", 256, "--sequence-length", 64), ["calibration_error", "32 to 63"]),
        (("generate", out, "some words", "--max-new-tokens", 2), ["some words"]),
        (("bench", out, "--context", "8", "--steps", "1"), ["latentize", "transformers", "MiB"]),
    ):
        done = call_cli(capsys, *args)
        assert done.returncode == 0, done.stderr
        for word in words:
            assert word in done.stdout, done.stdout


def test_a_recipe_file_and_options_over_it(ok: Ask, source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: mha2mla\nselection: high\nkeep: 75%\ndata: [{text}]\nsequence_length: 64\ntokens: 512\n"
    )
    out = tmp_path / "out"
    result = ok("convert", source("llama", 2), out, "--recipe", recipe, "--keep", "50%", "--tokens", 512)
    assert result["method"] == "mha2mla"
    assert result["setting"]["selection"] == "high"
    assert result["keep"] == 0.5
    assert result["calibration_tokens"] == 512


MODEL, OUT = "{model}", "{out}"
ERRORS: list[tuple[str, tuple[object, ...], str]] = [
    ("no model", ("convert", "./nowhere", OUT), "LZ101"),
    ("no model to inspect", ("inspect", "./nowhere"), "LZ101"),
    ("no output to verify", ("verify", "./nowhere"), "LZ118"),
    ("not an output", ("verify", MODEL), "LZ118"),
    ("no config", ("plan", "{empty}"), "LZ102"),
    ("cannot be kept", ("convert", "{qwen3}", OUT, "--method", "transmla"), "LZ210"),
    ("not in that format", ("convert", MODEL, OUT, "--method", "mha2mla", "--format", "deepseek_v3"), "LZ202"),
    ("no latents to store", ("generate", MODEL, "some words", "--cache", "int8"), "LZ301"),
    ("no latents to measure", ("eval", MODEL, "--cache", "int8"), "LZ301"),
    ("no such cache", ("generate", MODEL, "some words", "--window", "32"), "LZ301"),
    ("no such device", ("plan", "llama-3-8b", "--device", "abacus"), "LZ301"),
    ("no contexts", ("bench", MODEL, "--context", "many"), "LZ301"),
    ("no share", ("convert", MODEL, OUT, "--keep", "150%"), "LZ301"),
    ("no such method", ("convert", MODEL, OUT, "--method", "svd"), "LZ301"),
    ("no recipe", ("convert", MODEL, OUT, "--recipe", "nowhere.yaml"), "LZ305"),
    ("no text", ("convert", MODEL, OUT, "--data", "nowhere.txt"), "LZ302"),
    ("exists", ("convert", MODEL, "{empty}"), "LZ401"),
    ("overwrites", ("convert", MODEL, MODEL), "LZ404"),
]


@pytest.mark.parametrize(("args", "code"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_user_errors(
    source: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[object, ...],
    code: str,
) -> None:
    """Status 2, the code, where it is, nothing on stdout, nothing written."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(tmp_path)
    places = {"model": source("llama", 2), "qwen3": source("qwen3", 2), "empty": empty, "out": tmp_path / "out"}
    done = call_cli(capsys, *(str(a).format(**places) for a in args), "--json")
    assert done.returncode == 2, done.stderr
    assert code in done.stderr
    assert "where:" in done.stderr
    assert done.stdout == ""
    assert leftovers(tmp_path, tmp_path / "out") == []
    assert os.listdir(empty) == []


def test_a_user_error_in_a_shell(source: Callable[..., Path], tmp_path: Path) -> None:
    """No traceback reaches the user, and the status is that of wrong usage."""
    done = run_cli("convert", source("llama", 2), tmp_path / "out", "--method", "svd", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("LZ301")
    assert "Traceback" not in done.stderr
    assert "--method" in done.stderr


@pytest.mark.parametrize("args", [("convert",), ("plan", "llama-3-8b", "--context", "0"), ("convrt", "a", "b")])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], args: tuple[str, ...]) -> None:
    done = call_cli(capsys, *args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    done = call_cli(capsys, "--help")
    assert done.returncode == 0
    for command in ("inspect", "plan", "convert", "eval", "compare", "verify", "generate", "bench", "demo"):
        assert command in done.stdout


def test_the_report_grows_with_what_is_measured(
    ok: Ask, source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    model, out = source("llama", 2), tmp_path / "out"
    ok("convert", model, out, "--keep", "50%", "--data", text, *SIZES)
    page = out / "report.html"
    first = page.read_text()
    assert "Speed" not in first and "A sample" not in first
    measured = ok("eval", out, "--reference", model, "--data", text, "--tokens", 512, "--sequence-length", 64)
    assert f"{measured['perplexity']:.3f}" in page.read_text()
    ok("bench", out, "--reference", model, "--context", "16", "--steps", 1)
    result = ok("report", out, "--reference", model, "--prompt", "the <b>")
    assert result["report"] == str(page) and result["bytes"] == page.stat().st_size
    last = page.read_text()
    assert "Speed" in last and "A sample" in last and "the &lt;b&gt;" in last
    assert ok("verify", out)["ok"], "what is measured later is not part of what was made"
    assert not (model / "report.html").exists()


def test_a_report_of_something_else(capsys: pytest.CaptureFixture[str], source: Callable[..., Path]) -> None:
    done = call_cli(capsys, "report", source("llama", 2))
    assert done.returncode == 2
    assert "LZ118" in done.stderr and "manifest" in done.stderr
