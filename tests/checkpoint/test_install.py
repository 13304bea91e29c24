"""Per-layer checkpoints load in fresh processes, by every route, and after being saved again."""

import copy
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import handmade
import pytest
import torch
import transformers
from places import SUPPORT
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_gradnas.checkpoint import install as installing
from hf_gradnas.checkpoint.install import install, install_when_imported
from hf_gradnas.surgery.cut import make_per_layer
from hf_gradnas.surgery.modeling_gradnas import is_per_layer, resize

SCRIPT = SUPPORT / "loading_process.py"
FORKED = SUPPORT / "forked.py"


def run(*arguments, folder, isolated=False):
    """Run Python in a new process that has its own cache for remote code."""
    command = [sys.executable, *(["-I"] if isolated else [])]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def save_all(root):
    for name in ("bert", "gpt2", "llama", "phi3", "t5"):
        cut, inputs = handmade.build(name, dtype=torch.float32)
        model = copy.deepcopy(cut.model)
        resize(model, cut.record, rows=cut.rows, new_tensors=cut.new_tensors)
        make_per_layer(model, cut.record).save_pretrained(root / name)
        with torch.no_grad():
            expected = {**inputs, "logits": model(**inputs).logits}
        save_file(expected, root / name / "expected.safetensors")


@pytest.mark.long
def test_every_route_in_fresh_processes_and_again_after_training(tmp_path):
    first = tmp_path / "first"
    save_all(first)
    for weights in first.glob("*/model.safetensors"):
        with safe_open(weights, "pt") as file:
            assert all(0 not in file.get_slice(key).get_shape() for key in file.keys())  # noqa: SIM118
    steps = (
        [SCRIPT, "shim", first],
        ["alone", SCRIPT, "before", first, tmp_path / "first-shim"],
        [SCRIPT, "after", tmp_path / "first-before", tmp_path / "first-shim-before"],
        [SCRIPT, "shim", tmp_path / "first-before-after"],
    )
    line = [word for step in steps for word in ("--", *step)][1:]
    run(FORKED, *line, folder=tmp_path, isolated=True)


def test_importing_the_module_is_light():
    code = (
        "import sys, hf_gradnas.checkpoint.install as m; m.install_when_imported();"
        "m.install_when_imported();"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules);"
        "assert sum('_After' in str(f) for f in sys.meta_path) == 2"
    )
    run("-c", code, folder=Path.cwd())


def test_only_a_config_with_a_record_is_touched():
    install()
    patched = vars(PreTrainedModel)["__new__"]
    install()
    install_when_imported()
    assert vars(PreTrainedModel)["__new__"] is patched
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    for model in (transformers.BertModel(config), transformers.BertModel(config=config)):
        assert type(model) is transformers.BertModel
        assert type(copy.deepcopy(model)) is transformers.BertModel
    config.gradnas = {"format_version": 1, "architecture": "BertModel"}
    for model in (transformers.BertModel(config), transformers.BertModel(config=config)):
        assert is_per_layer(type(model))
        assert type(copy.deepcopy(model)) is type(model)
    read = vars(transformers.PreTrainedConfig)["from_dict"]
    install()
    install_when_imported()
    assert vars(transformers.PreTrainedConfig)["from_dict"] is read
    with pytest.raises(TypeError, match="should be an instance of class"):
        transformers.BertModel("bert-base-uncased")


SIZES = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2}
OWN = {"01": {"num_attention_heads": 1, "intermediate_size": 8}, "11": {"intermediate_size": 0}}


@pytest.mark.parametrize("is_inner", [False, True])
def test_a_config_with_a_record_is_made_without_reading_one_value_for_all_layers(
    is_inner, tmp_path, monkeypatch
):
    install()
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, text: said.append(text))
    values = {**SIZES, "per_layer_config": OWN, "allow_global_per_layer_attribute_access": True}
    whole = transformers.LlavaConfig(text_config=values) if is_inner else None
    config = whole or transformers.LlamaConfig(**values)
    for record in ({}, {"gradnas": {"format_version": 1}}):
        vars(config).update(record)
        config.save_pretrained(tmp_path)
        said.clear()
        loaded = type(config).from_pretrained(tmp_path)
        assert any("Reading global config value" in text for text in said) is not bool(record)
        text = loaded.text_config if is_inner else loaded
        assert text.per_layer_attributes == {"num_attention_heads", "intermediate_size"}
        assert [text.per_layer_config[layer].intermediate_size for layer in (1, 11)] == [8, 0]
        assert loaded.to_dict()["gradnas" if record else "model_type"]


def test_a_new_of_another_base_is_called():
    seen = []

    class Base:
        def __new__(cls, *args, **kwargs):
            seen.append((args, kwargs))
            return super().__new__(cls)

    class Model(transformers.BertModel, Base):
        pass

    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    Model(config, add_pooling_layer=False)
    assert seen == [((config,), {"add_pooling_layer": False})]


def test_models_in_other_threads_are_not_under_construction():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.gradnas = {"format_version": 1, "architecture": "BertModel"}
    made = []

    class Slow(transformers.BertModel):
        def __init__(self, config):
            thread = threading.Thread(
                target=lambda: made.append(transformers.BertModel(copy.deepcopy(config)))
            )
            thread.start()
            thread.join()
            super().__init__(config)

    model = Slow(config)
    assert is_per_layer(type(model))
    assert is_per_layer(type(made[0]))


def test_the_finder_leaves_other_modules_and_loaders_alone(monkeypatch):
    finder = installing._After(installing.MODELING, install)
    assert finder.find_spec("json", None) is None
    path = list(transformers.__path__)
    spec = finder.find_spec(installing.MODELING, path)
    assert spec is not None
    assert "exec_module" in vars(spec.loader)
    assert spec.origin == importlib.util.find_spec(installing.MODELING).origin
    monkeypatch.setattr(sys, "meta_path", [])
    assert finder.find_spec(installing.MODELING, path) is None
