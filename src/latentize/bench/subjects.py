"""What a benchmark compares: a model accelerated and as transformers runs it, and its source."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DynamicCache

from latentize.bench.decode import Subject
from latentize.modeling.load import load_model
from latentize.runtime.accelerate import accelerate, has_latents, no_latents
from latentize.runtime.cache import CacheFormats, LatentCache

__all__ = ["subjects_of"]


def subjects_of(
    model: Path,
    reference: Path | None,
    formats: CacheFormats,
    *,
    stock: bool,
    dtype: torch.dtype,
    device: str,
) -> list[Subject]:
    """Load everything that is compared.

    Args:
        model: Folder of the model.
        reference: Folder of its source.
        formats: Of a :class:`~latentize.runtime.cache.LatentCache` to measure, too.
        stock: Measure the model without ``accelerate``, too.
        dtype: Precision to run in.
        device: Where.

    Raises:
        OptionError: a cache format for a model that has no latents.
    """
    plain, found = load_model(model, dtype=dtype, device=device), []
    latent = has_latents(plain)
    if formats and not latent:
        raise no_latents("--cache")
    if latent:
        fast = accelerate(load_model(model, dtype=dtype, device=device))
        found.append(Subject("latentize", fast, lambda: LatentCache(fast.config)))
        if formats:
            name = f"latentize, {formats.get('latent')}+{formats.get('rope')}"
            found.append(Subject(name, fast, lambda: LatentCache(fast.config, **formats)))
    if stock or not latent:
        found.append(Subject("transformers", plain, DynamicCache))
    if reference is not None:
        source = load_model(reference, dtype=dtype, device=device)
        found.append(Subject("source, transformers", source, DynamicCache))
    return found
