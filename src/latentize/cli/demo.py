"""Everything once, on the model that ships with latentize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentize.api import convert, evaluate, extend_report, generate, heal, verify
from latentize.checkpoint.places import require_folder, require_new
from latentize.errors import CheckpointError
from latentize.paths import expanded
from latentize.progress import Progress, silent

__all__ = ["PROMPT", "bundled_model", "demo"]

PROMPT = "def read_file(path, encoding=None):\n"
_NAME = "tiny-llama-gqa"
# Seconds, and minutes.
_CONVERSIONS: dict[str, dict[str, Any]] = {
    "mla-50-fast": {"keep": "50%", "fast": True},
    "mla-50": {"keep": "50%"},
}
_HEALING: dict[str, Any] = {"tokens": 16_384, "looks": 1, "selection_tokens": 2048}


def bundled_model() -> Path:
    """The folder of the bundled model, in an installed package or in a checkout.

    Raises:
        CheckpointError: the installation lacks it.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "bundled" / _NAME, package.parents[1] / "models" / _NAME):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError("the bundled model is not installed", where=str(package), fix="install latentize again")


def demo(out: str | Path, progress: Progress = silent, *, evaluation_tokens: int = 8_192) -> dict[str, Any]:
    """Convert the bundled model to half of its cache, fast, fast and healed, and well; verify, evaluate and run it all.

    Args:
        out: Folder for the results; must not exist.
        progress: Told how far it is.
        evaluation_tokens: Held-out tokens to measure on.
    """
    out = expanded(out)
    require_new(out)
    require_folder(out)
    model = bundled_model()
    source = evaluate(model, tokens=evaluation_tokens, progress=progress)
    said = generate(model, PROMPT, max_new_tokens=48)
    rows: list[dict[str, Any]] = [
        {
            "name": "the source",
            "cache_values_per_token_layer": said["cache_values_per_token_layer"],
            "perplexity": source["perplexity"],
            "kl": None,
            "top1_agreement": None,
            "continuation": said["text"],
        }
    ]
    report = None
    for name, options in _CONVERSIONS.items():
        folder = out / name
        convert(model, folder, progress=progress, **options)
        label = f"MLA, --keep {options['keep']}" + (" --fast" if options.get("fast") else "")
        row, report = _row(label, folder, model, rows[0]["continuation"], evaluation_tokens, progress)
        rows.append(row)
        if options.get("fast"):
            healed = out / f"{name}-healed"
            heal(folder, healed, model, evaluation_tokens=evaluation_tokens, progress=progress, **_HEALING)
            row, _ = _row(f"{label}, healed", healed, model, rows[0]["continuation"], evaluation_tokens, progress)
            rows.append(row)
    return {"rows": rows, "evaluation_tokens": source["tokens"], "report": str(report)}


def _row(
    label: str, folder: Path, model: Path, continuation: str, tokens: int, progress: Progress
) -> tuple[dict[str, Any], Path | None]:
    """Verify, evaluate and run one output; its row, and its report."""
    verify(folder)
    measured = evaluate(folder, model, tokens=tokens, progress=progress)
    extend_report(folder, "eval", measured)
    said = generate(folder, PROMPT, max_new_tokens=48)
    report = extend_report(folder, "sample", {"prompt": PROMPT, "source": continuation, "converted": said["text"]})
    numbers = {k: measured[k] for k in ("perplexity", "kl", "top1_agreement")}
    cached = said["cache_values_per_token_layer"]
    row = {"name": label, "folder": str(folder), "cache_values_per_token_layer": cached, **numbers}
    return {**row, "continuation": said["text"]}, report
