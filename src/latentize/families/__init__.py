"""One declarative table per architecture."""

from latentize.families.model import ModelSpec, model_spec
from latentize.families.table import Table, families, register_family

__all__ = ["ModelSpec", "Table", "families", "model_spec", "register_family"]
