"""FlashInfer's checks of a plan, and of what its functions are handed."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from pretending import COMPILED, DTYPES, FP8, Answer, Case, LaunchError, LeftOut, refusal, row_of, stand_in

# Of a multiprocessor, and of a block that asks for it, in KiB: CUDA C++ Programming Guide, compute capabilities.
SHARED_MEMORY = {80: (164, 163), 86: (100, 99), 89: (100, 99), 90: (228, 227), 100: (228, 227), 120: (100, 99)}
PAGE = 64


def ask_flashinfer(cases: Sequence[Case]) -> Answer:
    """What its backends check of a plan before a kernel is built, and its functions before a kernel is launched."""
    importlib.import_module("flashinfer")
    # Kernels in CuTe DSL are defined in NVIDIA's package, of which here only the names of precisions count. After
    # FlashInfer itself, which imports far more of it where it is installed.
    stand_in("cutlass", "cuda")
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
        "prefill/trtllm-ragged": {"conditions": ["dtypes"], "why": COMPILED},
        "prefill/fmha_v2": {"conditions": ["dtypes"], "why": COMPILED},
        "prefill/fa3": {"conditions": ["dtypes"], "why": COMPILED},
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
        handed = {name: refusal(functools.partial(self.function, name, case, device)) for name in ("auto", "cute-dsl")}
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
            raise LaunchError

        stored = FP8 if case["cache"] == "fp8" else DTYPES[case["dtype"]]
        with (
            mock.patch.object(self.of["trtllm"], "get_trtllm_gen_fmha_module", side_effect=LaunchError),
            mock.patch("flashinfer.cute_dsl.attention.mla_dispatch._resolve_impl", compile_cute),
        ):
            self.core.trtllm_batch_decode_with_kv_cache_mla(
                query=there(1, 1, case["heads"], row_of(case), dtype=stored),
                kv_cache=there(2, PAGE, row_of(case), dtype=stored),
                workspace_buffer=there(1, dtype=torch.int8),
                qk_nope_head_dim=case["qk_nope_head_dim"],
                kv_lora_rank=case["kv_lora_rank"],
                qk_rope_head_dim=case["qk_rope_head_dim"],
                block_tables=there(1, 2, dtype=torch.int32),
                seq_lens=there(1, dtype=torch.int32),
                max_seq_len=2 * PAGE,
                out=there(1, 1, case["heads"], case["kv_lora_rank"], dtype=torch.bfloat16),
                backend=backend,
            )

    def decodes(self, case: Case, device: torch.device) -> dict[str, str | None]:
        args = self.plan(case, device)
        return {
            "trtllm-gen": refusal(lambda: self.trtllm._validate_plan_arguments_before_metadata(args)),
            "cute-dsl": refusal(lambda: self.cute(args)),
            "cutlass": refusal(lambda: self.cutlass(args)),
            "xqa": refusal(lambda: self.xqa(args, device)),
            "fa3": refusal(lambda: self.fa("fa3", case, device)),
            "fa2": refusal(lambda: self.fa("fa2", case, device)),
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
            page_size=PAGE,
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
        values = {"qo_indptr": [0, 1], "kv_indptr": [0, 1], "kv_indices": [0], "kv_len_arr": [PAGE]}
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
            "fmha_v2": refusal(lambda: self.fmha_v2(case, device)),
            # Nothing is before it but a GPU.
            "fa2": None,
        }
        if device.index == 100:
            # What it needs is looked at when its kernels are fetched, and not here.
            answers["trtllm-ragged"] = refusal(lambda: self.ragged(case, device))
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
        with mock.patch.object(self.prefill, "get_trtllm_gen_fmha_module", side_effect=LaunchError):
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
        with mock.patch.object(self.prefill, "get_trtllm_fmha_v2_sm120_module", side_effect=LaunchError):
            self.prefill.fmha_v2_prefill_deepseek(
                **self.tensors(case, device, 1, 1), num_heads=case["heads"], head_dim=qk, seq_len=1, scale_softmax=1.0
            )
