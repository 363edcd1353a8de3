"""A checkpoint held against its family's table: tensors under the names that transformers reads them by, all there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from latentize.checkpoint import Checkpoint
from latentize.errors import CheckpointError
from latentize.families.model import ModelSpec

__all__ = ["match_tensors"]

# Tables of RoPE in files of old versions; transformers ignores them in every family.
_DERIVED = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"


def match_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Hold the tensors of a checkpoint against its shape, as far as headers tell.

    They are called from then on what transformers calls them. As there, the prefix of the body may be missing (a model
    that was saved from ``AutoModel``) or be one too many, and what is derived is left out.

    Args:
        checkpoint: As opened.
        spec: Its shape.

    Raises:
        CheckpointError: weights are quantised, missing, too many, or of other shapes.
    """
    experts, head = spec.table.experts, spec.module("head") + ".weight"
    together = () if experts is None else tuple(f".{name}" for name in experts.in_one())
    stacked = any(name.endswith(together) for name in checkpoint.names()) if together else False
    expected = spec.tensor_shapes(stacked=stacked)
    checkpoint.rename(dict(_renamed(list(checkpoint.names()), {*expected, head}, spec)))
    checkpoint.check_stored(expected)
    stored = checkpoint.count(spec.table.layer_prefix)
    # Files without a single layer have other names.
    if stored not in (0, spec.layers):
        raise CheckpointError(
            f"{checkpoint.config_path.name} says {spec.layers} layers, the files have {stored}",
            code="LZ110",
            where=f"{checkpoint.config_path}, num_hidden_layers",
            fix="take all files from where the model was published",
        )
    if stored and not spec.tied and head not in checkpoint:
        raise CheckpointError(
            "the output head is missing, and is not said to be the embedding",
            code="LZ111",
            where=f"{checkpoint.path}, tensor {head}",
            fix="save the whole model, from AutoModelForCausalLM; or is tie_word_embeddings true?",
        )
    checkpoint.check_tensors(expected, ignore=[head] if spec.tied else [])


def _renamed(names: Collection[str], known: Collection[str], spec: ModelSpec) -> Iterator[tuple[str, str | None]]:
    """Stored names that are not those of the table, and what transformers takes them for."""
    derived = re.compile("|".join((_DERIVED, *spec.table.ignored_tensors)))
    before, _ = spec.table.layer_prefix.split("{layer}")
    further = re.compile(rf"{re.escape(before)}(\d{{1,8}})\.")
    body = spec.module("embedding").partition(".")[0] + "."
    taken = set(names)
    for name in names:
        if name in known:
            continue
        meant = name
        for part, own in spec.table.renamed_tensors.items():
            meant = meant.replace(part, own)
        ours = next((n for n in (meant, meant.removeprefix(body), body + meant) if n in known), None)
        if ours is not None:
            # What is there twice is one too many.
            if ours not in taken:
                taken.add(ours)
                yield name, ours
            continue
        found = further.match(name) if spec.table.further_layers else None
        if derived.search(name) or (found is not None and int(found[1]) >= spec.layers):
            yield name, None
