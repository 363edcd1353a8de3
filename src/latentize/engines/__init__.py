"""Inference engines, each in a process and an environment of its own, held against transformers."""
