"""The command line."""

from latentize.cli.app import app, main

__all__ = ["app", "main"]
