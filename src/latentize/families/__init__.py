"""One declarative table per architecture."""

from latentize.families.table import ModelSpec, Table, families, model_spec, register_family

__all__ = ["ModelSpec", "Table", "families", "model_spec", "register_family"]
