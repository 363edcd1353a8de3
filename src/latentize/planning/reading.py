"""What a model is, by its configuration alone."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

from latentize.checkpoint import load_config
from latentize.checkpoint.gguf import is_gguf, only_gguf
from latentize.checkpoint.quantised import unquantised
from latentize.checkpoint.towers import language_model
from latentize.errors import CheckpointError, ConfigError
from latentize.families import LatentModel, ModelSpec, is_latent, latent_model, model_spec
from latentize.paths import expanded

__all__ = ["read_spec", "shapes"]


def shapes() -> dict[str, Path]:
    """Published shapes that ship as small configs, by name, for ``latentize plan``."""
    folder = Path(str(resources.files("latentize.planning") / "shapes"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def _config_file(model: str) -> Path:
    """The ``config.json``, or the GGUF file, that ``model`` means; from the hub nothing else is downloaded."""
    path = expanded(model)
    # ``os.path`` says no to names that are too long; ``pathlib`` raises.
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        return only_gguf(path) or path / "config.json"
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


def read_spec(model: str) -> ModelSpec | LatentModel:
    """The description of a model from its ``config.json``, or the keys of its GGUF file, alone."""
    path = _config_file(model)
    if is_gguf(path):
        return model_spec(load_config(path).to_dict())
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file cannot be read: {error}", where=str(path)) from error
    # A config is enough: what quantised weights take is not asked.
    config = unquantised(language_model(config)) if isinstance(config, dict) else config
    return latent_model(config) if is_latent(config) else model_spec(config)
