"""Several processes convert together: as one would, each on its share, and all end where one of them dies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dying import OPTIONS, died_and_resumed, shortened, torchrun

import latentize
from latentize.api import compare
from latentize.conversion import latent
from latentize.conversion.draft import observe
from latentize.conversion.effort import effort_of
from latentize.errors import OptionError
from latentize.families.opening import open_source
from latentize.methods.statistics import Needed
from latentize.modeling.source import SourceModel
from latentize.processes import ALONE, Team
from latentize.text.tokens import Passages

# Everything that is shared: candidates, ranks of each layer, statistics, refinement, polish; codes, which are not.
JOBS: dict[str, dict[str, Any]] = {
    "refined": {"keep": "50%", "self_generated": 0.25},
    "sized layer by layer": {"keep": "50%", "format": "native", "method": "calibrated"},
    "coded": {"bytes": "25%", "fast": True},
    "published": {"keep": "50%", "method": "mha2mla", "fast": True},
}
# Run by each process. MODEL OUT TEXT STATISTICS
SCRIPT = """
import json, sys
from pathlib import Path
import torch
import latentize.api
from latentize.processes import team, together
from tests.dying import OPTIONS, shortened
from tests.integration.test_processes import JOBS, statistics
model, out, text, found = sys.argv[1:]
shortened()
for name, entries in JOBS.items():
    report = latentize.convert(model, f"{out}/{name}", data=(text,), **{**OPTIONS, **entries})
text = {"data": (text,), "tokens": 3000, "sequence_length": 64}
evaluated = latentize.evaluate(f"{out}/refined", model, **text)
compared = latentize.api.compare(model, [f"{out}/refined"], cache=("int8",), **text)
assert bool(evaluated) == bool(compared) == (team().rank == 0)
if team().leads:
    Path(f"{found}.json").write_text(json.dumps([evaluated, compared]))
with together("cpu"):
    torch.save(vars(statistics(Path(model), team())), f"{found}.{team().rank}")
"""


def statistics(model: Path, team: Team) -> Any:
    """Of the second layer, on some random sequences, one of which jumps; each process has a share."""
    checkpoint, spec = open_source(model)
    generator = torch.Generator().manual_seed(0)
    text = Passages.contiguous(torch.randint(257, (8, 32), generator=generator))
    text.positions_NT[3, 16:] += 40
    source = SourceModel(checkpoint, spec)
    stream = source.embed(text.share(team))
    first, second = source.layer(0), source.layer(1)
    first.run(stream)
    return observe(second, stream, Needed(norms=True, distances=True), team=team).stats


@pytest.fixture(scope="module")
def two(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have made."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(SCRIPT, folder, source(), folder, text, folder / "statistics")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_make_what_one_makes(
    name: str, two: Path, source: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent, "effort_of", effort_of)
    shortened()
    one = latentize.convert(source(), tmp_path / "one", data=(text,), **{**OPTIONS, **JOBS[name]})
    made = latentize.evaluate(two / name, source(), data=(text,), tokens=4096, sequence_length=64)
    alone = latentize.evaluate(tmp_path / "one", source(), data=(text,), tokens=4096, sequence_length=64)
    # Sums in another order turn axes of nearly the same energy, of which codes make others.
    assert made["kl"] == pytest.approx(alone["kl"], rel=0.05 if name == "coded" else 0.02, abs=1e-5)
    manifest = json.loads((two / name / "latentize.json").read_text())
    assert manifest["measurements"]["processes"] == 2 and "processes" not in one
    assert manifest["measurements"]["cache_values_per_token_layer"] == one["cache_values_per_token_layer"]
    assert latentize.verify(two / name)["ok"]


def test_statistics_are_those_of_the_whole_text(two: Path, source: Callable[..., Path]) -> None:
    whole = vars(statistics(source(), ALONE))
    parts = [torch.load(two / f"statistics.{rank}") for rank in (0, 1)]
    for name, expected in whole.items():
        if isinstance(expected, torch.Tensor):
            assert torch.equal(parts[0][name], parts[1][name]), "the same bits in both"
            error = (parts[0][name] - expected).abs().max() / expected.abs().max()
            assert error <= 1e-6, name
    assert parts[0]["tokens"] == whole["tokens"] == 256


def test_measurements_are_those_of_one_process(two: Path, source: Callable[..., Path], text: str) -> None:
    options: dict[str, Any] = {"data": (text,), "tokens": 3000, "sequence_length": 64}
    evaluated, compared = json.loads((two / "statistics.json").read_text())
    alone = latentize.evaluate(two / "refined", source(), **options)
    assert evaluated["tokens"] == alone["tokens"] > 2800
    for name in ("perplexity", "kl", "top1_agreement", "calibration_error"):
        assert evaluated[name] == pytest.approx(alone[name], rel=1e-9), name
    rows = compare(str(source()), [str(two / "refined")], cache=("int8",), **options)["rows"]
    assert [row["kl"] for row in compared["rows"]] == pytest.approx([row["kl"] for row in rows], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("at", "rank"), [(2, 1), (30, 0)])
def test_where_one_dies_all_end_and_can_go_on(
    at: int, rank: int, source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    kept = died_and_resumed(source(), text, tmp_path, at, rank)
    assert kept == (at > 2), "the first layer was refined, or nothing was"


def test_more_processes_than_text() -> None:
    text = Passages.contiguous(torch.zeros(3, 8, dtype=torch.int64))
    assert [len(text.share(Team(rank, 3))) for rank in range(3)] == [1, 1, 1]
    assert [len(text.share(Team(rank, 2))) for rank in range(2)] == [1, 1]
    with pytest.raises(OptionError, match="3 sequences of text cannot be shared by 4 processes"):
        text.share(Team(0, 4))


def test_one_process_alone_shares_nothing() -> None:
    tensor = torch.ones(2)
    ALONE.add_up([tensor])
    assert tensor.tolist() == [1, 1]
    assert (ALONE.mean(3.0), ALONE.most(2.0), ALONE.told("a"), ALONE.mine([1, 2])) == (3.0, 2.0, "a", [1, 2])
    assert ALONE.gathered([1.0, 2.0], 2) == [1.0, 2.0] and ALONE.of(5, 7) == 7
