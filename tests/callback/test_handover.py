"""Optimizers and schedulers follow a cut: nothing of the user's is lost, nothing stale is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_runs import Rows, build, logits_of, make_trainer, numel, pruning, train_arguments
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    get_linear_schedule_with_warmup,
)

from hf_gradnas.callback.handover import names_of, renew_optimizer, swap_parameters
from hf_gradnas.errors import GradNASWarning

pytestmark = [
    pytest.mark.leaves_state,  # training leaves a model in train mode
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


def test_an_optimizer_of_the_user_follows_an_early_cut(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = Trainer(
        model,
        make_trainer(tmp_path, None).args,
        train_dataset=Rows("bert"),
        optimizers=(optimizer, None),
        callbacks=[pruning(when="begin", dataloader=DataLoader(Rows("bert"), 4))],
    )
    before = logits_of(trainer.model)
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert (before - logits_of(trainer.model)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("when", "attached"), [("end", False), ("end", True), ("begin", False), ("gradual", True)]
)
def test_a_second_training_has_a_new_optimizer(when: str, attached: bool, tmp_path: Path) -> None:
    callback = pruning(when=when)
    trainer = make_trainer(tmp_path, None if attached else callback)
    if attached:
        callback.attach(trainer)
    trainer.train()
    plan, before = callback.plan, logits_of(trainer.model)
    first = trainer.optimizer
    if attached and when != "begin":
        assert first is None
    elif when != "begin" or not attached:
        assert not first.state
    trainer.train()
    parameters = {id(p): p for p in trainer.model.parameters()}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == set(parameters)
    assert {id(p) for p in trainer.optimizer.state} == set(parameters)
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(9e-4)
    assert callback.plan == plan  # prunes no further
    assert numel(trainer.model) == plan.costs["params"]
    assert (before - logits_of(trainer.model)).abs().max() > 1e-6
    saved = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "pruned", dtype=torch.float64
    )
    assert torch.allclose(logits_of(saved), logits_of(trainer.model), atol=1e-9)


def test_a_second_cut_optimizer_goes_on_as_a_fresh_trainer_would(tmp_path: Path) -> None:
    callback = pruning()
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    twin = type(trainer.model).from_pretrained(tmp_path / "pruned", dtype=torch.float64)
    fresh = make_trainer(tmp_path / "fresh", None, model=twin)
    for each in (trainer, fresh):
        torch.manual_seed(5)
        each.train()
    assert (logits_of(trainer.model) - logits_of(fresh.model)).abs().max() < 1e-9


class Rates(TrainerCallback):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])


SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=1e-3, total_steps=12),
    "warm-up": lambda optimizer: get_linear_schedule_with_warmup(optimizer, 5, 10),
}


@pytest.mark.parametrize(("kind", "attached"), [("one cycle", False), ("warm-up", True)])
def test_a_scheduler_of_the_user_goes_on_after_an_early_cut(
    kind: str, attached: bool, tmp_path: Path
) -> None:
    seen = []
    for prunes in (False, True):
        model, rates = build(), Rates()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        callback = pruning(
            when="begin", dataloader=None if attached else DataLoader(Rows("bert"), 4)
        )
        trainer = Trainer(
            model,
            train_arguments(tmp_path, max_steps=4),
            train_dataset=Rows("bert"),
            optimizers=(optimizer, SCHEDULERS[kind](optimizer)),
            callbacks=[rates, *([callback] if prunes and not attached else [])],
        )
        if prunes and attached:
            callback.attach(trainer)
        trainer.train()
        seen.append(rates.seen)
    assert numel(model) == callback.plan.costs["params"]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("attached", [False, True])
def test_a_used_scheduler_of_the_user_is_not_swapped(attached: bool, tmp_path: Path) -> None:
    model, rates = build(), Rates()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, 8)
    callback = pruning()
    trainer = Trainer(
        model,
        train_arguments(tmp_path, max_steps=4),
        train_dataset=Rows("bert"),
        optimizers=(optimizer, scheduler),
        callbacks=[callback, rates],
    )
    if attached:
        callback.attach(trainer)
    trainer.train()
    with pytest.warns(GradNASWarning, match="the scheduler in optimizers=… goes on where"):
        trainer.train()
    expected = [1e-3 * (1 - step / 8) for step in range(8)]
    assert rates.seen == pytest.approx(expected)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}


def test_parameters_that_are_not_of_the_model_stay(tmp_path: Path) -> None:
    model, extra = build(), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [*model.parameters()]}, {"params": [extra], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
    sum(p.sum() for p in (*model.parameters(), extra)).backward()
    optimizer.step()
    names, old = names_of(model), model.classifier.weight
    model.classifier.weight = torch.nn.Parameter(old.detach()[:, :8])
    swap_parameters(optimizer, names, model)
    assert [p is extra for p in optimizer.param_groups[1]["params"]] == [True]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))
    assert extra in optimizer.state
    assert old not in optimizer.state
    assert optimizer.param_groups[1]["lr"] == 0.5
    renew_optimizer(optimizer, names, model, rewinds=True)
    assert [p is extra for p in optimizer.param_groups[1]["params"]] == [True]
    assert not optimizer.state
