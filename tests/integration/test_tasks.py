"""lm-eval's tasks offline: a golden result on the bundled model and what is made of it; likelihoods as ours are.

``python -m tests.integration.test_tasks`` writes the golden result anew, and says by how much the nearest choices of
the questions differ: an answer that hangs on rounding is no golden one.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import BF16, FP32, STREAM, call_cli, last_json

from latentize.api import convert, evaluate
from latentize.errors import DataError, OptionError
from latentize.evaluation.tasks import _manager, run_tasks

ROOT = Path(__file__).parents[2]
MODEL, TASKS = ROOT / "models" / "tiny-llama-gqa", ROOT / "examples" / "tasks"
GOLDEN = Path(__file__).parent / "golden_tasks.json"
# Calibrated on lines of the task's own text: it is the same on every machine, whatever its Python.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "portable": {"keep": "50%", "fast": True},
    "native": {"keep": "50%", "method": "mha2mla", "format": "native"},
}
SMALL: dict[str, Any] = {"tokens": 2048, "sequence_length": 64, "selection_tokens": 256, "evaluation_tokens": 128}
# What a golden loglikelihood may differ by, of itself. A conversion has decompositions in it, and so more roundings.
TOLERANCE = {"float32": FP32, "bfloat16": BF16, "converted": STREAM}
CASES = {
    "source, float32": ("source", "float32", "float32"),
    "source, bfloat16": ("source", "bfloat16", "bfloat16"),
    "portable, float32": ("portable", "float32", "converted"),
    "native, float32": ("native", "float32", "converted"),
}


def texts() -> list[str]:
    return [json.loads(line)["text"] for line in (TASKS / "stdlib_text.jsonl").read_text("utf-8").splitlines()]


def make(folder: Path) -> dict[str, Path]:
    """The source, and conversions of it."""
    lines = [line for text in texts() for line in text.splitlines(keepends=True) if line.strip()]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = (str(folder / "lines.jsonl"),)
    for name, entries in CONVERSIONS.items():
        convert(MODEL, folder / name, data=data, dtype="float32", **SMALL, **entries)
    return {"source": MODEL, **{name: folder / name for name in CONVERSIONS}}


def run(model: Path, dtype: str) -> dict[str, float]:
    """Counts of right answers, and the loglikelihood of all texts in nats."""
    import torch

    names = [str(TASKS / f"stdlib_{name}.yaml") for name in ("next_line", "text")]
    found = run_tasks(model, tasks=names, batch_size=8, dtype=getattr(torch, dtype), limit=len(texts()))
    rows = {row["metric"]: row for row in found["rows"]}
    bits = rows["bits_per_byte"]["value"] * sum(len(text.encode()) for text in texts())
    right = {name: round(rows[name]["value"] * rows[name]["examples"]) for name in ("acc", "acc_norm")}
    return {**right, "loglikelihood": -bits * math.log(2)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make(tmp_path_factory.mktemp("tasks"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_golden_result(models: dict[str, Path], case: str) -> None:
    name, dtype, kind = CASES[case]
    expected, found = json.loads(GOLDEN.read_text())[case], run(models[name], dtype)
    assert found["loglikelihood"] == pytest.approx(expected["loglikelihood"], rel=TOLERANCE[kind])
    assert (found["acc"], found["acc_norm"]) == (expected["acc"], expected["acc_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["source", *CONVERSIONS])
def test_our_own_measurement_finds_the_same_loglikelihood(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    """lm-eval puts the end-of-text token before a text and scores all of it; ``evaluate`` does where it is there."""
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": "<|endoftext|>" + text}) + "\n" for text in texts()))
    ours = evaluate(models[name], data=(str(data),), tokens=256 * len(texts()), sequence_length=256)
    assert ours["tokens"] == 255 * len(texts())
    theirs = run_tasks(models[name], tasks=[str(TASKS / "stdlib_text.yaml")])["rows"]
    (bits,) = (row["value"] for row in theirs if row["metric"] == "bits_per_byte")
    size = sum(len(text.encode()) for text in texts())
    assert math.log(ours["perplexity"]) * ours["tokens"] == pytest.approx(bits * math.log(2) * size, rel=FP32)


@pytest.mark.slow
def test_the_command_says_it_in_json_in_the_table_and_in_the_report(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # the data lies beside the task's file, not here
    out = models["native"]
    options = ("--tokens", "512", "--tasks", f"{TASKS}/", "--limit", "6", "--batch-size", "4")
    told = last_json(call_cli(capsys, "eval", out, "--reference", MODEL, *options, "--json").stdout)
    assert {"perplexity", "kl", "tasks"} <= told.keys()
    rows = told["tasks"]["rows"]
    assert [(r["task"], r["metric"]) for r in rows] == [
        ("stdlib_next_line", "acc"),
        ("stdlib_next_line", "acc_norm"),
        ("stdlib_text", "byte_perplexity"),
        ("stdlib_text", "bits_per_byte"),
    ]
    for r in rows:
        assert r["examples"] == 6
        assert r["difference"] == r["value"] - r["reference_value"]
        for prefix, value in (("", "value"), ("reference_", "reference_value"), ("difference_", "difference")):
            assert r[f"{prefix}low"] <= r[value] <= r[f"{prefix}high"], (r["metric"], prefix)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Tasks</h2>" in page and f"{rows[2]['value']:.4f} [" in page and "the first 6 examples" in page
    table = call_cli(capsys, "eval", out, *options).stdout
    assert "stdlib_next_line" in table and "bits_per_byte" in table


def write_task(folder: Path, **changes: Any) -> Path:
    """A task of two questions that want generated text, with its data."""
    folder.mkdir(exist_ok=True)
    (folder / "two.jsonl").write_text('{"q": "ab", "a": "c"}\n{"q": "x = ", "a": "1"}\n')
    entries = {
        "task": "two_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "two.jsonl"}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    path = folder / "two_words.yaml"
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def picos(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.common import SMALL as QUICK

    folder, model = tmp_path_factory.mktemp("pico-tasks"), source("llama", 2)
    convert(model, folder / "deepseek_v3", kv_lora_rank=24, qk_rope_head_dim=8, data=(text,), **QUICK)
    convert(model, folder / "native", keep="50%", format="native", method="mha2mla", data=(text,), **QUICK)
    return {"source": model, "deepseek_v3": folder / "deepseek_v3", "native": folder / "native"}


@pytest.mark.parametrize("name", ["deepseek_v3", "native"])
def test_tasks_that_generate(picos: dict[str, Path], name: str, tmp_path: Path) -> None:
    write_task(tmp_path / "mine")
    assert "hellaswag" not in _manager(["two_words"], tmp_path / "mine").task_index, "lm-eval's own need not be read"
    found = run_tasks(picos[name], picos["source"], tasks=["two_words"], include_path=tmp_path / "mine")
    (row,) = found["rows"]
    assert (row["metric"], row["examples"]) == ("exact_match", 2)
    assert 0 <= row["value"] <= 1 and row["difference_low"] is not None


def test_what_can_go_wrong(picos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mine = picos["source"], tmp_path / "mine"
    path = write_task(mine)

    def refused(kind: type[Exception], said: str, *tasks: str, **options: Any) -> None:
        with pytest.raises(kind, match=said) as caught:
            run_tasks(model, tasks=tasks, **options)
        assert caught.value.where and caught.value.fix  # type: ignore[attr-defined]

    refused(OptionError, "no such task file", str(mine / "none.yaml"))
    refused(OptionError, "no such folder", str(path), include_path=tmp_path / "none")
    refused(DataError, "none.jsonl", str(write_task(mine, dataset_kwargs={"data_files": {"test": "none.jsonl"}})))
    refused(OptionError, "there is no task in it", str(write_task(mine, task=None)))
    write_task(mine)
    with pytest.raises(OptionError, match="its own cache"):
        evaluate(model, tasks=[str(path)], cache="int8")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(OptionError, "lm-eval is not installed", str(path))


@pytest.mark.slow
def test_names_of_lm_eval(picos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown ones, and those whose data is on the hub, which is not to be had here."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(OptionError, match="knows no task 'helaswag'") as unknown:
        run_tasks(picos["source"], tasks=["helaswag"])
    assert "did you mean hellaswag" in unknown.value.fix
    with pytest.raises(DataError, match="Rowan/hellaswag") as caught:
        run_tasks(picos["source"], tasks=["hellaswag"])
    assert "hub" in caught.value.fix


def test_tasks_of_files_need_none_of_lm_evals_own(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are thousands of files, seconds of reading for every model."""
    from lm_eval.tasks import TaskManager

    read, original = [], TaskManager.__init__

    def init(self: TaskManager, *args: Any, include_defaults: bool = True, **options: Any) -> None:
        read.append(include_defaults)
        original(self, *args, include_defaults=include_defaults, **options)

    monkeypatch.setattr(TaskManager, "__init__", init)
    run_tasks(models["native"], models["source"], tasks=[str(TASKS / "stdlib_next_line.yaml")], limit=2)
    assert read == [False]


def test_longbench_is_a_group_of_21_tasks() -> None:
    """What ``--tasks longbench`` names, in the version of lm-eval that is installed."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    index = TaskManager(
        include_path=str(Path(lm_eval.tasks.__file__).parent / "longbench"), include_defaults=False
    ).task_index
    kinds = index["longbench"].cfg["task"]
    assert len(kinds) == 6
    tasks = [task for kind in kinds for task in index[kind].cfg["task"]]
    assert len(set(tasks)) == 21 and all(task in index for task in tasks)


def _margins(model: Path) -> float:
    """Least difference in loglikelihood between the best and the second-best choice of any question."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from latentize.evaluation.tasks import _load
    from latentize.modeling.load import load_model
    from latentize.text.tokenizer import load_tokenizer

    name = str(TASKS / "stdlib_next_line.yaml")
    lm = HFLM(pretrained=load_model(model), tokenizer=load_tokenizer(model), batch_size=8)
    found = lm_eval.simple_evaluate(lm, tasks=_load([name], _manager([name], None)), bootstrap_iters=0)
    best = [sorted((r[0] for r in s["filtered_resps"]), reverse=True) for s in found["samples"]["stdlib_next_line"]]
    return min(a - b for a, b, *_ in best)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder))
        golden = {case: run(made[name], dtype) for case, (name, dtype, _) in CASES.items()}
        print({name: _margins(path) for name, path in made.items()})
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")
    print(GOLDEN.read_text())
