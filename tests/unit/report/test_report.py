"""The page says what the manifest says, whatever that holds, and asks nothing of anybody."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from latentize.checkpoint import Manifest
from latentize.errors import CheckpointError
from latentize.report.chart import bit_map, layer_bars, line_chart, rope_map
from latentize.report.measurements import MEASUREMENTS_NAME, is_output, measured, record
from latentize.report.page import page, speed_chart, verdict, write_report

EVIL = "<script src=\"https://evil.example/x.js\"></script><img src='//evil.example' onerror=alert(1)>"
VOID = {"meta", "link", "img", "br"}


def manifest(**changes: Any) -> Manifest:
    layer = {
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 12,
        "error_before_refine": 0.2,
        "error_after_refine": 0.05,
        "rope_kept": [0, 1, 1, 3],
        "rope_cost": [3.0, 2.0, 0.5, 0.1],
        "latent_energy": 0.9,
        "spectrum": [[1, 0.6], [2, 0.3], [3, 0.1]],
    }
    measurements = {
        "format": "deepseek_v3",
        "to": "mla",
        "method": "calibrated",
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 12,
        "rope_theta": 100.0,
        "cache_values_per_token_layer": 32,
        "source_cache_values_per_token_layer": 128,
        "calibration_tokens": 4096,
        "calibration_text": "notes.txt",
        "source_perplexity": 10.0,
        "perplexity": 11.0,
        "excess_loss": 0.0953,
        "closed_form_excess_loss": 0.4,
        "kl": 0.12,
        "top1_agreement": 0.81,
        "evaluation_tokens": 1000,
    }
    source = {
        "model": "somewhere/tiny",
        "model_type": "llama",
        "attention": "GQA",
        "layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "cache_values_per_token_layer": 128,
        "max_position_embeddings": 4096,
    }
    made = Manifest(
        format="deepseek_v3",
        source=source,
        recipe={"sequence_length": 512, "keep": 0.25, "data": []},
        layers=[layer, layer],
        measurements=measurements,
        notes=["a note"],
        files={"model.safetensors": "ab" * 32},
        versions={"latentize": "9.9"},
    )
    for path, value in changes.items():
        getattr(made, path).update(value) if isinstance(value, dict) else setattr(made, path, value)
    return made


class Checked(HTMLParser):
    """Tags that close in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), "an event handler"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(html: str) -> list[str]:
    parser = Checked()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser.seen


FOUND = {
    "eval": [{"at": "2026-01-02T03", "perplexity": 11.5, "kl": None, "tokens": 5000, "cache": "int4"}],
    "bench": [
        {
            "at": "2026-01-02T03",
            "dtype": "bfloat16",
            "threads": 2,
            "device": "cpu",
            "rows": [{"name": "ours", "batch": 1, "context": c, "milliseconds_per_token": c / 8} for c in (64, 128)],
        }
    ],
    "sample": [{"at": "2026-01-02T03", "prompt": "def ", "source": "f():", "converted": "g():"}],
}


def test_everything_that_is_known_is_on_the_page() -> None:
    html = page(manifest(), FOUND, name="out")
    tags = checked(html)
    for words in (
        "75.0%",
        "0.0953",
        "usable, with a loss",
        "0.4000",
        "notes.txt",
        "eval of 2026-01-02, cache int4",
        "Milliseconds a decode step",
        "def g():",
        "a note",
        "ab" * 32,
        "9.9",
        "20 + 12",
    ):
        assert words in html, words
    assert tags.count("svg") == 6
    assert "script" not in tags
    assert len(html) < 1_000_000


def evaluated(**changes: Any) -> dict[str, Any]:
    """An entry as eval records it."""
    bins = [{"from": 2**k, "to": 2 ** (k + 1) - 1, "tokens": 8, "loss": 5.1 - k / 4} for k in range(5)]
    for number, b in enumerate(bins):
        b |= {"reference_loss": b["loss"] - 0.2, "kl": 0.1 / (number + 1)}
    return {**FOUND["eval"][0], "by_position": bins, "top5_agreement": 0.987, "calibration_error": 0.031, **changes}


def test_losses_are_drawn_against_the_position() -> None:
    found = [evaluated(reference_calibration_error=0.024), {**FOUND["eval"][0], "at": "2026-02-02T03"}]
    html = page(manifest(), {"eval": found}, name="out")
    assert checked(html).count("svg") == 7
    for words in ("Where in the context", "98.7%", "3.1% (the source: 2.4%)", "eval of 2026-01-02, cache int4"):
        assert words in html, words
    alone = evaluated(top5_agreement=None, by_position=[{**b, "reference_loss": None, "kl": None} for b in BINS])
    html = page(manifest(), {"eval": [alone]}, name="out")
    assert checked(html).count("svg") == 6
    assert "five most likely" not in html and "differ by 3.1%." in html
    assert "Where in the context" not in page(manifest(), FOUND, name="out")


def probed(**changes: Any) -> dict[str, Any]:
    """The same, with probes."""
    row = {"probe": "needle", "length": 512, "depth": None, "examples": 12}
    for name, value in {
        "score": 0.25,
        "reference_score": 0.5,
        "gain": 1.5,
        "reference_gain": 2.5,
        "gain_lost": 1,
    }.items():
        row |= {name: value, f"{name}_error": 0.125}
    rows = [{**row, **changes}, {**row, "probe": "copy", "length": 1024, "gain_error": None}]
    return evaluated(probes={"lengths": [512], "depths": [0.1, 0.5], "samples": 6, "rows": rows, "cells": []})


def test_probes_are_a_table() -> None:
    html = page(manifest(), {"eval": [probed(), evaluated()]}, name="out")
    checked(html)
    for words in ("<td>needle</td><td>512</td><td>25.0% ± 12.5%</td><td>50.0% ± 12.5%</td><td>1.50 ± 0.12</td>",
                  "<td>1.50</td><td>1.00 ± 0.12</td>", "12 examples a row", "depths 0.1, 0.5 of"):  # fmt: skip
        assert words in html, words
    alone = probed(reference_gain=None, gain_lost=None)
    html = page(manifest(), {"eval": [alone]}, name="out")
    checked(html)
    assert "<th>gain, nats</th></tr>" in html
    assert "far back" not in page(manifest(), FOUND, name="out")


BINS: list[dict[str, Any]] = evaluated()["by_position"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (2.31, 5.9, [2, 3, 4, 5, 6]),
        (-0.03, 0.11, [-0.05, 0, 0.05, 0.1, 0.15]),
        (3.0, 3.0, [3, 4]),
        (0.0, 0.0, [0, 0.2]),
    ],
)
def test_an_even_axis_begins_and_ends_on_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    drawn = line_chart({"a": [(1.0, low), (2.0, high)]}, title="t", x_label="x", linear=True)
    checked(drawn)
    assert [float(t) for t in re.findall(r'text-anchor="end">([-\d.]+)<', drawn)] == ticks


def test_nothing_is_asked_of_anybody() -> None:
    """No address but the name of SVG's own language, and the page forbids itself to load anything."""
    html = page(manifest(), FOUND, name="out")
    assert set(re.findall(r"https?://[^\"' <]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html)


def test_whatever_a_model_is_called_it_stays_text() -> None:
    evil = manifest(
        source={"model": EVIL, "model_type": EVIL, "attention": EVIL},
        measurements={"calibration_text": EVIL, "method": EVIL},
        notes=[EVIL],
        recipe={"data": [EVIL]},
        files={EVIL: EVIL},
        versions={EVIL: EVIL},
    )
    sample = [{"at": EVIL, "prompt": EVIL, "source": EVIL, "converted": EVIL}]
    bench = [{**FOUND["bench"][0], "at": EVIL, "dtype": EVIL}]
    bench[0]["rows"] = [{**row, "name": EVIL} for row in bench[0]["rows"]]
    html = page(evil, {"sample": sample, "bench": bench, "eval": [{**FOUND["eval"][0], "cache": EVIL}]}, name=EVIL)
    tags = checked(html)
    assert "script" not in tags and "img" not in tags


def test_pooled_heads_have_neither_latents_nor_a_choice_of_rope() -> None:
    layers = [{"error_before_refine": 0.3, "error_after_refine": 0.3}] * 2
    html = page(
        manifest(layers=layers, measurements={"to": "mqa", "num_key_value_heads": 1, "kv_lora_rank": None}),
        {},
        name="o",
    )
    checked(html)
    assert "Where RoPE went" not in html and "What a latent has to hold" not in html
    assert "1 kv head" in html


@pytest.mark.parametrize(
    ("excess", "words"), [(-0.01, "good"), (0.02, "close"), (0.1, "loss"), (0.5, "damaged"), (3.0, "not usable")]
)
def test_a_verdict_is_as_bad_as_the_loss(excess: float, words: str) -> None:
    assert words in verdict(excess)[0]


def test_measurements_are_lines_that_stay(tmp_path: Path) -> None:
    assert measured(tmp_path) == {} and not is_output(tmp_path)
    record(tmp_path, "eval", {"tokens": 1})
    record(tmp_path, "bench", {"rows": []})
    record(tmp_path, "eval", {"tokens": 2})
    assert [e["tokens"] for e in measured(tmp_path)["eval"]] == [1, 2]
    with (tmp_path / MEASUREMENTS_NAME).open("a") as stream:
        stream.write("{")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        measured(tmp_path)
    assert "line 4" in caught.value.where


def test_a_manifest_that_does_not_know_its_source_is_refused(tmp_path: Path) -> None:
    made = manifest()
    made.source = {"model": "x"}
    (tmp_path / "latentize.json").write_text(made.dumps())
    with pytest.raises(CheckpointError, match="describe the source"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_map_marks_what_rotates_and_how_often() -> None:
    svg = rope_map([[1.0, 0.0], [0.5, 2.0]], {"●": [[0], [1, 1, 1, 1, 1, 1, 1]]}, title="t")
    checked(svg)
    assert svg.count(">●<") == 1
    assert ">●7<" in svg, "many are counted, not drawn"
    assert 'fill-opacity="0.25"' in svg, "shade is relative to the layer's costliest"


def test_a_map_of_bits_says_how_many() -> None:
    layers = [([(4, 8), (0, 8)], [(2, 16)]), ([(3, 16)], [(5, 8), (1, 8)])]
    drawn = bit_map(layers, ("latent", "roped keys"), title="Bits")
    assert [drawn.count(f">{bits}</text>") for bits in range(6)] == [0, 1, 1, 1, 1, 1]
    assert drawn.count("layer ") == 2 and "roped keys" in drawn


def test_bars_are_as_long_as_their_values() -> None:
    svg = layer_bars({"latent": [20, 10], "roped key": [12, 6]}, title="t", full=64)
    checked(svg)
    assert 'width="118.8"' in svg and 'width="59.4"' in svg
    assert ">20 + 12<" in svg


def test_a_line_upon_another_leaves_it_to_be_seen() -> None:
    line = [(1.0, 2.0), (10.0, 3.0)]
    drawn = line_chart({"a": line, "b": [(1.0, 5.0), (10.0, 3.0)], "c": line}, title="t", x_label="x")
    dashed = ["dash" in path for path in re.findall("<polyline[^>]+>", drawn)]
    assert dashed == [False, False, True]


def test_an_even_axis_keeps_distances() -> None:
    drawn = line_chart({"a": [(float(x), 1.0) for x in range(5)]}, title="t", x_label="x", even=True)
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    assert all(b - a == pytest.approx(95, abs=0.2) for a, b in pairwise(places))


def test_labels_that_would_touch_are_left_out() -> None:
    svg = line_chart({"a": [(float(x), 1.0) for x in range(1, 200)]}, title="t", x_label="x")
    assert 5 <= len(re.findall(r'y="320" text-anchor="middle">[\d,]+<', svg)) <= 10


def test_speed_names_batches_where_there_are_several() -> None:
    rows = [{"name": "m", "batch": b, "context": 8, "milliseconds_per_token": 1.0} for b in (1, 4)]
    assert "m, batch 4" in speed_chart(rows)
    assert "batch" not in speed_chart(rows[:1])
