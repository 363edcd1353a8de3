"""One declarative table per architecture, and the shapes of models that have latent attention already."""

from latentize.families.config import NEEDS_TRUST, model_spec, require_supported
from latentize.families.latent import LatentModel
from latentize.families.latent_config import is_latent, latent_model
from latentize.families.model import ModelSpec
from latentize.families.table import Table, families, register_family

__all__ = [
    "NEEDS_TRUST",
    "LatentModel",
    "ModelSpec",
    "Table",
    "families",
    "is_latent",
    "latent_model",
    "model_spec",
    "register_family",
    "require_supported",
]
