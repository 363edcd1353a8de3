"""Asks an engine's own code which sizes of latents its backends take.

    python tests/engine/shape_checks vllm|flashinfer|sglang < cases.json > answers.json

Run by the interpreter of that engine's environment (``scripts/engines.sh``); it imports nothing of latentize. A case
is a phase, a machine, the sizes of a rank, a cache's format and a precision. Its answer has for each backend ``null``
if the engine's code lets it pass, or the words of the refusal, and ``chosen``: the backend that the engine would take
by itself. Beside them is what engines hand to FlashInfer: ``hands``, the backend that vLLM names to its function for
decoding, and ``handed``, what that function says by backend. ``left_out`` says which conditions of which backend
(``PHASE/NAME``, or ``PHASE/*``) nobody can ask without a GPU or a compiled kernel, and why.

No condition of an engine is repeated here: its functions are called on a machine that pretends to be another.
"""

from __future__ import annotations

import json
import os
import sys

from ask_flashinfer import ask_flashinfer
from ask_sglang import ask_sglang
from ask_vllm import ask_vllm

ASK = {"vllm": ask_vllm, "flashinfer": ask_flashinfer, "sglang": ask_sglang}


def main(engine: str) -> None:
    cases = json.load(sys.stdin)
    # Engines log to standard output, compiled parts of them, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with answers:
        json.dump(ASK[engine](cases), answers)


if __name__ == "__main__":
    main(sys.argv[1])
