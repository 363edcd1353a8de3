"""DeepSeek-V2's layout with experts of other families, whose weights may sum to one.

transformers' class of it does not weigh experts so, and its config names a way to choose that the class does not know.
What loads it for latentize is that class with another last step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentize.checkpoint.gguf import is_gguf
from latentize.checkpoint.reader import read_json
from latentize.checkpoint.towers import weighs_chosen
from latentize.errors import ConfigError

__all__ = ["weigh_chosen"]


def weigh_chosen(model: nn.Module, path: Path) -> None:
    """Weigh experts of a model, as transformers has made it, as its folder's config says."""
    config = {} if is_gguf(path) else read_json(path / "config.json", ConfigError, "LZ102")
    for module in model.modules() if weighs_chosen(config) else ():
        if type(module).__name__ == "DeepseekV2TopkRouter":
            module.register_forward_hook(_normalised)


def _normalised(_: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a router says, with weights that sum to one."""
    logits, weight_nk, index_nk = output
    return logits, weight_nk / weight_nk.sum(-1, keepdim=True), index_nk
