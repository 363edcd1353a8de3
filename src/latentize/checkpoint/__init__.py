"""Reading and writing checkpoints: safetensors folders, and GGUF files as sources; one tensor at a time."""

from latentize.checkpoint.base import Checkpoint
from latentize.checkpoint.hub import resolve
from latentize.checkpoint.journal import Journal
from latentize.checkpoint.manifest import MANIFEST_NAME, Manifest
from latentize.checkpoint.opening import load_config, loading, open_checkpoint, pretrained, told_config
from latentize.checkpoint.writer import OutputFolder

__all__ = [
    "MANIFEST_NAME",
    "Checkpoint",
    "Journal",
    "Manifest",
    "OutputFolder",
    "load_config",
    "loading",
    "open_checkpoint",
    "pretrained",
    "resolve",
    "told_config",
]
