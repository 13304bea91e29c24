"""What is refused before the first step: data without labels or end, adapters, two of anything."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_runs import Rows, batch_of, build, make_trainer, numel, pruning, train_arguments
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_gradnas import GradNASCallback
from hf_gradnas.callback.told import Clock
from hf_gradnas.config.limits import Rule
from hf_gradnas.errors import DataError, GradNASError, OrderError, PlanError, StructureError

pytestmark = [
    pytest.mark.leaves_state,  # training leaves a model in train mode
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


class OwnLoss(Trainer):
    """Takes its targets from a column that the model does not know."""

    def compute_loss(self, model: Any, inputs: dict, **kwargs: Any) -> Any:
        targets = inputs.pop("targets")
        return torch.nn.functional.cross_entropy(model(**inputs).logits, targets)


class Unlabelled(Rows):
    """Rows whose labels have another name."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows = [{**row} for row in self.rows]
        for row in self.rows:
            row["targets"] = row.pop("labels")


def own_loss(folder: Path, callback: Any) -> Trainer:
    """A trainer whose data has no labels."""
    args = train_arguments(folder, remove_unused_columns=False, max_steps=2)
    data = Unlabelled("bert")
    return OwnLoss(build(), args, train_dataset=data, callbacks=[callback])


def test_data_without_labels_fails_before_the_first_step(tmp_path: Path) -> None:
    trainer = own_loss(tmp_path, pruning(labels="data"))
    with pytest.raises(DataError, match=r"labels='data': found no labels among .*targets"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_labels_are_the_models_where_there_are_none_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = pruning()
    own_loss(tmp_path, callback).train()
    assert callback.scores.metadata["labels"] == "model"
    first, last = [record.getMessage() for record in caplog.records]
    assert "found no labels among attention_mask, input_ids, targets" in first
    assert "they are drawn from the predictions of the model (labels='model')" in first
    said = (
        r"gradnas: Kept \S+% of the FLOPs and \S+% of the parameters: (.+) \(pruning took \S+ s\)"
    )
    assert re.fullmatch(said, last)[1] == str(callback.directory)


def test_scores_of_the_training_need_labels(tmp_path: Path) -> None:
    trainer = own_loss(tmp_path, pruning(when="gradual", scores_from="training"))
    with pytest.raises(DataError, match=r"scores_from='training': found no labels among"):
        trainer.train()
    assert trainer.state.global_step == 0


WRONG = [
    ({"budget": 0.5}, r'budget: found 0\.5, needed a mapping .* \{"flops": "50%"\}'),
    ({"budget": "50%"}, r'budget: found \'50%\', needed a mapping .* \{"flops": "50%"\}'),
    ({"budget": None}, "budget: found None"),
    ({"budget": {}}, "at least one limit"),
    ({"budget": {"flops": 0}}, r"flops=0: needed a limit above 0, such as '50%'\."),
    ({"budget": {"flops": 0.5}}, r"for the share kept write '50%'\."),
    ({"budget": {"flops": "150%"}}, "at most 100 %"),
    ({"budget": {"flop": "50%"}}, "did you mean 'flops'"),
    ({"dataloader": 3}, "dataloader: found a int, needed what yields batches"),
    ({"dataloader": "imdb"}, "dataloader: found a str"),
    ({"dataloader": {"input_ids": []}}, "dataloader: found a dict"),
    ({"output_dir": 3}, "output_dir=3: needed is a path"),
    ({"layers": "yes"}, "layers='yes': needed is True or False"),
    ({"num_examples": "5"}, "num_examples='5': needed is 1 or more"),
    ({"stages": "5"}, "stages='5': needed is 1 or more"),
    ({"labels": "none"}, "labels='none' is not known; choose one of auto, data, model"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(wrong) for wrong, _ in WRONG])
def test_what_is_wrong_is_said_when_the_callback_is_made(wrong: dict, message: str) -> None:
    with pytest.raises(GradNASError, match=message):
        GradNASCallback(**{"budget": {"flops": "50%"}, **wrong})


@pytest.mark.parametrize(
    "options", [{"labels": "model"}, {"score": "magnitude"}, {"dataloader": "labelled"}]
)
def test_a_loss_of_the_user_needs_no_labels_where_none_are_read(
    options: dict, tmp_path: Path
) -> None:
    if "dataloader" in options:
        options = {"dataloader": DataLoader(Rows("bert"), 4)}
    callback = pruning(**options)
    trainer = own_loss(tmp_path, callback)
    trainer.train()
    assert numel(trainer.model) == callback.plan.costs["params"]


class Endless(IterableDataset):
    """Rows again and again."""

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield from Rows("bert").rows


class Counted(Rows):
    """The rows again and again, up to 600, and how many were read."""

    read = 0

    def __len__(self) -> int:
        return 600

    def __getitem__(self, index: int) -> dict:
        self.read += 1
        return self.rows[index % len(self.rows)]


def stream(folder: Path, **options: Any) -> tuple[Any, Trainer]:
    """A trainer over data without an end."""
    callback = pruning(**options)
    args = train_arguments(folder, max_steps=2)
    return callback, Trainer(build(), args, train_dataset=Endless(), callbacks=[callback])


def test_all_of_a_data_set_without_a_length_is_refused(tmp_path: Path) -> None:
    trainer = stream(tmp_path, num_examples=None)[1]
    with pytest.raises(DataError, match=r"num_examples=None: .* Endless has no length"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_scores_of_the_training_need_no_end(tmp_path: Path) -> None:
    callback, trainer = stream(tmp_path, num_examples=None, scores_from="training")
    trainer.train()
    assert callback.scores.metadata["examples"] == "8"


def test_a_data_set_without_a_length_gives_its_first_examples(tmp_path: Path) -> None:
    callback, trainer = stream(tmp_path, num_examples=6)
    trainer.train()
    assert callback.scores.metadata["examples"] == "6"


def test_scores_of_the_training_read_a_bounded_sample_before_it(tmp_path: Path) -> None:
    data = Counted("bert")
    callback = pruning(num_examples=None, scores_from="training")
    args = train_arguments(tmp_path, max_steps=1, per_device_train_batch_size=16)
    trainer = Trainer(build(), args, train_dataset=data, callbacks=[callback])
    callback.on_train_begin(
        args, trainer.state, None, model=trainer.model, train_dataloader=DataLoader(data, 16)
    )
    assert data.read == 512


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["added", "wrapped"])
def test_adapters_are_refused(kind: str, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    model = build()
    if kind == "added":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    trainer = make_trainer(tmp_path, pruning(), model=model)
    with pytest.raises(StructureError, match=r"of PEFT .* merge them first \(merge_and_unload\)"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("whens", [("end", "end"), ("gradual", "end")])
def test_two_callbacks_on_one_trainer_are_refused(whens: tuple, tmp_path: Path) -> None:
    first, second = (pruning(when=when) for when in whens)
    trainer = make_trainer(tmp_path, first, more=(second,))
    with pytest.raises(OrderError, match="found two GradNASCallbacks on one trainer"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.remove_callback(second)
    trainer.train()
    assert numel(trainer.model) == first.plan.costs["params"]


def test_a_callback_prunes_the_models_of_two_trainers_once_each(tmp_path: Path) -> None:
    callback = pruning()
    trainers = [make_trainer(tmp_path / name, callback, max_steps=1) for name in "ab"]
    for trainer in trainers:
        trainer.train()
        assert numel(trainer.model) == callback.plan.costs["params"]
    with pytest.raises(OrderError, match="the callback cut this model, and began to prune another"):
        trainers[0].train()
    trainers[1].train()
    assert numel(trainers[0].model) == numel(trainers[1].model) == callback.plan.costs["params"]


def test_both_models_of_an_early_cut_are_cut(tmp_path: Path) -> None:
    callback = pruning(when="begin", dataloader=DataLoader(Rows("bert"), 4))
    sizes = {numel(make_trainer(tmp_path, callback).model) for _ in range(2)}
    assert sizes == {callback.plan.costs["params"]}


def test_a_callback_belongs_to_one_trainer_that_it_is_attached_to(tmp_path: Path) -> None:
    callback = pruning()
    first, second = (make_trainer(tmp_path, None) for _ in range(2))
    callback.attach(first)
    callback.attach(first)
    with pytest.raises(OrderError, match="attach: the callback belongs to another trainer"):
        callback.attach(second)
    assert callback not in second.callback_handler.callbacks


def test_only_a_trainer_can_be_attached_to() -> None:
    callback = GradNASCallback({"params": "80%"})
    with pytest.raises(PlanError, match="attach: found a NoneType, needed a Trainer"):
        callback.attach(None)  # type: ignore[arg-type]


def test_rules_may_be_objects(tmp_path: Path) -> None:
    rules = {"*": Rule(min=1), "bert.encoder.layer.0.*": None}
    callback = pruning(rules=rules, when="begin")
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, callback, **options).train()
    resumed = type(callback)(**callback.state()["args"])
    make_trainer(tmp_path, resumed, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert resumed.plan == callback.plan


def test_what_is_cut_when_the_trainer_is_made_is_counted(tmp_path: Path) -> None:
    callback = pruning(when="begin", dataloader=[batch_of("bert", 0)])
    make_trainer(tmp_path, callback)
    assert callback._run.clock.seconds > 0


def test_a_clock_counts_the_block_that_runs_and_those_before(monkeypatch: Any) -> None:
    monkeypatch.setattr(time, "monotonic", iter([10.0, 12.0, 13.0, 20.0, 21.5]).__next__)
    clock = Clock()
    with clock:
        assert clock.seconds == 2
    assert clock.seconds == 3
    with clock:
        assert clock.seconds == 4.5
        monkeypatch.undo()
