"""Proof that a checkpoint is read as transformers reads it, before anything is made of it.

A config entry of another precedence, a shard that was left behind, a head in another order: such a mistake would be in
the source as we see it and in what is made of it alike, and no number that compares the two would show it. So a short
text goes through transformers' own model, layer by layer. Each layer is filled with weights that the safetensors
library reads from the files that ``from_pretrained`` opens, and what it does is compared with what is known of the
source: tensors with tensors bit by bit, numbers with numbers, and the attention, written out
(:mod:`latentize.attention.grouped`), with that of the layer.

T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentize.attention.grouped import grouped_attention
from latentize.checkpoint.opening import load_config, loading, pretrained
from latentize.checkpoint.streaming import remote_of
from latentize.families import LatentModel
from latentize.modeling.body import body_of
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.source import SourceModel
from latentize.modeling.turning import check_turning, differs, near
from latentize.progress import Progress, silent
from latentize.text.tokens import Passages

__all__ = ["PROVED_TOKENS", "TOLERANCE", "prove"]

# Tokens of the text.
PROVED_TOKENS = 48
# Largest error of a token that is allowed, relative to what a layer adds to it; and where layers multiply in bfloat16.
TOLERANCE, _ROUGH = 1e-3, 5e-2
# Share of a token's size that an error is compared with at least: more is not left of a difference in float32.
_SHARE = 1e-3
_ROWS_AT_ONCE = 16_384


@torch.no_grad()
def prove(
    source: SourceModel, tokens_T: Tensor, *, trust_remote_code: bool = False, progress: Progress = silent
) -> float:
    """Compare every layer, the embedding and the head with transformers'.

    One layer is in memory at a time, twice, and the embedding as it is stored.

    Args:
        source: The model as it will be converted.
        tokens_T: A short text.
        trust_remote_code: Whether code of the checkpoint may be run.
        progress: Told after each layer.

    Returns:
        The largest relative error of a token that was seen.

    Raises:
        CheckpointError: something is read otherwise than transformers reads it.
    """
    proof = _Proof(source, trust_remote_code, progress)
    try:
        return proof.run(tokens_T.cpu())
    finally:
        proof.release()


class _Proof:
    """A text on its way through both."""

    def __init__(self, source: SourceModel, trust_remote_code: bool, progress: Progress) -> None:
        self.source, self.progress, self.error = source, progress, 0.0
        self.tolerance = _ROUGH if source.precision.everything else TOLERANCE
        config = load_config(source.checkpoint.path, trust_remote_code=trust_remote_code)
        config._attn_implementation = "eager" if source.spec.additive_masks else "sdpa"
        self.files: list[Path] = []
        self.layers: Iterator[SourceLayer] = source.layers()
        self.top: Any = self._top(config, trust_remote_code)

    def _top(self, config: Any, trust_remote_code: bool) -> Any:
        """transformers' model with all that is around the layers, as ``from_pretrained`` fills it."""
        from transformers import AutoModelForCausalLM

        spec, checkpoint = self.source.spec, self.source.checkpoint
        layers, config.num_hidden_layers = config.num_hidden_layers, 0
        trust = {"trust_remote_code": trust_remote_code}
        if checkpoint.quantization is None and not checkpoint.left_out and remote_of(checkpoint.path) is None:
            named: dict[str, Any] = {**pretrained(checkpoint.path), **trust}
            with loading(checkpoint.path), _files_that_are_opened(self.files), _without_threads(), _quietly():
                top = AutoModelForCausalLM.from_pretrained(config=config, dtype="auto", **named)
        else:
            # Reading quantised weights for it would dequantise all of them; and of a larger model it wants all of it.
            there = checkpoint.quantization is None and remote_of(checkpoint.path) is None
            self.files = list(checkpoint.files) if there else []
            top = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **trust)
            for role in ("embedding", "positions", "norm", "head"):
                if spec.module(role):
                    self._fill(top, role)
        top.config.num_hidden_layers = layers
        if hasattr(body_of(top), "first_kv_shared_layer_idx"):
            # Gemma 4 counts, when it is made, from where on layers would share a cache. None of these do.
            body_of(top).first_kv_shared_layer_idx = layers
        skeleton = self.source.skeleton_layers()
        watched = nn.ModuleList(_Watched(layer, self._layer(index)) for index, layer in enumerate(skeleton))
        setattr(body_of(top), spec.module("layers"), watched)
        assert spec.layers == layers
        return top.eval()

    def _fill(self, top: Any, role: str) -> None:
        name = self.source.spec.module(role)
        if role == "head" and self.source.spec.tied:
            top.get_output_embeddings().weight = top.get_input_embeddings().weight
            return
        module = {"embedding": top.get_input_embeddings, "head": top.get_output_embeddings}.get(role)
        found = module() if module else top.get_submodule(name)
        for part, _ in list(found.named_parameters()):
            setattr(found, part, nn.Parameter(self.source.checkpoint.load(f"{name}.{part}"), requires_grad=False))

    def run(self, tokens_T: Tensor) -> float:
        checkpoint, spec, top = self.source.checkpoint, self.source.spec, self.top
        # First of all: it says so where a token has no row.
        self.entering_BTD = self.source.embed(Passages.contiguous(tokens_T[None])).hidden_NTD.cpu()
        self._check_files()
        used, which_T = tokens_T.unique(return_inverse=True)
        embedding, head = top.get_input_embeddings(), top.get_output_embeddings()
        name = spec.module("embedding") + ".weight"
        head_name = spec.module("head") + ".weight"
        self._check_table(embedding.weight, name)
        self._check_table(head.weight, head_name if head_name in checkpoint else name)
        if learnt := spec.module("positions"):
            self._check_table(top.get_submodule(learnt).float().weight, learnt + ".weight")
        rows, head_rows = embedding.weight[used].float(), head.weight[used].float()
        embedding.weight, embedding.padding_idx = nn.Parameter(rows, requires_grad=False), None
        head.weight = nn.Parameter(head_rows, requires_grad=False)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias[used].float(), requires_grad=False)
        norm = top.get_submodule(spec.module("norm")).float()
        if not isinstance(spec, LatentModel):
            check_turning(spec, body_of(top), f"{checkpoint.config_path}, rope_parameters")
        final: list[Tensor] = []
        norm.register_forward_pre_hook(lambda _, args: final.append(args[0]))
        theirs_TV = top(input_ids=which_T[None], use_cache=False).logits[0]
        # Both tables are large; of transformers' only these rows are left.
        ours_TV = self.source.head()(final[0][0])[:, used]
        self._compare(ours_TV, theirs_TV, theirs_TV, "what the model predicts", "output head, final norm")
        return self.error

    def release(self) -> None:
        """Let go of layers and tables, which know each other."""
        self.top, self.layers = None, iter(())

    def _check_files(self) -> None:
        """Weights come from the files that transformers opens."""
        checkpoint = self.source.checkpoint
        ours = {path.resolve() for path in checkpoint.files}
        if self.files and ours != {path.resolve() for path in self.files}:
            odd = sorted(ours.symmetric_difference(path.resolve() for path in self.files))[0]
            raise differs("the choice of files", str(odd))

    def _check_table(self, theirs_VD: Tensor, name: str) -> None:
        checkpoint, count = self.source.checkpoint, len(theirs_VD)
        if checkpoint.shape(name) != tuple(theirs_VD.shape):
            raise differs(f"the shape of '{name}'", checkpoint.where(name))
        # Some of its models empty the row of padding when they are loaded, which is nothing that is read.
        said = getattr(self.top.config, "pad_token_id", None)
        padding = said if isinstance(said, int) and 0 <= said < count and not theirs_VD[said].any() else -1
        for start in range(0, count, _ROWS_AT_ONCE):
            rows = range(start, min(start + _ROWS_AT_ONCE, count))
            # Where files mix precisions, transformers loads all in one.
            ours_VD = checkpoint.load_rows(name, rows).to(theirs_VD.dtype)
            if padding in rows:
                ours_VD[padding - start] = 0
            if not torch.equal(ours_VD, theirs_VD[rows.start : rows.stop]):
                raise differs(f"'{name}'", checkpoint.where(name))

    def _layer(self, index: int) -> Callable[..., Any]:
        """What stands for a layer in transformers' model: the layer itself, once, under watch."""

        def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            ours = next(self.layers)
            hidden_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if index == 0:
                self._compare(self.entering_BTD, hidden_BTD, hidden_BTD, "what enters the first layer", "embedding")
            theirs = self._filled(layer, ours)
            out = theirs(*args, **kwargs)
            made_BTD = out[0] if isinstance(out, tuple) else out
            self._check_numbers(theirs, ours)
            if ours.spec is not None:
                self._check_attention(theirs, ours, hidden_BTD, lambda: theirs(*args, **kwargs))
            stream = self._stream(hidden_BTD)
            ours.run(stream)
            self._compare(stream.hidden_NTD, made_BTD, made_BTD - hidden_BTD, "what the layer adds", f"layer {index}")
            self.progress("proving what was read", index + 1, self.source.spec.layers)
            return out

        return run

    def _stream(self, hidden_BTD: Tensor) -> Stream:
        positions_NT = torch.arange(hidden_BTD.shape[1])[None]
        return Stream(hidden_BTD.clone().to(self.source.device), positions_NT.to(self.source.device))

    def _filled(self, layer: nn.Module, ours: SourceLayer) -> nn.Module:
        """transformers' layer with the weights that are in its files, in float32."""
        checkpoint, spec = self.source.checkpoint, self.source.spec
        prefix = spec.layer_prefix(ours.index)
        if self.files:
            names = [n for n in checkpoint.names() if n.startswith(prefix) and "rotary_emb" not in n]
            stored = _tensors(self.files, {checkpoint.stored_as(n): n.removeprefix(prefix) for n in names})
            found = self.source.module_tensors(stored, ours.index)
            # A layer that is written as it was stored is held as it was stored.
            same = ours.tensors.keys() == found.keys()
            held = ours.tensors if same else self.source.module_tensors(ours.tensors, ours.index)
            for name, tensor in found.items():
                if name not in held or not torch.equal(tensor, held[name].cpu()):
                    raise differs(f"'{prefix}{name}'", str(checkpoint.path))
        else:
            # What is dequantised here is read by nobody else.
            found = self.source.module_tensors(ours.tensors, ours.index)
        filled = copy.deepcopy(layer)
        filled.load_state_dict({n: t.to("cpu", torch.float32) for n, t in found.items()}, strict=True, assign=True)
        return filled.requires_grad_(False)

    def _check_numbers(self, theirs: nn.Module, ours: SourceLayer) -> None:
        """Epsilons, and the factor on logits."""
        spec, where = self.source.spec, f"{self.source.checkpoint.config_path}, layer {ours.index}"
        if isinstance(spec, LatentModel):
            # What its layers do is not written again: they run as transformers' own, numbers and all.
            return
        for name, module in theirs.named_modules():
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if eps is not None and _is_norm(name) and not near(eps, spec.norm_eps):
                raise differs(f"the epsilon of '{name}'", where)
        if ours.spec is not None:
            scale = getattr(getattr(theirs, spec.module("attention")), "scaling", None)
            # What RoPE multiplies queries and keys with is not in it.
            if scale is not None and not near(scale * ours.spec.logit_factor, ours.spec.softmax_scale):
                raise differs("the factor on attention's logits", where)

    def _check_attention(
        self, theirs: nn.Module, ours: SourceLayer, hidden_BTD: Tensor, again: Callable[[], Any]
    ) -> None:
        """The attention that will be converted, written out, against what the layer adds without its MLP."""
        assert ours.spec is not None and ours.weights is not None
        name = self.source.spec.module("attention")
        others = [m for n, m in theirs.named_children() if n != name and not _is_norm(n) and "dropout" not in n]
        hooks = [module.register_forward_hook(_nothing) for module in others]
        out = again()
        for hook in hooks:
            hook.remove()
        # Gemma 4's layers multiply all that leaves them.
        after_BTD = (out[0] if isinstance(out, tuple) else out) / getattr(theirs, "layer_scalar", 1.0)
        made_BTD = after_BTD - hidden_BTD
        device = self.source.device
        x_BTD = ours.normalise(hidden_BTD.to(device)).float()
        ours_BTD = ours.added(grouped_attention(x_BTD, ours.weights, ours.spec)).cpu()
        self._compare(
            hidden_BTD + ours_BTD,
            hidden_BTD + made_BTD,
            made_BTD,
            "the attention",
            f"layer {ours.index}",
            tolerance=TOLERANCE,
        )

    def _compare(
        self,
        ours: Tensor,
        theirs: Tensor,
        change: Tensor,
        what: str,
        where: str,
        *,
        tolerance: float | None = None,
    ) -> None:
        """Largest error of a token relative to what was added to it."""
        size = change.norm(dim=-1) + _SHARE * theirs.norm(dim=-1)
        found = float(((ours.cpu() - theirs).norm(dim=-1) / size.clamp_min(1e-30)).max())
        if not found <= (tolerance or self.tolerance):
            raise differs(f"{what} (relative error {found:.1e})", f"{self.source.checkpoint.path}, {where}")
        self.error = max(self.error, found)


def _is_norm(name: str) -> bool:
    """By what transformers calls them."""
    return "norm" in name or name.rpartition(".")[2].startswith("ln_")


class _Watched(nn.Module):
    """Stands for a layer in transformers' model; what the model asks of the layer, the layer answers."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        # Not a child: it holds no memory.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_run", run)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._layer, *args, **kwargs)


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    """In the place of an output: zeros."""
    if isinstance(output, tuple):
        return tuple(torch.zeros_like(part) if isinstance(part, Tensor) else part for part in output)
    return torch.zeros_like(output)


def _tensors(files: Sequence[Path], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Some tensors; of one that is in several files the last counts, as for transformers.

    Args:
        files: Where they are.
        names: What files call them → what they are called here.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {names[name]: file.get_tensor(name) for name in names.keys() & set(file.keys())}
    return found


@contextlib.contextmanager
def _files_that_are_opened(files: list[Path]) -> Iterator[None]:
    """Notes which files of weights transformers opens meanwhile, in order."""
    from transformers import modeling_utils as module

    # No public function says which.
    modeling_utils: Any = module
    original = modeling_utils.safe_open

    def noting(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path) not in files:
            files.append(Path(path))
        return original(path, *args, **kwargs)

    modeling_utils.safe_open = noting
    try:
        yield
    finally:
        modeling_utils.safe_open = original


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """transformers loads on this thread alone: each of its four would keep address space for a heap of its own."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings that the layers' weights are not used."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
