"""A checkpoint is told from another one by its files alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from hf_gradnas.checkpoint.fingerprints import (
    check_fingerprints,
    checkpoint_of,
    fingerprints_of,
    weight_files,
)
from hf_gradnas.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    model, _ = zoo.build("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def test_a_copy_has_the_same_fingerprints(folder, tmp_path):
    assert len(weight_files(folder)) > 2
    found = fingerprints_of(folder)
    assert set(found) == {"config", "weights"}
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    changed = {"_name_or_path": "elsewhere", **config, "transformers_version": "9.9.9"}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(changed, indent=7))
    assert fingerprints_of(tmp_path / "copy") == found
    check_fingerprints(tmp_path / "copy", found, "the plan")
    assert checkpoint_of("me/model", "main", folder=str(folder)) == {
        "model": "me/model",
        "revision": "main",
        **found,
    }


def test_other_weights_of_the_same_shapes_are_another_checkpoint(folder):
    found = fingerprints_of(folder)
    file = weight_files(folder)[0]
    save_file({name: value + 0.5 for name, value in load_file(file).items()}, file)
    wanted = {"model": "mine", **found}
    with pytest.raises(
        CheckpointError,
        match=r"another checkpoint \(made from mine\): the fingerprint of its weights",
    ):
        check_fingerprints(folder, wanted, "the plan")


def test_another_config_is_another_checkpoint(folder):
    found = fingerprints_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    with pytest.raises(CheckpointError, match=r"the fingerprint of its config\.json is"):
        check_fingerprints(folder, found, "the plan")


def test_shards_that_are_missing_or_truncated_are_named(folder):
    file = weight_files(folder)[1]
    content = file.read_bytes()
    for less in (b"", content[:4], content[:100]):
        file.write_bytes(less)
        with pytest.raises(CheckpointError, match=rf"{file.name}: cannot be read"):
            fingerprints_of(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name}: cannot be read"):
        fingerprints_of(folder)


def test_a_shard_without_its_last_tensors_is_told(folder):
    found = fingerprints_of(folder)
    file = weight_files(folder)[0]
    file.write_bytes(file.read_bytes()[:-8])
    assert fingerprints_of(folder)["weights"] != found["weights"]


def test_what_is_not_there_has_no_fingerprint(tmp_path):
    assert fingerprints_of(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert set(fingerprints_of(tmp_path)) == {"config"}
    with pytest.raises(CheckpointError, match="holds no weights in safetensors that can be read"):
        check_fingerprints(tmp_path, {"weights": "0" * 64}, "the plan")


def test_an_index_that_cannot_be_read_is_no_other_checkpoint(folder):
    found = fingerprints_of(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}')
    with pytest.raises(CheckpointError, match=r"holds no weights .*, or download the whole of it"):
        check_fingerprints(folder, found, "the plan")
