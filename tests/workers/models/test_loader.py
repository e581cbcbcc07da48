"""Checkpoints in every form that they come in, and damaged ones."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workers.models.config import CheckpointError
from workers.models.loader import load_model

HEAD, EMBEDDING = "lm_head.weight", "transformer.word_embeddings.weight"


@pytest.fixture
def folder(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, copy)
    return copy


@pytest.fixture
def state(tiny_checkpoint) -> dict[str, torch.Tensor]:
    return load_file(tiny_checkpoint / "model.safetensors")


def write_shards(folder: Path, state: dict[str, torch.Tensor], suffix: str) -> None:
    """Two files and an index, instead of the one file."""
    (folder / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        name = f"{stem}-{number:05d}-of-00002.{suffix}"
        tensors = {key: state[key] for key in part}
        if suffix == "bin":
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_loads_exactly(folder: Path, state: dict[str, torch.Tensor]) -> None:
    model = load_model(folder)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


def test_one_safetensors_file_loads(folder, state):
    assert_loads_exactly(folder, state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_several_files_with_an_index_load(folder, state, suffix):
    write_shards(folder, state, suffix)
    assert_loads_exactly(folder, state)


def test_a_bin_file_loads(folder, state):
    (folder / "model.safetensors").unlink()
    ignored = {"transformer.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
    torch.save({**state, **ignored}, folder / "pytorch_model.bin")
    assert_loads_exactly(folder, state)


def test_weights_are_cast_to_the_dtype_that_is_asked_for(folder, state):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, state[HEAD].bfloat16())


def test_the_heads_tensor_wins_over_a_different_embedding(folder, state):
    save_file({**state, EMBEDDING: state[HEAD] + 1}, folder / "model.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(model.lm_head.weight, state[HEAD])


@pytest.mark.parametrize("absent", [HEAD, EMBEDDING])
def test_either_of_the_two_tied_tensors_is_enough(folder, state, absent):
    del state[absent]
    save_file(state, folder / "model.safetensors")
    model = load_model(folder)
    assert torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight)


def test_untied_tensors_stay_apart(folder, state):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": False}))
    state[EMBEDDING] = state[HEAD] + 1
    save_file(state, folder / "model.safetensors")
    assert_loads_exactly(folder, state)
    del state[EMBEDDING]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=EMBEDDING):
        load_model(folder)


def test_a_missing_tensor_is_named(folder, state):
    name = "transformer.layers.1.mlp.dense_4h_to_h.bias"
    del state[name]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


def test_a_tensor_of_a_wrong_shape_is_named(folder, state):
    name = "transformer.layers.1.mlp.dense_4h_to_h.bias"
    state[name] = torch.zeros(7)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}.*\[7\].*\[64\]"):
        load_model(folder)


def test_a_folder_without_weights_says_what_it_lacks(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_model(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_missing_shard_is_named(folder, state, suffix):
    write_shards(folder, state, suffix)
    victim = next(folder.glob(f"*-00002-of-00002.{suffix}"))
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        load_model(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_cannot_lead_out_of_the_folder(folder, state, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {HEAD: name}}))
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        load_model(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "x"])
def test_an_index_that_is_none_is_refused(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(folder)


def test_a_truncated_file_is_named(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(folder)


class Payload:
    """What a hostile pickle carries."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bin_file_executes_nothing(folder, tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({HEAD: Payload()}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_model(folder)
    assert not (tmp_path / "executed").exists()


def test_loading_does_not_import_torch_s_compiler(tiny_checkpoint: Path) -> None:
    # Half of the time that an engine needs to start again was spent on it.
    program = (
        "import sys; from workers.models.loader import load_model; "
        "load_model(sys.argv[1]); sys.exit('torch._dynamo' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program, str(tiny_checkpoint)], cwd=root, check=True, timeout=60)
