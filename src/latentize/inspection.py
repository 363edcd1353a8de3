"""What can be said of a model without running it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from latentize import plan as arithmetic
from latentize.checkpoint import resolve
from latentize.errors import CheckpointError, ConfigError, LatentizeError, OptionError
from latentize.families import ModelSpec, model_spec
from latentize.recipe import parse_keep

__all__ = ["inspect", "plan", "shapes"]


def shapes() -> dict[str, Path]:
    """Published shapes that ship as small configs, by name, for ``latentize plan``."""
    folder = Path(str(resources.files("latentize") / "shapes"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def _config_file(model: str) -> Path:
    """The ``config.json`` that ``model`` means; from the hub nothing else is downloaded."""
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / "config.json"
    if model in shapes():
        return shapes()[model]
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(model, "config.json"))
        except Exception as error:
            raise CheckpointError(
                f"cannot get config.json from the hub: {str(error).splitlines()[0]}",
                where=model,
                fix="check the name, the network and your access, or pass a local folder",
            ) from error
    raise CheckpointError("there is no such folder or file", where=model, fix=f"shipped shapes: {', '.join(shapes())}")


def read_spec(model: str) -> ModelSpec:
    """The description of a model from its ``config.json`` alone."""
    path = _config_file(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file cannot be read: {error}", where=str(path)) from error
    return model_spec(config)


def plan(
    model: str, *, context: int | None = None, batch: int = 1, keep: Any = "25%", window: int = 4096
) -> dict[str, Any]:
    """What ``latentize plan --json`` prints.

    Raises:
        OptionError: ``keep`` is no share.
        CheckpointError, ConfigError, UnsupportedModelError: as for reading any model.
    """
    share = parse_keep(keep)
    try:
        share = float(share)
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share <= 1:
        raise OptionError(f"'{keep}' is not a share of the cache", where="--keep", fix="give 25% or 0.25")
    spec = read_spec(model)
    tokens = context or spec.max_positions
    rows = arithmetic.plan(spec, context=tokens, batch=batch, keep=share, window=window)
    facts = arithmetic.describe(spec)
    return {"model": facts, "context": tokens, "batch": batch, "rows": arithmetic.as_json(rows)}


def inspect(model: str) -> dict[str, Any]:
    """What ``latentize inspect --json`` prints. Reads headers, not weights."""
    from latentize.checkpoint import Checkpoint
    from latentize.convert.settings import settings
    from latentize.formats.deepseek_v3 import portable_reasons
    from latentize.recipe import Recipe

    checkpoint = Checkpoint(resolve(model))
    spec = model_spec(checkpoint.config)
    checkpoint.check_tensors(spec.tensor_shapes(), ignore=["lm_head.weight"] if spec.tied else [])
    methods = []
    for method in ("calibrated", "transmla", "care", "mha2mla"):
        try:
            allowed = settings(Recipe.build(method=method), spec.attention)
        except LatentizeError as error:
            methods.append({"method": method, "result": "refused", "why": error.what})
            continue
        nearest = min(allowed, key=lambda setting: len(portable_reasons(spec, setting)))
        reasons = portable_reasons(spec, nearest)
        why = "; ".join(reasons or nearest.approximations(spec.attention))
        methods.append({"method": method, "result": "native" if reasons else "deepseek_v3", "why": why})
    parameters = 0
    for name in checkpoint.names():
        count = 1
        for size in checkpoint.shape(name):
            count *= size
        parameters += count
    return {**arithmetic.describe(spec), "parameters": parameters, "methods": methods}
