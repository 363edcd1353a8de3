"""A model of ours beside the plain one that it should equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.common import FP32, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

import latentize

KINDS = ("native", "native, accelerated", "native, kept layers", "portable, accelerated")
ATTENTION = r".*self_attn\.(q_proj|kv_a_proj|kv_a_proj_with_mqa|k_rope_proj|kv_b_proj|o_proj)"
IDS = torch.randint(1, 257, (2, 20), generator=torch.Generator().manual_seed(3))


class Pair:
    """A model of a kind, and the plain one that it should equal."""

    def __init__(self, kind: str, folders: dict[str, Path]) -> None:
        self.kind = kind
        self.fast = kind.endswith("accelerated")
        self.folder = folders[kind.removesuffix(", accelerated")]

    def plain(self, **options: Any) -> Any:
        options = {"dtype": torch.float32, **options}
        return AutoModelForCausalLM.from_pretrained(self.folder, **options).eval()

    def model(self, **options: Any) -> Any:
        return latentize.accelerate(self.plain(**options)) if self.fast else self.plain(**options)


def generated(model: Any, **options: Any) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**({} if "inputs_embeds" in options else {"input_ids": IDS}), **options)


def assert_same(model: Any, expected: Any, tolerance: float = FP32) -> None:
    with torch.no_grad():
        assert relative_error(model(input_ids=IDS).logits, expected(input_ids=IDS).logits) <= tolerance
        assert torch.equal(generated(model), generated(expected))


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
