"""The report in a browser: nothing complained of, nothing fetched, wide and narrow, in the light and in the dark."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from tests.unit.report.test_report import FOUND, manifest, probed

from latentize.report.page import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="2026-11-24: there is no Chromium or Chrome on this machine"),
    pytest.mark.slow,
]
LIGHT, DARK = 1, 0


def opened(html: Path, tmp_path: Path, *, width: int = 1280, scheme: int = LIGHT) -> tuple[str, list[str], Path]:
    """What the browser wrote to its log, the addresses that it asked for, and the picture."""
    assert BROWSER is not None
    log, picture = tmp_path / "net.json", tmp_path / f"{width}-{scheme}.png"
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={log}",
        "--virtual-time-budget=3000",
        f"--window-size={width},2000",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--screenshot={picture}",
        html.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stderr, addresses(log), picture


def addresses(log: Path) -> list[str]:
    """Of the requests that the page made; what the browser asks its makers for by itself has another origin."""
    entries = json.loads(log.read_text())
    kinds = {number: name for name, number in entries["constants"]["logEventTypes"].items()}
    found = []
    for event in entries["events"]:
        parameters = event.get("params", {})
        if (
            kinds[event["type"]] == "URL_REQUEST_START_JOB"
            and parameters.get("initiator", "not an origin") != "not an origin"
        ):
            found.append(parameters["url"])
    return found


def size(picture: Path) -> tuple[int, int]:
    """From a PNG's first chunk."""
    return struct.unpack(">II", picture.read_bytes()[16:24])


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(page(manifest(), {**FOUND, "eval": [probed()]}, name="out"), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_a_browser_has_nothing_to_complain_of(report: Path, tmp_path: Path, width: int, scheme: int) -> None:
    said, asked, picture = opened(report, tmp_path, width=width, scheme=scheme)
    assert "CONSOLE" not in said, said
    assert asked == [], "the page asks for nothing"
    assert report.stat().st_size < 1_000_000
    assert size(picture) == (width, 2000)


def test_complaints_and_requests_would_be_noticed(report: Path, tmp_path: Path) -> None:
    """The same look at a page that does both."""
    bad = "<body><script>console.error('broken')</script><img src='https://example.invalid/x.png'></body>"
    report.write_text(bad, encoding="utf-8")
    said, asked, _ = opened(report, tmp_path)
    assert "CONSOLE" in said and "broken" in said
    assert any("example.invalid" in address for address in asked)
