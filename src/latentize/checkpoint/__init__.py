"""Reading and writing checkpoints: safetensors only, one tensor at a time."""

from latentize.checkpoint.hub import resolve
from latentize.checkpoint.journal import Journal
from latentize.checkpoint.manifest import MANIFEST_NAME, Manifest
from latentize.checkpoint.reader import Checkpoint
from latentize.checkpoint.writer import OutputFolder

__all__ = ["MANIFEST_NAME", "Checkpoint", "Journal", "Manifest", "OutputFolder", "resolve"]
