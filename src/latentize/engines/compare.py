"""Does an engine compute what transformers computes in float32?

letters: T tokens of a prompt, V vocabulary, S tokens that continue it
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentize.engines.run import Answers, engine_python, run_engine
from latentize.errors import EngineError, OptionError
from latentize.formats.gguf import write_gguf
from latentize.formats.gguf_check import check_gguf, read_gguf
from latentize.formats.gguf_types import TYPES
from latentize.modeling.load import load_model
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

__all__ = ["Agreement", "Reference", "compare", "reference", "verify_engine"]

# Largest KL, nats per token, by what is rounded. That of q8_0 only tells a wrong file from a right one.
KL_LIMITS = {"float32": 1e-6, "f32": 1e-6, "f16": 1e-6, "bf16": 1e-4, "q8_0": 1e-1}
# Where float32 is all that there is, log-probabilities are held together one by one.
LOGPROB_LIMIT = 1e-4
# Texts that tokenizers are compared on, and characters of each.
_TEXTS, _CHARS = 16, 2000


@dataclass(frozen=True)
class Reference:
    """What transformers computes in float32.

    Attributes:
        prompts_PT: Token ids.
        logprobs_PTV: Of each token of a prompt.
        greedy: For each prompt the tokens that continue it.
        steps_PSV: The log-probabilities that those were chosen from.
    """

    prompts_PT: Tensor
    logprobs_PTV: Tensor
    greedy: list[list[int]]
    steps_PSV: Tensor


@torch.no_grad()
def reference(model: Any, prompts_PT: Tensor, new_tokens: int) -> Reference:
    """Log-probabilities of the prompts, and greedy continuations; float64 from float32 logits."""
    logprobs, greedy, steps = [], [], []
    for ids_T in prompts_PT:
        out = model(input_ids=ids_T[None], use_cache=True)
        logprobs.append(out.logits[0].double().log_softmax(-1))
        last_V, cache = logprobs[-1][-1], out.past_key_values
        chosen, rows = [], []
        for _ in range(new_tokens):
            rows.append(last_V)
            chosen.append(int(last_V.argmax()))
            out = model(input_ids=torch.tensor([[chosen[-1]]]), past_key_values=cache, use_cache=True)
            last_V, cache = out.logits[0, -1].double().log_softmax(-1), out.past_key_values
        greedy.append(chosen)
        steps.append(torch.stack(rows))
    return Reference(prompts_PT, torch.stack(logprobs), greedy, torch.stack(steps))


@dataclass(frozen=True)
class Agreement:
    """How far an engine is from the reference.

    Attributes:
        kl: Mean over positions, nats.
        largest_logprob_error: Of the tokens that the reference gives more than a millionth.
        top1_agreement: Share of positions.
        greedy_identical: Prompts that are continued by the same tokens.
        greedy_margin: How much less likely, in nats, the reference finds the token at which an engine first departs;
            the largest over prompts. Less than the rounding is a tie.
        perplexity: Of the prompts, as the engine predicts them.
        reference_perplexity: As the reference does.
    """

    kl: float
    largest_logprob_error: float
    top1_agreement: float
    greedy_identical: int
    greedy_margin: float
    perplexity: float
    reference_perplexity: float


def compare(expected: Reference, answers: Answers) -> Agreement:
    """Hold an engine's answers against the reference."""
    kl, largest, same, nll, expected_nll = [], 0.0, [], [], []
    for ids_T, wanted_TV, logits in zip(expected.prompts_PT, expected.logprobs_PTV, answers.logits_TV, strict=True):
        got_TV = torch.from_numpy(logits).double()
        known = got_TV.isfinite().all(-1)
        got_TV, wanted_TV, following_T = got_TV[known].log_softmax(-1), wanted_TV[known], ids_T.roll(-1)[known]
        difference_TV = wanted_TV - got_TV
        kl.append((wanted_TV.exp() * difference_TV).sum(-1))
        largest = max(largest, float(difference_TV.abs()[wanted_TV > -13.8].max()))
        same.append(wanted_TV.argmax(-1) == got_TV.argmax(-1))
        inside = slice(0, len(ids_T) - 1)  # nothing follows the last token
        nll.append(-got_TV.gather(1, following_T[:, None])[inside, 0])
        expected_nll.append(-wanted_TV.gather(1, following_T[:, None])[inside, 0])
    margins = [
        _margin(wanted, got, steps_SV)
        for wanted, got, steps_SV in zip(expected.greedy, answers.greedy, expected.steps_PSV, strict=True)
    ]
    return Agreement(
        kl=float(torch.cat(kl).mean()),
        largest_logprob_error=largest,
        top1_agreement=float(torch.cat(same).double().mean()),
        greedy_identical=sum(a == b for a, b in zip(expected.greedy, answers.greedy, strict=True)),
        greedy_margin=max(margins),
        perplexity=float(torch.cat(nll).mean().exp()),
        reference_perplexity=float(torch.cat(expected_nll).mean().exp()),
    )


def _margin(wanted: list[int], got: list[int], steps_SV: Tensor) -> float:
    for a, b, row_V in zip(wanted, got, steps_SV, strict=True):
        if a != b:
            return float(row_V[a] - row_V[b])
    return 0.0


def _file_type(path: Path) -> str:
    """The ``--type`` that a GGUF file was exported as."""
    field = read_gguf(path).fields.get("general.file_type")
    number = None if field is None else int(field.contents())
    return next((name for name, (_, code) in TYPES.items() if code == number), "unknown")


def _texts() -> list[str]:
    # One that has what the standard library seldom has.
    unusual = "Ünïcode ½ 三 12345 \t\t  x\n\n\n  's 'LL don't  e.g.\u00a0\u2028 🦙🦙 -- ==> <|x|> \r\n end "
    return [text[:_CHARS] for text in islice(documents((), "heldout"), _TEXTS)] + [unusual]


def verify_engine(
    engine: str,
    model: Path,
    *,
    folder: Path | None = None,
    kind: str = "f32",
    environment: Path | None = None,
    prompts: int = 10,
    prompt_tokens: int = 48,
    new_tokens: int = 64,
) -> dict[str, Any]:
    """Run an engine and compare it with transformers in float32.

    Args:
        engine: ``transformers``, ``llama.cpp`` or ``vllm``.
        model: A folder; or a GGUF file, for llama.cpp.
        folder: That such a file was made from.
        kind: Type of the GGUF file that is made for the purpose, where ``model`` is a folder.
        environment: Virtual environment with the engine.
        prompts: How many, of the Python standard library's held-out text.
        prompt_tokens: Of each.
        new_tokens: Greedy ones that follow each.

    Returns:
        ``engine``, ``versions``, ``settings``, ``type``, ``prompts``, ``prompt_tokens``, ``new_tokens``, what
        :class:`Agreement` has, ``kl_limit``, ``texts_cut_alike`` (of ``texts``; ``None`` if the engine cuts none),
        ``seconds``.

    Raises:
        OptionError: there is no such engine, or it cannot run such a model.
        EngineError: the engine is missing, stops, or computes something else.
    """
    started = time.time()
    engine_python(engine, environment)
    is_file = model.is_file()
    if is_file and engine != "llama.cpp":
        raise OptionError(f"{engine} does not run GGUF files here", where="--engine", fix="give the folder")
    source = folder if is_file else model
    if source is None:
        raise OptionError("nothing to compare the file with", where="--folder", fix="give the folder it was made from")
    tokenizer, texts = load_tokenizer(source), _texts()
    drawn = pack(tokenizer, documents((), "heldout"), tokens=prompts * prompt_tokens, sequence_length=prompt_tokens)
    expected = reference(load_model(source), drawn, new_tokens)
    options: dict[str, Any] = {"new_tokens": new_tokens, "texts": texts, "environment": environment}
    with tempfile.TemporaryDirectory(prefix="latentize-gguf-") as made:
        if is_file:
            kind = _file_type(model)
        elif engine == "llama.cpp":
            model = Path(made) / "model.gguf"
            write_gguf(source, model, kind)
            check_gguf(model, source)
        else:
            kind = "float32"
        answers = run_engine(engine, model, drawn.tolist(), **options)
    agreement = compare(expected, answers)
    alike = None
    if answers.tokens is not None:
        wanted = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        alike = sum(a == b for a, b in zip(wanted, answers.tokens, strict=True))
    result = {
        "engine": engine,
        "versions": answers.versions,
        "settings": answers.settings,
        "type": kind,
        "prompts": len(drawn),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        **vars(agreement),
        "kl_limit": KL_LIMITS.get(kind),
        "texts": len(texts),
        "texts_cut_alike": alike,
        "seconds": round(time.time() - started, 1),
    }
    if problems := _problems(agreement, result):
        raise EngineError(
            f"{engine} does not compute what transformers does: " + "; ".join(problems),
            where=str(model if is_file else source),
            fix="docs/engines.md says which settings each engine needs",
        )
    return result


def _problems(found: Agreement, result: dict[str, Any]) -> list[str]:
    problems, limit = [], result["kl_limit"]
    if limit is not None and not found.kl <= limit:
        problems.append(f"KL {found.kl:.1e} nats a token, allowed are {limit:.0e}")
    exact = result["type"] == "float32"
    if exact and not found.largest_logprob_error <= LOGPROB_LIMIT:
        problems.append(
            f"log-probabilities differ by {found.largest_logprob_error:.1e}, allowed are {LOGPROB_LIMIT:.0e}"
        )
    # Where two tokens are as likely as rounding can tell, either may be chosen.
    if found.greedy_margin > 2 * found.largest_logprob_error:
        problems.append(f"greedy tokens depart where the other is {found.greedy_margin:.1e} nats more likely")
    if result["texts_cut_alike"] is not None and result["texts_cut_alike"] < result["texts"]:
        problems.append(
            f"{result['texts'] - result['texts_cut_alike']} of {result['texts']} texts are cut into other tokens"
        )
    return problems
