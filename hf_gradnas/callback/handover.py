"""What must follow a cut in place: the optimizer's parameters, and a trainer's references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .batches import collators_of


def names_of(model: nn.Module) -> dict[int, str]:
    """Name of every parameter, by identity."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def swap_parameters(optimizer: Any, names: Mapping[int, str], model: nn.Module) -> None:
    """Give an optimizer the parameters that a model has now, in place of those it had, in place.

    Everything else of its groups stays, and so do parameters that were not the model's. The state
    of parameters that are gone is forgotten.

    Args:
        optimizer: Of torch, or accelerate's wrapper.
        names: Of the model's parameters before the cut (see `names_of`).
        model: The model after it.
    """
    now = dict(model.named_parameters())
    seen: set[str] = set()
    for group in optimizer.param_groups:
        of_group = [(names.get(id(p)), p) for p in group["params"]]
        seen.update(name for name, _ in of_group if name is not None)
        group["params"] = [
            p if name is None else now[name] for name, p in of_group if name is None or name in now
        ]
    # A layer that shared a table of position biases owns one now.
    new = [p for name, p in now.items() if name not in seen and name not in names.values()]
    optimizer.param_groups[0]["params"] += new
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in [p for p in optimizer.state if id(p) not in held]:
        del optimizer.state[parameter]


def renew_optimizer(
    optimizer: Any, names: Mapping[int, str], model: nn.Module, *, rewinds: bool
) -> None:
    """Make a used optimizer as good as a new one of the cut model, in place.

    `Trainer` makes an optimizer only where it has none, so that a second ``train()`` goes on with
    the first one's. The state of every parameter is forgotten.

    Args:
        optimizer: As for `swap_parameters`, and so are `names` and `model`.
        names: Of the model's parameters before the cut.
        model: The model after it.
        rewinds: Set the learning rate to where it started, for a new scheduler; otherwise the old
            one goes on, and groups stay as it left them.
    """
    swap_parameters(optimizer, names, model)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if rewinds and "initial_lr" in group:
            group["lr"] = group.pop("initial_lr")


def renew_trainer(trainer: Any, *, makes_optimizer: bool, makes_scheduler: bool) -> None:
    """Let a trainer wrap its model anew when it trains again, and make again what it had made."""
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    if makes_scheduler:
        trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = None
    if makes_optimizer:
        trainer.optimizer = trainer.callback_handler.optimizer = None


def tokenizer_of(event: Mapping[str, Any]) -> Any:
    """What a trainer processes its data with, or its loader's collate function pads with.

    Args:
        event: Keyword arguments of an event of a trainer.

    Returns:
        A tokenizer or processor; None: there is none.
    """
    given, loader = event.get("processing_class"), event["train_dataloader"]
    if given is not None or not isinstance(loader, DataLoader):
        return given
    found = (collator.get("tokenizer") for collator in collators_of(loader))
    return next((each for each in found if isinstance(each, PreTrainedTokenizerBase)), None)
