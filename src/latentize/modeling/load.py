"""Models of any supported kind, loaded as users load them."""

from __future__ import annotations

import copy
from contextlib import nullcontext, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from latentize.checkpoint import load_config, loading, open_checkpoint, pretrained, told_config
from latentize.checkpoint.gguf import is_gguf
from latentize.checkpoint.gguf_config import gguf_ends
from latentize.checkpoint.streaming import remote_of
from latentize.errors import CheckpointError
from latentize.families import families
from latentize.modeling.experts import weigh_chosen
from latentize.modeling.generation import settle, stored_settings
from latentize.text.tokens import require_positions, require_rows

__all__ = ["load_model"]


def load_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
    notes: list[str] | None = None,
) -> Any:
    """``AutoModelForCausalLM.from_pretrained``, with the native format known and nothing left unsaid.

    It generates with what of its settings can be had (``runtime.settings``), and refuses tokens that have no row.

    Args:
        path: A folder; or a GGUF file, which transformers dequantises.
        dtype: Precision to run in.
        device: Where.
        trust_remote_code: Whether code of the checkpoint may be run.
        notes: Gets what of its settings for generation is left out, in sentences.

    Raises:
        CheckpointError: transformers cannot load it, or weights are missing or left over; or a package is missing that
            transformers wants for a GGUF file.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    known = _told(path, dtype, trust_remote_code)
    settings = stored_settings(path)
    if settings is not None:
        # Not to be read by transformers, which refuses what it does not understand.
        options["generation_config"] = GenerationConfig()
    # The bar that transformers shows for a GGUF file knows no setting.
    with loading(path), redirect_stderr(StringIO()) if is_gguf(path) else nullcontext():
        loader: Any = _class_of(known["config"], trust_remote_code) if "state_dict" in known else AutoModelForCausalLM
        model, info = loader.from_pretrained(**{**pretrained(path), **known, **options})
    weigh_chosen(model, path)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        odd = sorted(str(k) for k in info.get(kind, ()))
        if odd:
            raise CheckpointError(f"{kind.replace('_', ' ')}: {', '.join(odd[:3])}", where=str(path))
    if is_gguf(path):
        model.generation_config.eos_token_id = gguf_ends(path, model.generation_config.eos_token_id)
    said = settle(model, vars(model.generation_config) if settings is None else settings)
    if notes is not None:
        notes += said
    model.get_input_embeddings().register_forward_pre_hook(partial(_require_rows, path))
    source = getattr(model, "source", model)
    table = families().get(source.config.model_type)
    if table is not None and (learnt := table.module("positions")):
        source.get_submodule(learnt).register_forward_pre_hook(partial(_require_learnt, path))
    return model.to(device).eval()


def without_weights(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model that :func:`load_model` loads, on ``meta``: shapes, and how it computes.

    Args:
        path: A folder, or a GGUF file.
        dtype: Precision to run in.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(path), dtype=dtype).eval()
    weigh_chosen(model, path)
    return model


def _require_rows(path: Path, embedding: torch.nn.Embedding, args: tuple[torch.Tensor, ...]) -> None:
    """Before an embedding is asked: PyTorch says nothing that would help, and on a GPU stops for good."""
    ids = args[0]
    # A single token is the model's own, in all likelihood, and a GPU would be waited for.
    if ids.device.type == "cpu" or ids.shape[-1] > 1:
        require_rows(ids, embedding.weight.shape[0], path)


def _require_learnt(path: Path, positions: torch.nn.Embedding, args: tuple[torch.Tensor, ...]) -> None:
    """The same of positions that are learnt."""
    if args[0].device.type == "cpu" or args[0].shape[-1] > 1:
        require_positions(args[0], positions.weight.shape[0], path)


def _class_of(config: Any, trust_remote_code: bool) -> type:
    """transformers' class of a model, which takes tensors that are in memory; the one that finds it takes none."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code))


def _told(path: Path, dtype: torch.dtype, trust_remote_code: bool) -> dict[str, Any]:
    """What transformers is told of weights that it would not read so by itself.

    It dequantises a GGUF file. Those of a folder it gets dequantised: it would want the library that made them, and
    often a GPU. Of a multimodal model it gets the language model.
    """
    if not is_gguf(path):
        checkpoint = open_checkpoint(path)
        if checkpoint.quantization is None and not checkpoint.left_out and remote_of(path) is None:
            return told_config(path)
        tensors = {name: checkpoint.load(name).to(dtype) for name in checkpoint.names()}
        config = load_config(path, trust_remote_code=trust_remote_code)
        return {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    import transformers

    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise CheckpointError(
            "transformers loads a GGUF file with the accelerate package, which is not installed",
            code="LZ120",
            where="the accelerate package",
            fix="pip install 'latentize[gguf]'",
        ) from None
    # Before there was this setting everything was dequantised.
    setting = getattr(transformers, "GgufConfig", None)
    found = {} if setting is None else {"quantization_config": setting(dequantize=True)}
    return {"config": load_config(path), **found}
