"""What a user calls a model is found, or refused by a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.models import pico

from latentize.checkpoint import open_checkpoint, resolve
from latentize.errors import CheckpointError


@pytest.mark.parametrize(
    ("model", "words"),
    [("./nowhere", "no such folder"), ("/nowhere/at/all", "no such folder"), ("a/b/c", "not a hub id")],
)
def test_a_model_that_is_nowhere(model: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        resolve(model)


def test_a_model_that_is_a_file(source: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="not another file"):
        resolve(source() / "config.json")


def test_a_folder_resolves_to_itself(source: Callable[..., Path]) -> None:
    assert resolve(source()) == source().resolve()
    assert open_checkpoint(resolve(str(source()))).config["model_type"] == "llama"


def test_a_whole_file_wins_over_an_index_that_was_left_beside_it(tmp_path: Path) -> None:
    """As for transformers: here the shards are of another model."""
    from transformers import AutoModelForCausalLM

    folder = pico(tmp_path, shard="60KB")
    weights = {name: t + 1.0 for name, t in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}
    weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = open_checkpoint(folder)
    assert {path.name for path in ours.files} == {"model.safetensors"}
    for name in ours.names():
        assert torch.equal(ours.load(name), theirs[name]), name
