"""Call conventions of the reference: how batches and dummy inputs become arguments of a forward.

As ``torch.onnx.export`` takes them: a tuple holds positional arguments, a dict at its end keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat import taken_out
from ..errors import DataError, StructureError
from ..structure.trace import map_tensors

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Collect = Callable[[Any], Any]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a distributed wrapper or one of ``torch.compile``.

    Raises:
        StructureError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(
            f"model: found {model!r:.60}, needed a torch.nn.Module; pass the model itself."
        )
    return taken_out(model)


def first_element(batch: Any) -> Any:
    """Arguments in a batch when no ``collect_func`` is given: the first element of a tuple or list.

    A dict, as Transformers' data collators yield it, is taken whole.
    """
    return batch[0] if isinstance(batch, tuple | list) else batch


def call_arguments(model: nn.Module, given: Any) -> Arguments:
    """Positional and keyword arguments of the model's forward, on its device.

    Args:
        model: The model, unwrapped.
        given: A single argument, a tuple of arguments, or a tuple whose last element is a dict of
            keywords (an empty one where the last argument is itself a dict). A bare dict is taken
            as keywords by a Transformers model and by a forward that has its keys as names, and is
            a single argument otherwise.
    """
    args, kwargs = _split(model, given)
    device = next(model.parameters(), torch.empty(0)).device

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    return map_tensors(args, move), map_tensors(kwargs, move)


def named_arguments(model: nn.Module, given: Any) -> dict[str, Any]:
    """All arguments by the names that the model's forward gives them.

    Raises:
        DataError: They do not fit the forward, or one of them can have no name (``*args``).
    """
    args, kwargs = call_arguments(model, given)
    forward = inspect.signature(model.forward)
    try:
        bound = forward.bind(*args, **kwargs)
    except TypeError as error:
        raise DataError(
            f"dummy_input: does not fit {type(model).__name__}.forward{forward} ({error}); give a "
            "tensor, a tuple of positional arguments, or a tuple that ends in a dict of keywords."
        ) from error
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = forward.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise DataError(
                f"dummy_input: {type(model).__name__}.forward{forward} takes {name} by position "
                "only, needed arguments with names; let the forward name them."
            )
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _split(model: nn.Module, given: Any) -> Arguments:
    if isinstance(given, Mapping) and _takes_names(model, given):
        return (), dict(given)
    if not isinstance(given, tuple):
        return (given,), {}
    if given and isinstance(given[-1], Mapping):
        return given[:-1], dict(given[-1])
    return given, {}


def _takes_names(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the keys of a mapping are names of arguments."""
    if isinstance(model, PreTrainedModel):
        return True
    return bool(given) and given.keys() <= inspect.signature(model.forward).parameters.keys()


def probe_arguments(model: nn.Module, given: Any) -> dict[str, Any]:
    """`named_arguments` in which no input is constant, so that every unit has an effect on it.

    A dummy input of zeros or ones serves to count FLOPs, but proves nothing about units: constant
    floating-point inputs become seeded normal numbers, constant token ids of a Transformers model
    the first ids there are. Masks stay.
    """
    return {
        name: _varied(model, name, value) if isinstance(value, Tensor) else value
        for name, value in named_arguments(model, given).items()
    }


def _varied(model: nn.Module, name: str, value: Tensor) -> Tensor:
    is_constant = value.numel() > 1 and bool((value == value.flatten()[0]).all())
    if not is_constant or "mask" in name:
        return value
    if value.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(value.shape, generator=generator).to(value)
    if name.endswith("input_ids") and isinstance(model, PreTrainedModel):
        ids = model.get_input_embeddings().weight.shape[0]
        return (torch.arange(value.numel(), device=value.device) % ids).view_as(value).to(value)
    return value
