"""Gradient checkpointing of a model in eval mode: its layers run again in the backward.

Transformers' layers ask their own training flag whether to checkpoint. So that flag alone is on,
and off again while the layer itself runs: dropout and batch norms see eval mode throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import GradNASWarning, StructureError
from .offloading import own_weights

FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of a model that can be checkpointed."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def check_checkpointing(model: nn.Module, *, asked: bool | None) -> None:
    """Check that layers of a model can be checkpointed where that is asked for.

    Args:
        model: The model.
        asked: As `every` of `checkpointed`.

    Raises:
        StructureError: None can.

    Warns:
        GradNASWarning: Checkpointing is on in the model, but in no layer of Transformers.
    """
    if layers_of(model) or asked is False:
        return
    found = (
        f"{type(model).__name__} has no layers that can be checkpointed (instances of "
        "transformers.modeling_layers.GradientCheckpointingLayer)"
    )
    if asked:
        raise StructureError(
            f"checkpointing: {found}; omit it, and give smaller batches if memory is short."
        )
    if any(vars(module).get(FLAG) for module in model.modules()):
        warnings.warn(
            f"Gradient checkpointing is on, but {found}: scoring goes on without it; give smaller "
            "batches if memory is short.",
            GradNASWarning,
            stacklevel=3,
        )


@contextmanager
def checkpointed(model: nn.Module, *, every: bool | None = None) -> Iterator[None]:
    """Checkpoint layers within the block, which encloses forward and backward, in eval mode.

    Args:
        model: In eval mode; all is restored afterwards.
        every: Every layer, or none; None: those that checkpointing was switched on for.
    """
    with ExitStack() as stack:
        for layer in layers_of(model):
            is_on = layer.gradient_checkpointing if every is None else every
            function = partial(_run, layer, _function_of(layer))
            for name, value in ((FLAG, is_on), (FUNCTION, function), ("training", is_on)):
                _exchange(stack, layer, name, value)
        yield


def _exchange(stack: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Give an instance an attribute until `stack` closes."""
    instance = vars(module)
    if name in instance:
        stack.callback(instance.__setitem__, name, instance[name])
    else:
        stack.callback(instance.pop, name, None)
    instance[name] = value


def _function_of(layer: nn.Module) -> Callable[..., Any]:
    """The function that checkpoints a layer: its own, unless that needs inputs with gradients."""
    own = vars(layer).get(FUNCTION)
    if isinstance(own, partial) and own.keywords.get("use_reentrant") is False:
        return own
    return partial(checkpoint, use_reentrant=False)


def _run(
    layer: nn.Module, function: Callable[..., Any], forward: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoint a forward of a layer, which runs in eval mode each time."""
    return function(partial(_evaluating, layer, forward), *args)


def _evaluating(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    before, layer.training = layer.training, False
    try:
        with own_weights(layer):
            return forward(*args)
    finally:
        layer.training = before
