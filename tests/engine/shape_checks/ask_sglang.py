"""SGLang's own way to a backend."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

from pretending import COMPILED, Answer, Case, LaunchError, LeftOut, capability, refusal, stand_in


def ask_sglang(cases: Sequence[Case]) -> Answer:
    """How it resolves its arguments for a model in DeepSeek's format, and what refuses a backend there."""
    # Kernels are defined with it and not called. PyTorch, which would look closer, has to find that it is missing.
    importlib.import_module("torch._inductor.runtime.triton_heuristics")
    stand_in("triton")
    overrides = importlib.import_module("sglang.srt.arg_groups.overrides")
    # Both are for other models, and need builds of their own. After transformers, which looks for one of them.
    importlib.import_module("transformers.image_utils")
    stand_in("torchvision", "sgl_kernel")
    sglang = _SGLang(overrides)
    return {"version": _sglang_version(), "left_out": sglang.left_out, "cases": [sglang.on(case) for case in cases]}


def _sglang_version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return str(importlib.import_module("sglang.version").__version__)


_SIZES = ["kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "row", "qk", "heads"]


class _SGLang:
    left_out: ClassVar[LeftOut] = {
        "decode/*": {"conditions": [*_SIZES, "dtypes"], "why": "SGLang looks at no size: FlashInfer does, or a kernel"},
        "prefill/*": {"conditions": [*_SIZES, "dtypes", "caches"], "why": "as with decode"},
        "decode/fa3": {"conditions": [*_SIZES, "dtypes", "caches"], "why": COMPILED},
        "decode/trtllm_mla": {
            "conditions": ["hardware", "caches"],
            "why": "SGLang lets it pass on sm120 and with any cache in the model's precision, and FlashInfer does not",
        },
        "prefill/trtllm_mla": {"conditions": ["hardware"], "why": "SGLang lets it pass on sm120, FlashInfer does not"},
        "decode/flashmla": {"conditions": ["all"], "why": "SGLang checks nothing in Python; " + COMPILED},
        "decode/flashinfer": {"conditions": ["all"], "why": "SGLang checks nothing; FlashInfer is asked by itself"},
        "decode/triton": {"conditions": ["all"], "why": "SGLang checks nothing in Python"},
        "prefill/triton": {"conditions": ["all"], "why": "SGLang checks nothing in Python"},
        "decode/intel_amx": {"conditions": ["caches", "dtypes"], "why": COMPILED},
    }

    def __init__(self, overrides: Any) -> None:
        load = importlib.import_module
        self.overrides, self.context = overrides, load("sglang.srt.runtime_context")
        self.deepseek = load("sglang.srt.arg_groups.model_overrides.deepseek_v2")
        self.platform, self.common = load("sglang.srt.arg_groups.platform_hook"), load("sglang.srt.utils.common")
        self.registry = load("sglang.srt.layers.attention.attention_registry")

    @contextlib.contextmanager
    def pretending(self, machine: str) -> Iterator[None]:
        """SGLang's own way to say which machine it is on; the registry asks the driver itself."""
        major, minor = capability(machine)
        facts = {
            "is_sm90": major == 9,
            "is_hopper_with_cuda_12_3": major == 9,
            "is_sm100": major == 10,
            "is_sm120": major == 12,
            "is_blackwell": major in (10, 12),
            "is_cuda": True,
        }
        with (
            self.context.override_platform(**facts),
            mock.patch.object(self.registry, "get_device_capability", return_value=(major, minor)),
        ):
            yield

    @staticmethod
    def arguments(case: Case, backend: str | None) -> SimpleNamespace:
        """As given on the command line, as far as anybody asks."""
        return SimpleNamespace(
            attention_backend=backend,
            prefill_attention_backend=None,
            decode_attention_backend=None,
            kv_cache_dtype="fp8_e4m3" if case["cache"] == "fp8" else "auto",
            enable_prefill_cp=False,
            device="cpu" if case["machine"] == "cpu" else "cuda",
        )

    def on(self, case: Case) -> Answer:
        if case["machine"] == "cpu":
            arguments = self.arguments(case, None)
            self.platform.handle_cpu_backends(arguments)
            chosen = self.overrides.resolving_view(arguments).attention_backend
            return {"backends": {chosen: None}, "chosen": chosen}
        with self.pretending(case["machine"]):
            answers = {
                "trtllm_mla": refusal(lambda: self.check("trtllm_mla", case)),
                "fa3": refusal(self.flash_attention),
            }
            return {"backends": answers, "chosen": self.chosen(case)}

    def check(self, backend: str, case: Case) -> None:
        self.overrides._mla_kv_cache_dtype_checks(self.arguments(case, backend))

    def flash_attention(self) -> None:
        # The module of the backend imports kernels; what the registry asserts comes before.
        name = "sglang.srt.layers.attention.flashattention_backend"
        made = SimpleNamespace(FlashAttentionBackend=mock.Mock(side_effect=LaunchError))
        with mock.patch.dict(sys.modules, {name: made}):
            self.registry.create_flashattention_v3_backend(SimpleNamespace(use_mla_backend=True))

    def chosen(self, case: Case) -> str:
        arguments = self.arguments(case, None)
        config = SimpleNamespace(architectures=["DeepseekV3ForCausalLM"])
        declared = self.deepseek._deepseek_family_overrides(arguments, config)
        model = SimpleNamespace(hf_config=config)
        default = self.overrides.get_default_attn_backend(arguments, True, model)
        return str(declared.get("attention_backend") or default)
