"""Damaged and contradictory checkpoints are refused, by file and tensor, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.models import pico

from latentize.errors import CheckpointError, ConfigError, LatentizeError, UnsupportedModelError
from latentize.families.opening import open_source

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reader")
    return {
        "single": pico(folder, name="single"),
        "sharded": pico(folder, name="sharded", shard="60KB"),
        "tied": pico(folder, name="tied", tie_word_embeddings=True),
    }


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A picomodel to damage."""
    return lambda kind: Path(shutil.copytree(saved[kind], tmp_path / kind))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path), metadata={"format": "pt"})


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the safetensors header, leaving the data as it is."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_all(folder: Path) -> None:
    """Open, and read all that conversion would."""
    checkpoint, spec = open_source(folder)
    for name in spec.tensor_shapes():
        checkpoint.load(name)


def refused(folder: Path, *words: str, error: type[LatentizeError] = CheckpointError) -> LatentizeError:
    """Reading fails with an error that says where, and mentions ``words``."""
    with pytest.raises(error) as caught:
        read_all(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.where
    return caught.value


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
def test_a_whole_checkpoint_opens_and_reads_as_saved(saved: dict[str, Path], kind: str) -> None:
    checkpoint, spec = open_source(saved[kind])
    stored = {name: t for path in shards(saved[kind]) for name, t in load_file(str(path)).items()}
    assert set(checkpoint.names()) == set(stored) == set(spec.tensor_shapes())
    assert (len(checkpoint.files) > 2) == (kind == "sharded")
    for name, tensor in stored.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.load(name), tensor)
        some = [len(tensor) - 1, 0, 1, 1]
        assert torch.equal(checkpoint.load_rows(name, some), tensor[some])
    assert "no.such.tensor" not in checkpoint
    with pytest.raises(CheckpointError, match=r"no\.such\.tensor"):
        checkpoint.load("no.such.tensor")


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("keep", [0, 4, 8, 600, -1])
def test_a_truncated_file(copy: Callable[[str], Path], kind: str, keep: int) -> None:
    path = shards(copy(kind))[-1]
    path.write_bytes(path.read_bytes()[:keep])
    refused(path.parent, "truncated", path.name)


def test_a_git_lfs_pointer(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    shards(folder)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n")
    assert "git lfs pull" in refused(folder, "LFS").fix


@pytest.mark.parametrize("length", [101_000_000, 2**63 - 1])
def test_a_header_that_claims_to_be_huge(copy: Callable[[str], Path], length: int) -> None:
    path = shards(copy("single"))[0]
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(path.parent, path.name)


def test_a_header_that_is_not_json(copy: Callable[[str], Path]) -> None:
    path = shards(copy("single"))[0]
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"#" + raw[9:])
    refused(path.parent, "header", path.name)


def test_an_index_that_names_a_missing_shard(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    gone = shards(folder)[1]
    gone.unlink()
    refused(folder, "shard is missing", gone.name)


def test_a_shard_with_a_tensor_that_the_index_does_not_name(copy: Callable[[str], Path]) -> None:
    path = shards(copy("sharded"))[0]
    edit_tensors(path, lambda t: t.update({"model.extra": torch.zeros(2)}))
    refused(path.parent, "model.extra", path.name)


def test_a_shard_without_a_tensor_that_the_index_promises(copy: Callable[[str], Path]) -> None:
    path = shards(copy("sharded"))[0]
    name = next(iter(load_file(str(path))))
    edit_tensors(path, lambda t: t.pop(name))
    refused(path.parent, name, path.name)


def test_a_tensor_in_two_shards(copy: Callable[[str], Path]) -> None:
    """The index can name only one of the two."""
    folder = copy("sharded")
    first, second = shards(folder)[:2]
    name = next(iter(load_file(str(first))))
    edit_tensors(second, lambda t: t.update({name: torch.zeros(2)}))
    refused(folder, name)


@pytest.mark.parametrize("target", ["../other.safetensors", "/etc/hostname", "sub/model.safetensors", ".."])
def test_a_shard_outside_the_folder(copy: Callable[[str], Path], target: str) -> None:
    folder = copy("sharded")
    shutil.copy(shards(folder)[0], folder.parent / "other.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(shards(folder)[0], folder / "sub" / "model.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({LAYER: target}))
    refused(folder, "missing" if target == ".." else "outside the folder")


def test_a_shard_that_is_a_link_out_of_the_folder(copy: Callable[[str], Path]) -> None:
    """Links inside a hub cache are how it works; one to anywhere else is not followed silently."""
    folder = copy("single")
    real = shards(folder)[0]
    elsewhere = folder.parent / "elsewhere.safetensors"
    real.rename(elsewhere)
    real.symlink_to(elsewhere)
    refused(folder, real.name)


def test_an_index_without_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    (folder / INDEX).write_text("{}")
    refused(folder, "index", INDEX)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00\xff"])
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_json_that_is_damaged(copy: Callable[[str], Path], name: str, text: str) -> None:
    folder = copy("sharded")
    (folder / name).write_bytes(text.encode("latin-1"))
    refused(folder, name, error=ConfigError if name == "config.json" else CheckpointError)


def test_no_config(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    (folder / "config.json").unlink()
    refused(folder, "config.json", error=ConfigError)


def test_pickles_only(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    shards(folder)[0].rename(folder / "pytorch_model.bin")
    refused(folder, "pickles", "pytorch_model.bin")


def test_no_weights_at_all(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    shards(folder)[0].unlink()
    refused(folder, "no safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number(copy: Callable[[str], Path], value: float) -> None:
    path = shards(copy("single"))[0]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAYER][3, 5] = value

    edit_tensors(path, spoil)
    refused(path.parent, "NaN", LAYER)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 128},
        {"num_key_value_heads": 4},
        {"vocab_size": 300},
        {"head_dim": 32},
        {"intermediate_size": 64},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_shape_that_the_config_does_not_imply(copy: Callable[[str], Path], change: dict[str, int]) -> None:
    folder = copy("single")
    edit_json(folder / "config.json", lambda config: config.update(change))
    refused(folder, "config.json implies")


def test_fewer_layers_than_the_config_says(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=3))
    refused(folder, "says 3 layers, the files have 2")


def test_more_layers_than_the_config_says(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=1))
    refused(folder, "says 1 layers, the files have 2")


@pytest.mark.parametrize("name", [LAYER, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor(copy: Callable[[str], Path], name: str) -> None:
    path = shards(copy("single"))[0]
    edit_tensors(path, lambda t: t.pop(name))
    refused(path.parent, "missing", name)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"])
def test_a_tensor_that_the_family_does_not_have(copy: Callable[[str], Path], name: str) -> None:
    """A bias that the config does not announce would be lost without a word."""
    path = shards(copy("single"))[0]
    edit_tensors(path, lambda t: t.update({name: torch.zeros(64)}))
    refused(path.parent, name)


def test_a_stored_rope_table_is_no_obstacle(copy: Callable[[str], Path]) -> None:
    path = shards(copy("single"))[0]
    edit_tensors(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    checkpoint, spec = open_source(path.parent)
    assert set(checkpoint.names()) == set(spec.tensor_shapes())


def test_a_tied_model_with_another_head(copy: Callable[[str], Path]) -> None:
    path = shards(copy("tied"))[0]
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(path.parent, "tie_word_embeddings", error=ConfigError)


def test_a_tied_model_that_stores_its_head_twice(copy: Callable[[str], Path]) -> None:
    path = shards(copy("tied"))[0]
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_source(path.parent)[1].tied


def test_an_untied_flag_without_a_head(copy: Callable[[str], Path]) -> None:
    folder = copy("tied")
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    refused(folder, "missing", "lm_head.weight")


def test_quantised_weights(copy: Callable[[str], Path]) -> None:
    path = shards(copy("single"))[0]
    edit_tensors(path, lambda t: t.update({LAYER: t[LAYER].to(torch.float8_e4m3fn)}))
    assert "unquantised" in refused(path.parent, "F8_E4M3", LAYER).fix


def test_an_announced_quantisation(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "quip"}))
    refused(folder, "quantization_config", error=UnsupportedModelError)


def test_an_announced_quantisation_of_nothing(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "awq"}))
    refused(folder, "said to be quantised (awq), and none is", "quantization_config")


def test_an_adapter_is_not_a_model(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    shards(folder)[0].rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "base model" in refused(folder, "adapter").fix


MUTATIONS = st.sampled_from(["dtype", "shape", "data_offsets"])
VALUES = st.sampled_from(
    [
        None,
        -1,
        0,
        2**70,
        "F16",
        "I4",
        [],
        {},
        [0],
        ["a", "b"],
        [-2, -32],
        [0.5, 128],
        [10, 0],
        [0, 2**70],
        True,
        [[1], 2],
    ]
)


@given(field=MUTATIONS, value=VALUES, which=st.integers(0, 20))
def test_a_mutated_header_entry_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, saved: dict[str, Path], field: str, value: Any, which: int
) -> None:
    """Whatever stands in the header: it reads, or it is a CheckpointError."""
    folder = tmp_path_factory.mktemp("mutated")
    shutil.copy(saved["single"] / "config.json", folder)
    shutil.copy(shards(saved["single"])[0], folder)

    def change(header: dict[str, Any]) -> None:
        names = sorted(n for n in header if n != "__metadata__")
        header[names[which % len(names)]][field] = value

    edit_header(shards(folder)[0], change)
    with pytest.raises(CheckpointError):
        read_all(folder)


@pytest.mark.parametrize("header", [[], "text", 3, None, {"a": 1}, {"a": None}], ids=repr)
def test_a_header_of_another_kind(copy: Callable[[str], Path], header: Any) -> None:
    path = shards(copy("single"))[0]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    refused(path.parent)


@pytest.mark.parametrize("weight_map", [[], "text", {"a": 3}, {"a": None}, {"a": ["x"]}], ids=repr)
def test_an_index_of_another_kind(copy: Callable[[str], Path], weight_map: Any) -> None:
    folder = copy("sharded")
    edit_json(folder / INDEX, lambda index: index.update(weight_map=weight_map))
    refused(folder)


def test_tensors_that_overlap_in_the_file(copy: Callable[[str], Path]) -> None:
    """Each entry for itself is fine; together they are not."""
    path = shards(copy("single"))[0]

    def overlap(header: dict[str, Any]) -> None:
        one, other = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
        header[one]["data_offsets"] = header[other]["data_offsets"]

    edit_header(path, overlap)
    refused(path.parent, path.name)


def test_an_adapter_beside_the_weights_is_refused(copy: Callable[[str], Path]) -> None:
    """transformers would apply it."""
    folder = copy("single")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    assert refused(folder, "beside the weights", "adapter_config.json").code == "LZ115"
