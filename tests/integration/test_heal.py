"""Healing as it is used: it recovers, survives being killed, and is the same on several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import SMALL, run_python
from tests.dying import torchrun
from tests.models import ONLY_MHA, pico

import latentize
from latentize.checkpoint import Manifest
from latentize.errors import CheckpointError, DataError, OptionError, OutputError
from latentize.report.measurements import measured

# A picomodel learns in seconds.
QUICK: dict[str, Any] = {
    "tokens": 4096,
    "sequence_length": 64,
    "step_tokens": 256,
    "selection_tokens": 256,
    "evaluation_tokens": 1024,
    "autocast": False,
}


@pytest.fixture(scope="module")
def converted(
    source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def convert(format_: str) -> Path:
        if format_ not in made:
            made[format_] = tmp_path_factory.mktemp("converted") / format_
            latentize.convert(source(), made[format_], format=format_, keep="25%", data=(text,), **SMALL)
        return made[format_]

    return convert


@pytest.fixture
def healed(
    converted: Callable[[str], Path], source: Callable[..., Path], text: str, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Heal a picomodel quickly; ``out`` is below ``tmp_path``."""

    def heal(out: str = "healed", format_: str = "deepseek_v3", **entries: Any) -> dict[str, Any]:
        options = {**QUICK, "data": (text,), **entries}
        return latentize.heal(converted(format_), tmp_path / out, source(), **options)

    return heal


@pytest.mark.parametrize(
    ("format_", "entries"),
    [
        ("deepseek_v3", {"epochs": 4}),
        ("native", {"epochs": 4}),
        ("deepseek_v3", {"epochs": 4, "train": "all"}),
        ("deepseek_v3", {"epochs": 4, "train": "lora", "rate": 0.01}),
        ("native", {"epochs": 4, "optimiser": "adamw", "rate": 0.01, "decay": "cosine"}),
        ("deepseek_v3", {"epochs": 4, "top_k": 64, "autocast": True}),
        ("deepseek_v3", {"epochs": 4, "match_hidden": 0.1, "ce": 0.1, "temperature": 2.0, "decay": "1-sqrt"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_it_comes_nearer_to_the_source(
    format_: str, entries: dict[str, Any], healed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    result = healed(format_=format_, **entries)
    assert result["held_out_best"]["kl"] < 0.9 * result["held_out"][0]["kl"]
    assert result["steps"] == 64
    found = latentize.verify(tmp_path / "healed")
    assert found["ok"]
    manifest = Manifest.load(tmp_path / "healed")
    assert manifest.healing[0]["kl"] == pytest.approx(result["kl"])
    assert manifest.measurements["kl"] == pytest.approx(result["kl"])
    assert not (tmp_path / "healed.healing").exists()
    assert measured(tmp_path / "healed")["heal"][0]["steps"] == 64
    steps = [json.loads(line) for line in (tmp_path / "healed" / "healing.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "total" in s] == list(range(1, 65))


def test_learning_from_the_text_alone_needs_no_teacher(healed: Callable[..., dict[str, Any]]) -> None:
    result = healed(ce=1.0, epochs=4)
    assert result["held_out"][0]["kl"] == 0
    assert result["held_out_best"]["ce"] < result["held_out"][0]["ce"]


def test_learning_for_the_rounded_cache_lowers_its_loss(healed: Callable[..., dict[str, Any]]) -> None:
    result = healed(cache="int4+int4", epochs=4)
    assert result["held_out_best"]["kl"] < 0.9 * result["held_out"][0]["kl"]
    assert result["kl"] > 0


def test_it_ends_when_nothing_is_gained_and_keeps_the_best(healed: Callable[..., dict[str, Any]]) -> None:
    result = healed(rate=5.0, patience=2, looks=8, epochs=4)
    assert result["steps"] == 16
    assert result["held_out_best"]["step"] == 0
    # What is kept is what there was.
    assert result["excess_loss"] == pytest.approx(result["excess_loss_before"], rel=1e-3)


def test_metrics_are_where_people_watch_them(healed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    healed(track="tensorboard", out="watched")
    events = EventAccumulator(str(tmp_path / "runs" / "watched"))
    events.Reload()
    assert [event.step for event in events.Scalars("kl")] == list(range(1, 17))
    assert events.Scalars("held_out/kl")[0].step == 0


def test_an_unknown_tracker_is_refused(healed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such tracker"):
        healed(track="paper")
    assert not list(tmp_path.iterdir())


# Kills itself in the middle of a step, or while it writes its n-th state, without a word.
KILLED = """
import os, signal, sys, json
from pathlib import Path
import latentize
from latentize.healing import loop
from latentize.healing import state
model, source, runs, at = sys.argv[1:]
after = int(at)
take = loop._Run._step
def step(self, number, rows):
    if number == after:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, number, rows)
loop._Run._step = step
save, saved = state.save, []
def save_then_die(*args, **options):
    save(*args, **options)
    saved.append(1)
    if len(saved) == -after:
        os.kill(os.getpid(), signal.SIGKILL)
state.save = save_then_die
for out, options in json.loads(runs):
    latentize.heal(model, out, source, save_every=5, **options)
"""


def curve(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "healing.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "peak_rss_bytes")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.mark.parametrize(("optimiser", "after"), [("muon", 3), ("muon", 17), ("adamw", 17), ("muon", -1), ("muon", -2)])
def test_killed_and_resumed_it_is_as_if_nothing_had_been(
    after: int,
    optimiser: str,
    converted: Callable[[str], Path],
    source: Callable[..., Path],
    healed: Callable[..., dict[str, Any]],
    text: str,
    tmp_path: Path,
) -> None:
    options = {**QUICK, "data": [text], "epochs": 2, "optimiser": optimiser}
    runs = json.dumps([[str(tmp_path / "killed"), options]])
    arguments = [converted("deepseek_v3"), source(), runs, after]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    with pytest.raises(OutputError, match="unfinished"):
        healed("killed", epochs=2, optimiser=optimiser)
    with pytest.raises(OptionError, match="something else"):
        healed("killed", epochs=3, optimiser=optimiser, resume=True)
    healed("killed", epochs=2, optimiser=optimiser, resume=True, save_every=5)
    healed("undisturbed", epochs=2, optimiser=optimiser, save_every=5)
    assert curve(tmp_path / "killed") == curve(tmp_path / "undisturbed")
    for name in ("model.safetensors", "config.json", "latentize.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


SHARED = ["--sequence-length", 64, "--step-tokens", 256, "--tokens", 5120, "--looks", 2, "--no-autocast", "--json"]
# Options, how two processes share, and by how much losses may differ.
CASES: dict[str, tuple[tuple[str, ...], str, float]] = {
    "fsdp": (("--optimiser", "adamw", "--train", "all"), "fsdp", 1e-5),
    "ddp": (("--optimiser", "adamw", "--train", "all"), "ddp", 1e-5),
    # Both processes ask the teacher, of which each has a part; answers are stored in half precision.
    "fsdp-top-k": (("--optimiser", "adamw", "--top-k", "16"), "fsdp", 1e-4),
    "fsdp-lora": (("--train", "lora"), "fsdp", 1e-5),
    # Muon orthogonalises in bfloat16, which magnifies what differs in the last bit.
    "fsdp-muon": (("--optimiser", "muon"), "fsdp", 1e-3),
}
# One command line after the other in the same two processes, which saves the seconds that imports take.
COMMANDS = """
import json, sys
from latentize.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["latentize", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def heals(converted: Callable[[str], Path], source: Callable[..., Path], text: str) -> Callable[..., list[str]]:
    """A command line; of the formats one, so that both are seen."""

    def command(out: Path, options: tuple[str, ...], *more: str) -> list[str]:
        model = converted("native" if "lora" in options else "deepseek_v3")
        return [*map(str, ("heal", model, out, "--teacher", source(), "--data", text, *options, *more, *SHARED))]

    return command


@pytest.fixture(scope="module")
def alone(heals: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Healed by one process, by options."""
    folder = tmp_path_factory.mktemp("alone")
    made = {options: folder / str(number) for number, options in enumerate({c[0]: 0 for c in CASES.values()})}
    done = run_python(COMMANDS, json.dumps([heals(out, options) for options, out in made.items()]))
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.fixture(scope="module")
def two(heals: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Healed by two, and what the command printed."""
    folder = tmp_path_factory.mktemp("two")
    commands = [heals(folder / name, case[0], "--parallel", case[1]) for name, case in CASES.items()]
    done = torchrun(COMMANDS, folder, json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: (folder / name, result) for name, result in zip(CASES, printed, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, alone: dict[tuple[str, ...], Path], two: dict[str, tuple[Path, Any]]) -> None:
    options, _, tolerance = CASES[case]
    folder, result = two[case]
    assert result["machine"]["processes"] == 2
    pairs = list(zip(curve(alone[options]), curve(folder), strict=True))
    losses = [(a["total"], b["total"]) for a, b in pairs if "total" in a]
    assert len(losses) == 20
    assert max(abs(a - b) for a, b in losses) <= tolerance
    # They learnt; a step's own text may be harder than that of the one before.
    looks = [a["held_out"]["loss"] for a, _ in pairs if "held_out" in a]
    assert min(looks) < 0.98 * looks[0]
    assert latentize.verify(folder)["ok"]


def test_two_processes_are_resumed_too(
    converted: Callable[[str], Path], source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    options = {**QUICK, "data": [text], "optimiser": "adamw"}
    killed, undisturbed = str(tmp_path / "killed"), str(tmp_path / "undisturbed")

    def heal(*runs: tuple[str, dict[str, Any]], at: int) -> int:
        return torchrun(KILLED, tmp_path, converted("deepseek_v3"), source(), json.dumps(runs), at).returncode

    assert heal((killed, options), at=8) != 0
    assert (tmp_path / "killed.healing" / "state").is_dir()
    assert heal((killed, {**options, "resume": True}), (undisturbed, options), at=1000) == 0
    pairs = zip(curve(tmp_path / "killed"), curve(tmp_path / "undisturbed"), strict=True)
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in pairs if "total" in a)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "undisturbed")]
    assert weights[0] == weights[1]


def test_what_is_not_an_output_is_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an output"):
        latentize.heal(source(), tmp_path / "out", source())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_refused(healed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "healed").mkdir()
    with pytest.raises(OutputError, match="exists"):
        healed()
    assert [p.name for p in tmp_path.iterdir()] == ["healed"]


def test_a_teacher_of_another_vocabulary_is_refused(
    converted: Callable[[str], Path], text: str, tmp_path: Path
) -> None:
    stranger = pico(tmp_path, vocab_size=300, name="stranger")
    with pytest.raises(DataError, match="vocabular"):
        latentize.heal(converted("deepseek_v3"), tmp_path / "out", stranger, **{**QUICK, "data": (text,)})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.healing").exists()


def test_a_cache_for_a_model_without_latents_is_refused(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    small = {k: v for k, v in SMALL.items() if k != "fast"}
    latentize.convert(source(), tmp_path / "pooled", to="mqa", data=(text,), **small)
    with pytest.raises(OptionError, match="no latents"):
        latentize.heal(tmp_path / "pooled", tmp_path / "out", source(), cache="int4", **{**QUICK, "data": (text,)})


def test_fewer_kv_heads_heal_too(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    small = {k: v for k, v in SMALL.items() if k != "fast"}
    latentize.convert(source(), tmp_path / "pooled", to="mqa", data=(text,), **small)
    result = latentize.heal(tmp_path / "pooled", tmp_path / "out", source(), epochs=4, **{**QUICK, "data": (text,)})
    assert result["held_out_best"]["kl"] < 0.9 * result["held_out"][0]["kl"]


@pytest.mark.parametrize(
    "family", ["gemma3_text", "gemma4_text", "gpt2", "gpt_neox", "hunyuan_v1_dense", "lfm2", "qwen3_next"]
)
def test_layers_of_other_kinds_and_names(family: str, source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Layers that stay have another attention, or none; in some families it is called otherwise."""
    model, out = source(family, 4 if family in ONLY_MHA else 2), tmp_path / "out"
    latentize.convert(model, out, format="native", keep="25%", data=(text,), **SMALL)
    for train in ("attention", "lora"):
        options = {**QUICK, "data": (text,), "train": train, "cache": "int8", "epochs": 4}
        result = latentize.heal(out, tmp_path / train, model, **options)
        seen = [look["kl"] for look in result["held_out"]]
        assert len(set(seen)) == len(seen) > 1, "every look finds other weights"
        assert result["held_out_best"]["kl"] == min(seen)
        assert latentize.verify(tmp_path / train)["ok"]
