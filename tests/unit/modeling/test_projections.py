"""What a projection multiplies with, whoever holds it: the right matrix with gradients, or a refusal with a code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tests.common import FP32, relative_error, run_python
from tests.mla import prompt, stock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import latentize
from latentize.attention.projections import affine, is_plain, matrix
from latentize.errors import LatentizeError

IN, OUT = 12, 20


class Int8(nn.Module):
    """Weight-only int8, as AWQ, GPTQ and bitsandbytes hold it: no matrix anywhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = nn.Buffer(weight.abs().amax(1, keepdim=True) / 127)
        self.packed = nn.Buffer((weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Stored(Tensor):
    """A tensor subclass, as torchao's: what lies there is not what a product sees."""

    def dequantize(self) -> Tensor:
        return 2 * self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = (args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


def _adapted(make: Callable[[], Any]) -> Callable[[nn.Linear], Any]:
    def wrap(linear: nn.Linear) -> Any:
        holder = nn.ModuleDict({"proj": linear})
        peft.inject_adapter_in_model(make(), holder)
        generator = torch.Generator().manual_seed(1)
        for parameter in holder.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        return holder["proj"].eval()

    return wrap


def _stored(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Stored), requires_grad=False)
    return linear


def _offloaded(linear: nn.Linear) -> nn.Linear:
    from accelerate import cpu_offload

    return cpu_offload(linear, execution_device=torch.device("cpu"))


def _hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda _, args, out: 2 * out)
    return linear


T = "proj"
WRAPPERS: dict[str, Callable[[nn.Linear], Any]] = {
    "plain": lambda linear: linear,
    "weight norm": lambda linear: parametrizations.weight_norm(linear),
    "int8 module": Int8,
    "tensor subclass": _stored,
    "offloaded": _offloaded,
    "forward hook": _hooked,
    "sequence of modules": lambda linear: nn.Sequential(linear, nn.Identity()),
    "lora": _adapted(lambda: peft.LoraConfig(r=4, target_modules=[T])),
    "dora": _adapted(lambda: peft.LoraConfig(r=4, target_modules=[T], use_dora=True)),
    "lora with a bias": _adapted(lambda: peft.LoraConfig(r=4, target_modules=[T], lora_bias=True)),
    "adalora": _adapted(lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=[T])),
    "ia3": _adapted(lambda: peft.IA3Config(target_modules=[T], feedforward_modules=[])),
    "ia3 of inputs": _adapted(lambda: peft.IA3Config(target_modules=[T], feedforward_modules=[T])),
    "loha": _adapted(lambda: peft.LoHaConfig(r=4, target_modules=[T])),
    "lokr": _adapted(lambda: peft.LoKrConfig(r=4, target_modules=[T])),
    "oft": _adapted(lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=[T])),
    "hra": _adapted(lambda: peft.HRAConfig(r=4, target_modules=[T])),
    "fourier": _adapted(lambda: peft.FourierFTConfig(n_frequency=50, target_modules=[T])),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_matrix_is_what_a_call_multiplies_with(name: str, bias: bool) -> None:
    if name == "lora with a bias" and not bias:
        pytest.skip("peft adds it to a bias that is there")
    torch.manual_seed(0)
    projection = WRAPPERS[name](nn.Linear(IN, OUT, bias=bias))
    x = torch.randn(2, 7, IN)
    expected = projection(x)
    weight, added = affine(projection, IN)
    assert type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    assert relative_error(F.linear(x, weight, added), expected) <= FP32
    assert torch.equal(matrix(projection, IN), weight)
    learning = [p for p in projection.parameters() if p.requires_grad and not p.is_meta]
    if not learning:
        return
    wanted = torch.autograd.grad(expected.square().sum(), learning, allow_unused=True)
    found = torch.autograd.grad(F.linear(x, weight, added).square().sum(), learning, allow_unused=True)
    for mine, its in zip(found, wanted, strict=True):
        assert (mine is None) == (its is None)
        assert its is None or relative_error(mine, its) <= 1e-4 or its.abs().max() < 1e-6


def test_a_plain_weight_is_not_copied() -> None:
    linear = nn.Linear(IN, OUT)
    assert is_plain(linear) and matrix(linear, IN) is linear.weight


def _refuses(message: str) -> Callable[..., Any]:
    def forward(x: Tensor) -> Tensor:
        raise ValueError(message)

    return forward


class Bent(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), 0.5)


class Fails(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise ValueError("no kernel for this")


class Pair(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


@pytest.mark.parametrize("kind", [Bent, Noisy, Fails, Pair])
def test_what_has_no_matrix_is_refused(kind: type[nn.Linear]) -> None:
    with pytest.raises(LatentizeError, match="LZ213") as refused:
        matrix(kind(IN, OUT), IN)
    assert kind.__name__ in refused.value.where


def test_changes_are_followed() -> None:
    """Training, switching off, another adapter, other weights."""
    layer = WRAPPERS["lora"](nn.Linear(IN, OUT))
    first = matrix(layer, IN).detach()
    layer.lora_B["default"].weight.data += 1
    assert relative_error(matrix(layer, IN), first) > 0.1
    layer.enable_adapters(False)
    assert torch.equal(matrix(layer, IN), layer.base_layer.weight)
    layer.enable_adapters(True)
    layer.base_layer.load_state_dict({n: torch.zeros_like(t) for n, t in layer.base_layer.state_dict().items()})
    assert torch.equal(matrix(layer, IN), layer.get_delta_weight("default"))
    layer.merge()
    assert torch.equal(matrix(layer, IN), layer.base_layer.weight)


def test_adapters_on_a_quantised_base() -> None:
    """A base without a matrix under low-rank updates."""
    layer = WRAPPERS["lora"](nn.Linear(IN, OUT))
    layer.base_layer = Int8(layer.base_layer)
    x = torch.randn(3, IN)
    assert relative_error(F.linear(x, *affine(layer, IN)), layer(x)) <= FP32


_DISTRIBUTED = """
import json, sys, copy, torch
import torch.distributed as dist
from tests.mla import prompt, stock
from torch.distributed.device_mesh import init_device_mesh
import latentize

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model = stock("deepseek_v3")
expected = model.generate(prompt(2), max_new_tokens=5, pad_token_id=0)
logits = model(prompt(2)).logits
if sys.argv[1] == "fsdp2":
    from torch.distributed.fsdp import fully_shard
    for layer in model.model.layers:
        fully_shard(layer.self_attn.kv_b_proj, mesh=mesh)
        fully_shard(layer, mesh=mesh)
elif sys.argv[1] == "fsdp1":
    from torch.distributed.fsdp import FullyShardedDataParallel
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = FullyShardedDataParallel(layer.self_attn.kv_b_proj, device_id=torch.device("cpu"))
else:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    plan = {f"model.layers.{n}.self_attn.kv_b_proj": ColwiseParallel() for n in range(2)}
    parallelize_module(model, mesh, plan)
latentize.accelerate(model)
with torch.no_grad():
    error = (model(prompt(2)).logits - logits).abs().max() / logits.abs().max()
    made = model.generate(prompt(2), max_new_tokens=5, pad_token_id=0)
print(json.dumps({"error": float(error), "same": torch.equal(made, expected)}))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "tensor-parallel"])
def test_weights_that_processes_share(kind: str, tmp_path: Any) -> None:
    done = run_python(_DISTRIBUTED, kind, tmp_path / "store")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["same"] and found["error"] <= FP32


def test_a_projection_that_cannot_be_read_is_refused_in_decode_and_called_in_prefill() -> None:
    model = stock("deepseek_v3")
    accelerated = latentize.accelerate(copy.deepcopy(model))
    for one in (model, accelerated):
        for layer in one.model.layers:
            layer.self_attn.kv_b_proj.__class__ = Bent
    with torch.no_grad():
        assert relative_error(accelerated(prompt()).logits, model(prompt()).logits) <= FP32
        with pytest.raises(LatentizeError, match="LZ213"):
            accelerated.generate(prompt(), max_new_tokens=3, pad_token_id=0)
