"""Models used, and handed to engines: ``generate``, ``verify`` and ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latentize.api.options import torch_dtype
from latentize.checkpoint import resolve
from latentize.errors import OptionError
from latentize.paths import expanded
from latentize.text.decoding import without_surrogates
from latentize.text.tokenizer import load_tokenizer

__all__ = ["export", "generate", "verify"]


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    cache: str | None = None,
    window: int | None = None,
    stream: bool = False,
) -> dict[str, Any]:
    """What ``latentize generate --json`` prints; with ``stream`` the text is printed as it comes.

    A model with latent attention is accelerated.

    Args:
        model: A folder, a GGUF file or a hub id.
        prompt: Text to continue.
        max_new_tokens: At most so many.
        temperature: 0 takes the most likely token.
        seed: For sampling.
        dtype: Precision to run in.
        device: Where.
        cache: ``LATENT[+ROPE]``, formats of :class:`LatentCache`.
        window: Keep the last so many tokens, and the first four.
        stream: Print the text as it comes.

    Raises:
        OptionError: a cache format or a window for a model that has no latents.
    """
    from latentize.modeling.generation import without_guesses
    from latentize.modeling.load import load_model
    from latentize.runtime.accelerate import accelerate, has_latents, no_latents
    from latentize.runtime.cache import LatentCache, cache_formats
    from latentize.runtime.generate import generate as run

    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    notes: list[str] = []
    loaded = load_model(folder, dtype=torch_dtype(dtype), device=device, notes=notes)
    text = without_surrogates(prompt)
    if text != prompt:
        notes.append("what is not UTF-8 in the prompt is read as U+FFFD")
    if window is not None:
        notes += without_guesses(loaded)
    streamer, beams = None, (loaded.generation_config.num_beams or 1) > 1
    if stream and not beams:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(seed)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "streamer": streamer}
    if has_latents(loaded):
        options["cache"] = LatentCache(accelerate(loaded).config, window=window, **cache_formats(cache))
    elif cache is not None or window is not None:
        raise no_latents("--cache, --window")
    result = vars(run(loaded, tokenizer, text, **options))
    if stream and beams:
        # Which beam is the likeliest is known in the end.
        print(text + result["text"])
    return {**result, "notes": notes}


def verify(
    out: str | Path,
    *,
    engine: str | None = None,
    folder: str | Path | None = None,
    kind: str = "f32",
    environment: str | Path | None = None,
    serve_on: str | None = None,
    **sizes: int,
) -> dict[str, Any]:
    """What ``latentize verify --json`` prints.

    Args:
        out: An output of latentize, or a GGUF file exported from one.
        engine: ``transformers``, ``llama.cpp`` or ``vllm``: compare what it computes with transformers in float32.
        folder: That a GGUF file was exported from.
        kind: Type of the GGUF file that is made for llama.cpp, where ``out`` is a folder.
        environment: The engine's virtual environment.
        serve_on: ``ENGINE`` or ``ENGINE@MACHINE``, as ``vllm@h100``: whether that would serve a model of these sizes
            (:func:`latentize.planning.serving.serving`).
        sizes: ``prompts``, ``prompt_tokens``, ``new_tokens`` of :func:`latentize.engines.compare.verify_engine`.

    Raises:
        CheckpointError: something is wrong with the output.
        EngineError: the engine is missing, stops, or computes something else; or it would refuse the sizes.
        OptionError: no such engine, machine or type; a GGUF file without ``folder``.
    """
    from latentize.evaluation.verify import TOLERANCE, require
    from latentize.evaluation.verify import verify as check

    path, checked, planned = expanded(out), {}, {}
    if serve_on is not None:
        from latentize.planning.serving import required_serving

        planned = required_serving(str(folder or path), serve_on)
    if path.is_file():
        from latentize.formats.gguf_check import check_gguf

        if folder is None:
            raise OptionError(
                "a GGUF file is compared with the folder it was made from", where="--folder", fix="give it"
            )
        checked = {"ok": True, **check_gguf(path, expanded(folder))}
    elif engine is None:
        verdict = check(path)
        require(verdict, path)
        found = {k: v for k, v in vars(verdict).items() if k != "problems"}
        return {"ok": verdict.ok, "tolerance": TOLERANCE, **found, **planned}
    if engine is None:
        return {**checked, **planned}
    from latentize.engines.compare import verify_engine

    options: dict[str, Any] = {
        "folder": folder and expanded(folder),
        "environment": environment and expanded(environment),
    }
    return {"ok": True, **checked, **planned, **verify_engine(engine, path, kind=kind, **{**options, **sizes})}


def export(
    model: str | Path, out: str | Path | None = None, *, to: str = "gguf", kind: str = "bf16", overwrite: bool = False
) -> dict[str, Any]:
    """Write a portable folder for another engine, read it back and compare: ``latentize export``.

    Args:
        model: A portable folder.
        out: The file; by default beside the folder, named after it and the type.
        to: ``gguf``.
        kind: ``f32``, ``bf16``, ``f16`` or ``q8_0``.
        overwrite: Replace a file that is there.

    Returns:
        What :func:`latentize.formats.gguf.write_gguf` says, with ``largest_error`` by type.

    Raises:
        FormatError: the folder is native, or has what the engine cannot hold, or the type damages it.
        OptionError: no such target or type; the ``gguf`` package is missing.
        OutputError: the file exists or cannot be written.
    """
    from latentize.formats.gguf import write_gguf
    from latentize.formats.gguf_check import check_gguf

    if to != "gguf":
        fix = "a portable folder needs no export" if to == "deepseek_v3" else "gguf"
        raise OptionError(f"nothing is exported to '{to}'", where="--to", fix=fix)
    folder = resolve(model)
    path = expanded(out) if out is not None else folder.absolute().with_name(f"{folder.absolute().name}-{kind}.gguf")
    result = write_gguf(folder, path, kind, overwrite=overwrite)
    return {**result, "largest_error": check_gguf(path, folder)["largest_error"]}
