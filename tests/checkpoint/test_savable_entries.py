"""Every way in refuses what cannot be saved: callback, command, and the reference's surface."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from callback_runs import Rows, build, make_trainer, pruning, train_arguments
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import Trainer

from hf_gradnas import GradNASPruner, nas
from hf_gradnas.checkpoint.savable import check_processor
from hf_gradnas.config.recipe import Recipe
from hf_gradnas.data.loading import open_source
from hf_gradnas.errors import CheckpointError, RecipeError, StructureError

pytestmark = [
    pytest.mark.leaves_state,  # the models are changed on purpose
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


class Broken:
    """A processor that cannot be saved."""

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError("not\nyet")

    def __call__(self, *args: Any) -> None:
        """Processors are called."""


def dense(model: Any, layer: int) -> Any:
    return model.bert.encoder.layer[layer].output.dense


def replace_head(model: Any) -> None:
    model.classifier, model.num_labels = nn.Linear(64, 5).double(), 5


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "head": (replace_head, r"classifier\.weight: has shape \[5, 64\].*\.config\.num_labels = 5"),
    "parametrised": (
        lambda m: parametrizations.weight_norm(dense(m, 0)),
        r"layer\.0\.output\.dense: its weight is made by",
    ),
    "tied": (
        lambda m: setattr(dense(m, 1), "weight", dense(m, 0).weight),
        r"layer\.0\.output\.dense\.weight and \S+layer\.1\.output\.dense\.weight: share",
    ),
    "hook": (
        lambda m: m.bert.pooler.register_forward_hook(doubled),
        r"the hook doubled on bert\.pooler",
    ),
}


# --- the callback ---------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["end", "begin", "gradual"])
@pytest.mark.parametrize("name", ["head", "tied"])
def test_a_training_does_not_begin(name: str, when: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    model = build()
    change(model)
    trainer = make_trainer(tmp_path, pruning(when=when), model=model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(StructureError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("name", ["parametrised", "hook"])
def test_a_cut_before_training_is_refused_too(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    model = build()
    change(model)
    callback = pruning(when="begin")
    trainer = make_trainer(tmp_path, callback, model=model)
    with pytest.raises(StructureError, match=message):
        callback.attach(trainer)
    assert callback.plan is None


def test_a_generation_config_that_cannot_be_saved_is_found_before_the_first_step(
    tmp_path: Path,
) -> None:
    model = build("llama")
    model.generation_config.temperature = 0.5
    args, data = train_arguments(tmp_path), Rows("llama")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[pruning()])
    with pytest.raises(CheckpointError, match="its generation_config cannot be saved"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_processor_that_cannot_be_saved_is_found_before_the_first_step(tmp_path: Path) -> None:
    args = train_arguments(tmp_path)
    trainer = Trainer(build(), args, train_dataset=Rows("bert"), callbacks=[pruning()])
    trainer.callback_handler.processing_class = Broken()
    message = r"Broken: cannot be saved beside the model \(NotImplementedError: not yet\); give a"
    with pytest.raises(CheckpointError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    check_processor(None)


def test_what_goes_wrong_while_training_is_told_before_the_cut(tmp_path: Path) -> None:
    callback = pruning(score="magnitude")
    trainer = make_trainer(tmp_path, callback, max_steps=1)
    trainer.model.register_forward_hook(lambda model, args, output: spoil(model))

    def spoil(model: Any) -> None:
        if model.training:
            model.bert.pooler.dense.bias.data.fill_(float("nan"))

    with pytest.raises(StructureError, match=r"bert\.\S+: holds NaN, needed are numbers"):
        trainer.train()
    assert callback.plan is None


# --- the pruner -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["added", "wrapped"])
def test_adapters_are_named_when_the_pruner_is_made(kind: str) -> None:
    model, config = build(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    if kind == "added":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    message = r"of PEFT .* merge them first \(merge_and_unload\).* peft\.PeftModel\.from_pretrain"
    with pytest.raises(StructureError, match=message):
        GradNASPruner(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_merged_adapters_are_gone() -> None:
    model, batch = zoo.build("bert")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    GradNASPruner(wrapped.merge_and_unload()).discover(batch)


# --- the reference's surface ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head", "parametrised", "tied"])
def test_convert_refuses_a_model_and_opens_no_space(name: str) -> None:
    change, message = CHANGES[name]
    model = build()
    change(model)
    attributes = set(vars(model))
    with pytest.raises(StructureError, match=message):
        nas.convert(model, "gradnas")
    assert set(vars(model)) == attributes


def test_a_search_refuses_what_a_load_would_not_compute() -> None:
    model, batch = zoo.build("bert")
    nas.convert(model, "gradnas")
    handle = model.bert.pooler.register_forward_hook(doubled)
    config = {"data_loader": [batch], "loss_func": lambda output, batch: output.loss}
    with pytest.raises(StructureError, match=CHANGES["hook"][1]):
        nas.search(model, {"flops": "80%"}, ({**batch},), config)
    handle.remove()


def test_convert_refuses_quantised_and_masked_modules() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(StructureError, match=r"1\.weight: holds numbers of kind int8"):
        nas.convert(net, "gradnas")


# --- the command ----------------------------------------------------------------------------------


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    adapter = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    message = (
        r"--model m: holds an adapter \(adapter_config\.json\), needed is a whole model.*"
        r"from_pretrained\('org/base'\), 'm'\)\.merge_and_unload\(\)"
    )
    with pytest.raises(RecipeError, match=message):
        open_source(Recipe(model="m"), str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("no json")
    with pytest.raises(RecipeError, match="its base model"):
        open_source(Recipe(model="m"), str(tmp_path))


def test_an_adapter_in_a_repository_is_no_model(monkeypatch: Any, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    monkeypatch.setattr("transformers.utils.cached_file", lambda *args, **kwargs: str(file))
    with pytest.raises(RecipeError, match="--model org/adapter: holds an adapter"):
        open_source(Recipe(model="org/adapter"), "org/adapter")
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="--model org/adapter: cannot be loaded"):
        open_source(Recipe(model="org/adapter"), "org/adapter")
