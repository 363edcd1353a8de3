"""Is an output whole, and does it compute what it should?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentize.attention.coding import Rounding
from latentize.attention.latent import latent_attention
from latentize.checkpoint import Checkpoint, Manifest, open_checkpoint
from latentize.checkpoint.manifest import sha256
from latentize.errors import CheckpointError
from latentize.families import families
from latentize.formats.deepseek_v3 import decode_attention
from latentize.formats.portable import PORTABLE
from latentize.modeling.attention import LatentAttention
from latentize.modeling.body import body_of
from latentize.modeling.load import load_model
from latentize.runtime.accelerate import accelerate, decelerate
from latentize.runtime.cache import LatentCache
from latentize.runtime.generate import cached_values, latent_layers

__all__ = ["Verdict", "verify"]

TOLERANCE = 1e-4


@dataclass
class Verdict:
    """What was checked.

    Attributes:
        files: Files whose hash was compared.
        tensors: Tensors that were read and are finite.
        absorbed_error: Largest relative difference of absorbed and expanded attention over the layers; of logits where
            the rank of a model with latent attention was lowered.
        decode_error: Largest relative difference of logits, token by token against at once.
        cache_values_per_token_layer: Counted in the cache that transformers held.
        problems: Sentences; empty if all is well.
    """

    files: int = 0
    tensors: int = 0
    absorbed_error: float = 0.0
    decode_error: float = 0.0
    cache_values_per_token_layer: int | float = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@torch.no_grad()
def verify(out: Path) -> Verdict:
    """Check an output of latentize: hashes, finiteness, and two parities.

    Attention is computed expanded and absorbed from the stored weights; logits are computed at once and token by
    token through transformers' cache. Both in float32, and without rounding rows where they are coded.

    Raises:
        CheckpointError: the folder is not an output of latentize, or cannot be read.
    """
    manifest, verdict = Manifest.load(out), Verdict()
    for name, expected in manifest.files.items():
        path = out / name
        if not path.is_file():
            verdict.problems.append(f"{name} is missing")
        elif sha256(path) != expected:
            verdict.problems.append(f"{name} was changed after it was written (SHA-256 differs)")
        verdict.files += 1
    if verdict.problems:
        return verdict
    checkpoint = open_checkpoint(out)
    for name in checkpoint.names():
        checkpoint.load(name)
        verdict.tensors += 1
    model = load_model(out)
    for attention in (module for module in model.modules() if isinstance(module, LatentAttention)):
        # Sums in another order may move a value to the next code; the parities are those of the weights.
        attention.watch = _AsItIs()
    tokens = torch.randint(model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    at_once = model(input_ids=tokens, use_cache=False).logits
    cache, stepwise = None, []
    for position in range(tokens.shape[1]):
        step = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        stepwise.append(step.logits)
    verdict.decode_error = relative_error(torch.cat(stepwise, dim=1), at_once)
    verdict.cache_values_per_token_layer = cached_values(cache, latent_layers(model.config))
    # Norms and compressed queries of a source's own are not what the portable format has.
    lowered = manifest.measurements.get("method") == "lower-rank"
    verdict.absorbed_error = _absorbed_logits_error(model) if lowered else _absorbed_error(model, checkpoint)
    _judge(verdict, manifest)
    return verdict


class _AsItIs(Rounding):
    """Rounds nothing."""

    sinks = newest = 0

    def rounded(self, c: Tensor, k_rope: Tensor, exact: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return c, k_rope


def _judge(verdict: Verdict, manifest: Manifest) -> None:
    expected = manifest.measurements.get("cache_values_per_token_layer")
    if expected is not None and verdict.cache_values_per_token_layer != expected:
        kept = verdict.cache_values_per_token_layer
        verdict.problems.append(f"the cache holds {kept} values per token and layer instead of {expected}")
    if verdict.decode_error > TOLERANCE:
        verdict.problems.append(f"decoding differs from prefill by {verdict.decode_error:.1e} (relative)")
    if verdict.absorbed_error > TOLERANCE:
        verdict.problems.append(f"absorbed differs from expanded by {verdict.absorbed_error:.1e} (relative)")


def _absorbed_error(model: Any, checkpoint: Checkpoint) -> float:
    """Largest difference of the two forms over the layers; zero where attention is not latent."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    source = getattr(model, "source", model)
    table = families().get(source.config.model_type)
    name = "layers" if table is None else table.module("layers")
    for layer in getattr(body_of(source), name):
        attention = next((m for m in layer.children() if isinstance(m, LatentAttention)), None)
        if attention is not None:
            weights = attention.weights()
        elif checkpoint.config["model_type"] in PORTABLE:
            weights = decode_attention(layer.self_attn.state_dict(), checkpoint.config)
        else:
            continue
        x = torch.randn(1, 16, weights.spec.hidden_size, generator=generator)
        # As large as what the attention sees; some families have no norm before it.
        x = x * getattr(getattr(layer, "input_layernorm", None), "weight", 1.0)
        expanded = latent_attention(x, weights, absorb=False)
        worst = max(worst, relative_error(latent_attention(x, weights, absorb=True), expanded))
    return worst


def _absorbed_logits_error(model: Any) -> float:
    """Largest difference of logits: the last token decoded without expanding the cache, against all at once."""
    tokens = torch.randint(model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    expanded = model(input_ids=tokens, use_cache=False).logits[:, -1]
    cache = LatentCache(accelerate(model).config)
    try:
        model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)
        absorbed = model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    finally:
        decelerate(model)
    return relative_error(absorbed, expanded)


def require(verdict: Verdict, out: Path) -> None:
    """Raise if anything was wrong."""
    if not verdict.ok:
        raise CheckpointError(
            "; ".join(verdict.problems), code="LZ118", where=str(out), fix="convert or download again"
        )
