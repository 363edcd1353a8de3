"""All methods of conversion, and what a recipe allows of them."""

from __future__ import annotations

from latentize.attention.spec import AttentionSpec
from latentize.errors import OptionError
from latentize.methods.calibrated import Calibrated
from latentize.methods.care import Care
from latentize.methods.method import Method
from latentize.methods.mha2mla import Mha2Mla
from latentize.methods.setting import Setting
from latentize.methods.statistics import Needed
from latentize.methods.transmla import TransMla
from latentize.recipe import Recipe

__all__ = ["METHODS", "method_of", "needs", "settings"]

METHODS: dict[str, Method] = {method.name: method for method in (Calibrated(), TransMla(), Mha2Mla(), Care())}


def method_of(setting: Setting) -> Method:
    """The method that a setting belongs to."""
    return METHODS[setting.method]


def needs(setting: Setting, spec: AttentionSpec) -> Needed:
    """Statistics that the setting's method looks at beyond second moments."""
    return method_of(setting).needs(setting, spec)


def settings(recipe: Recipe, spec: AttentionSpec) -> list[Setting]:
    """All settings that a recipe allows for a layer; more than one where something is left open.

    Raises:
        OptionError: no setting fits the budget, or explicit sizes are out of range.
        UnsupportedModelError: the method cannot treat this attention.
    """
    if recipe.kv_lora_rank is not None and recipe.sizes is None:
        raise OptionError(
            "kv_lora_rank and qk_rope_head_dim belong together",
            where="--kv-lora-rank",
            fix="give --qk-rope-head-dim, too; only a model that has latent attention already keeps its own",
        )
    return METHODS[recipe.method].settings(recipe, spec)
