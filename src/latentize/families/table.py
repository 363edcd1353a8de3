"""A family is a table: which tensors it has, of which shapes, and what its attention does.

Tables are JSON files in ``tables/``. One may say what it ``extends``, and then only what differs, as a JSON merge patch
(RFC 7396): ``null`` takes an entry away. Unknown keys are refused, so that a typo cannot pass as a default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from latentize.errors import ConfigError

__all__ = ["MODULES", "PLUGINS", "Experts", "Table", "families", "register_family"]

_ATTENTION_KEYS = {
    "qkv_bias",
    "o_bias",
    "qk_norm",
    "qk_norm_across",
    "norm_after_rope",
    "v_norm",
    "gated",
    "sinks",
    "growth",
    "chunk",
    "sliding_window",
    "sliding_window_switch",
    "softmax_scale",
    "softmax_scalar",
    "softcap",
    "interleaved",
    "partial",
    "unrotated",
    "transposed",
    "rope_of",
    "rope_by_kind",
    "rope_renamed",
    "rope_types",
    "rope_alpha",
    "rotary",
    "heads_fill",
    "heads_divide",
    "another_with",
    "rope_theta_key",
    "rope_partial_key",
    "rotary_size_key",
    "head_dim",
    "kv_heads",
    "global_sizes",
    "ends_full",
}
_MULTIPLIERS = {"embedding", "residual", "logits", "logits_times"}
# Where things are, under the names that most families use.
MODULES = {
    "attention": "self_attn",
    "input_norm": "input_layernorm",
    "post_norm": "",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "qkv_proj": "qkv_proj",
    "query_key_value": "query_key_value",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "embedding": "model.embed_tokens",
    "positions": "",
    "norm": "model.norm",
    "head": "lm_head",
    "layers": "layers",
}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP. Checkpoints hold experts one by one, transformers stacks them.

    Attributes:
        count: Config keys, of which one says how many there are.
        intermediate, chosen: Config keys: their width, how many a token goes through.
        tensors: Tensor of an expert, with ``{expert}`` → symbolic shape, where ``moe`` is their width.
        stacked: Tensor of transformers' module → those that it is made of; those with ``{expert}`` are joined along
            their rows, then stacked over experts, others are renamed.
        other_tensors: As ``tensors``, once a layer (the router).
        dense_tensors: MLP of the layers that have no experts.
        every, except_layers, dense: Config keys: every so many layers has experts, but for these, and the first ones.
        listed: Config key of the layers that have some, where it says so.
        shared: Config key: so many experts, side by side, that every token goes through.
        when: Config key of whether there are any at all.
        normalised: Where they are chosen by a softmax over all of them, as DeepSeek-V2's are (arXiv 2405.04434, section
            2.1.2): whether weights of the chosen ones are made to sum to one, or the config key of that.
        deepseek: Whether they are DeepSeek-V3's, under its names: chosen by sigmoid, with a bias that only chooses, in
            groups, beside shared ones (arXiv 2412.19437, section 2.1.2).
    """

    count: Sequence[str]
    intermediate: str
    chosen: str
    tensors: Mapping[str, tuple[str, ...]]
    stacked: Mapping[str, Sequence[str]]
    other_tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dense_tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    every: str = ""
    except_layers: str = ""
    dense: str = ""
    listed: str = ""
    shared: str = ""
    when: str = ""
    deepseek: bool = False
    normalised: bool | str | None = None

    def in_one(self) -> dict[str, tuple[str, ...]]:
        """Tensors of all experts of a layer together, as ``stacked`` makes them, and their symbolic shapes."""
        found = {}
        for name, parts in self.stacked.items():
            if "{expert}" in parts[0]:
                shapes = [self.tensors[part] for part in parts]
                found[name] = ("experts", "+".join(rows for rows, _ in shapes), shapes[0][1])
        return found

    def in_layer(self, layer: int, config: Mapping[str, Any]) -> bool:
        """Whether a layer has experts."""
        if self.listed and config.get(self.listed) is not None:
            return layer in config[self.listed]
        step = int(config.get(self.every) or 1) if self.every else 1
        first = int(config.get(self.dense) or 0) if self.dense else 0
        return layer >= first and (layer + 1) % step == 0 and layer not in (config.get(self.except_layers) or ())


@dataclass(frozen=True)
class Table:
    """The declarative description of one architecture.

    Attributes:
        model_type: As in ``config.json``.
        architectures: Class names of ``config.json`` that are meant.
        about: One line for users.
        fields: What a config of the family has, as transformers' class of it: name → type and default. Entries that are
            none of these are ignored.
        without_effect: Those of the fields that the architecture does not depend on, whatever they are.
        config_defaults: Defaults of a family without ``fields``, all of whose entries are read.
        aliases: Other name that transformers takes for a field → the field.
        only_with: Config key → the value that it has to have, or a list of those that it may have.
        implied: The same for entries that older configs had, and transformers has a place of its own for now.
        attention: Feature → config key that switches it, or a constant. Those that are not self-evident:
            ``softmax_scalar`` is a number whose ``-1/2``-th power scales logits; ``interleaved`` says how pairs lie in
            a head, ``partial`` that RoPE may cover a part of it; ``unrotated`` has the config keys of a ``list`` of 1
            and 0 for each layer, 0 where nothing rotates, and of a number that stands for one, ``every`` so many
            layers, or the key that makes it all converted layers ``with`` a value, or is ``"all"``; ``transposed`` says
            that projections are stored inputs first; ``rope_of`` is the kind of layer whose entry of
            ``rope_parameters`` counts, ``rope_by_kind`` that there are no entries but by kind; ``rope_types`` are those
            that RoPE may have, ``rope_renamed`` what transformers makes of some; ``rope_theta_key`` and
            ``rope_partial_key`` are what it is called beside ``rope_parameters``, ``rotary_size_key`` the size that
            older configs state instead of a share, ``rope_alpha`` that a "dynamic" one with an ``alpha`` is a larger
            base; ``head_dim`` is ``"stated"`` (and may not be null), ``"required"`` (nor missing), ``"optional"`` where
            null stands for none, ``"true"`` where zero does, too, ``"derived"`` where it is the heads' share of the
            hidden size whatever is stated; ``heads_fill`` says that the heads together have to be the hidden size,
            ``heads_divide`` that it has to be a multiple of their number; ``kv_heads`` is ``"all"`` where every query
            head has its own, ``"stated"`` where it may not be null; ``rotary`` is ``"own"`` where the attention counts
            what rotates by itself; ``growth`` says that queries grow by entries of RoPE, or has the config keys of a
            ``factor`` and a ``length``, ``when`` another is true, for the tokens of a text, counted from one; ``chunk``
            says that the window is a chunk's; ``another_with`` has keys that make it another architecture;
            ``global_sizes`` are sizes that layers of full attention have of their own → the config keys of these. Those
            of the other layers are called ``kept_`` and their name then; ``ends_full`` says that the last layer is of
            full attention, whatever is stated.
        top_tensors: Tensor → symbolic shape, outside the layers.
        ignored_tensors: Regular expressions: what transformers ignores in files, as it is derived.
        renamed_tensors: Part of a name that transformers reads, too → the part that the tables here have.
        layer_prefix: With ``{layer}``.
        layer_tensors: Tensor of a layer, without prefix → symbolic shape.
        optional_layer_tensors: The same with ``{"shape": …, "when": config key}``.
        multipliers: Config keys of factors: ``embedding`` on what enters the first layer, ``residual`` on what each
            block adds, ``logits`` that logits are divided by, ``logits_times`` that they are multiplied with. A number
            or ``sqrt(key)`` stands for itself.
        logit_softcap: Config key of what output logits are bent below.
        modules: Where things are called otherwise than in Llama; see ``MODULES``.
        norm_eps: Config key of the norms' epsilon.
        norm_offset: What is added to the weights of norms (1 in Gemma).
        intermediate: Config key of the MLP's width.
        intermediate_times: Hidden sizes that the MLP is wide where the config does not say; 0 where it has to.
        layer_kinds: Kind of layer other than ``full_attention`` → the rule by which layers are of it where the config
            does not say: ``"all"``, ``{"from": config key}``, ``{"except_every": number or config key}``,
            ``"unrotated"``, ``"rotated"``. They stay as they are.
        kept_tensors: Such a kind → its tensors in the place of attention's, where it has other ones.
        sizes: Name of a size in symbolic shapes → the config key, or keys joined by ``*``, that it is.
        experts: See :class:`Experts`.
        further_layers: Whether files have layers beyond the model's, which predict several tokens at once: transformers
            does not run them, and they are left out.
        native_only: What no format but the native one can hold, in words.
    """

    model_type: str
    architectures: tuple[str, ...]
    about: str
    attention: Mapping[str, Any]
    top_tensors: Mapping[str, tuple[str, ...]]
    layer_prefix: str
    layer_tensors: Mapping[str, tuple[str, ...]]
    optional_layer_tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fields: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    without_effect: Sequence[str] = ()
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    only_with: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    multipliers: Mapping[str, Any] = field(default_factory=dict)
    logit_softcap: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    ignored_tensors: Sequence[str] = ()
    renamed_tensors: Mapping[str, str] = field(default_factory=dict)
    norm_eps: str = "rms_norm_eps"
    norm_offset: float = 0.0
    intermediate: str = "intermediate_size"
    intermediate_times: int = 0
    layer_kinds: Mapping[str, Any] = field(default_factory=dict)
    kept_tensors: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    experts: Experts | None = None
    further_layers: bool = False
    native_only: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Table:
        """Build a table, refusing keys that no field or feature is called by; ``extends`` names one that ships."""
        where = f"table '{entries.get('model_type')}'"
        entries = _whole(entries, where)
        _complete(cls, entries, where, "a family table")
        nested = {"attention": _ATTENTION_KEYS, "multipliers": _MULTIPLIERS, "modules": set(MODULES)}
        unknown = set(entries) - {f.name for f in fields(cls)}
        unknown |= {f"{name}.{k}" for name, known in nested.items() for k in set(entries.get(name, {})) - known}
        experts = entries.get("experts")
        if experts is not None:
            _complete(Experts, experts, where, "experts of a family table")
            unknown |= {f"experts.{k}" for k in set(experts) - {f.name for f in fields(Experts)}}
        if unknown:
            raise ConfigError(
                f"unknown key in a family table: {', '.join(sorted(unknown))}",
                where=where,
            )
        made = {"architectures": tuple(entries["architectures"]), "native_only": tuple(entries.get("native_only", ()))}
        return cls(**{**entries, **made, "experts": None if experts is None else Experts(**experts)})

    def module(self, role: str) -> str:
        """What plays a role is called; see ``MODULES``."""
        return self.modules.get(role, MODULES[role])


def _whole(entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Entries with those of the tables that they extend."""
    rest = {key: value for key, value in entries.items() if key != "extends"}
    name = entries.get("extends")
    if name is None:
        return rest
    if name not in _shipped():
        known = ", ".join(sorted(_shipped()))
        raise ConfigError(f"a family table extends '{name}', which does not ship", where=where, fix=f"one of {known}")
    return _patched(_whole(_shipped()[name], where), rest)


def _patched(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON merge patch, applied."""
    made = dict(base)
    for key, value in patch.items():
        before = made.pop(key, None) if value is None else made.get(key)
        if value is not None:
            made[key] = _patched(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return made


@lru_cache
def _shipped() -> dict[str, dict[str, Any]]:
    """Entries of the tables that ship, as they are in their files, by ``model_type``."""
    folder = resources.files("latentize.families") / "tables"
    read = [json.loads(file.read_text()) for file in folder.iterdir() if file.name.endswith(".json")]
    return {entries["model_type"]: entries for entries in read}


def _complete(kind: type, entries: Mapping[str, Any], where: str, what: str) -> None:
    required = {f.name for f in fields(kind) if f.default_factory is MISSING and f.default is MISSING}
    if missing := sorted(required - set(entries)):
        raise ConfigError(f"{what} lacks {', '.join(missing)}", where=where)


_REGISTERED: dict[str, Table] = {}
# Entry points of installed packages; each is, or returns, a table's entries or the path of its file.
PLUGINS = "latentize.families"


def register_family(table: Mapping[str, Any] | Path) -> Table:
    """Make a family known to this process; it may replace one of the same name.

    Args:
        table: The entries of a table, or a JSON file with them.

    Raises:
        ConfigError: a key that no field is called by, or a file that is not JSON.
    """
    if isinstance(table, Path):
        try:
            table = json.loads(table.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"not a family table: {error}", where=str(table)) from error
    made = Table.from_dict(table)  # type: ignore[arg-type]
    _REGISTERED[made.model_type] = made
    return made


@lru_cache
def _installed() -> dict[str, Table]:
    tables = [Table.from_dict(entries) for entries in _shipped().values()]
    for plugin in metadata.entry_points(group=PLUGINS):
        found = plugin.load()
        found = found() if callable(found) else found
        tables.append(Table.from_dict(json.loads(found.read_text()) if isinstance(found, Path) else found))
    return {t.model_type: t for t in tables}


def families() -> dict[str, Table]:
    """All known tables by ``model_type``, in alphabetical order."""
    return dict(sorted({**_installed(), **_REGISTERED}.items()))
