"""What must follow a cut in place: the optimizer's parameters, and a trainer's references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def names_of(model: nn.Module) -> dict[int, str]:
    """Name of every parameter, by identity."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def renew_optimizer(optimizer: Any, names: Mapping[int, str], model: nn.Module) -> None:
    """Make a used optimizer as good as a new one of the cut model, in place.

    `Trainer` makes an optimizer only where it has none, so that a second ``train()`` goes on with
    the first one's. Its groups get the parameters that the model has now under the same names, the
    state of every parameter is forgotten, and the learning rate goes back to where it started.

    Args:
        optimizer: Of torch, or accelerate's wrapper.
        names: Of the model's parameters before the cut (see `names_of`).
        model: The model after it.
    """
    now = dict(model.named_parameters())
    seen: set[str] = set()
    for group in optimizer.param_groups:
        of_group = [names[id(p)] for p in group["params"] if id(p) in names]
        seen.update(of_group)
        group["params"] = [now[name] for name in of_group if name in now]
        if "initial_lr" in group:
            group["lr"] = group.pop("initial_lr")
    # A layer that shared a table of position biases owns one now.
    new = [p for name, p in now.items() if name not in seen and name not in names.values()]
    optimizer.param_groups[0]["params"] += new
    optimizer.state.clear()


def renew_trainer(trainer: Any, *, makes_optimizer: bool) -> None:
    """Let a trainer wrap its model anew when it trains again, and make its optimizer if it did."""
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = None
    if makes_optimizer:
        trainer.optimizer = trainer.callback_handler.optimizer = None
