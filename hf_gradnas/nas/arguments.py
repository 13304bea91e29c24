"""Call conventions of the reference: batches and dummy inputs as arguments, settings of the search.

As ``torch.onnx.export`` takes them: a tuple holds positional arguments, a dict at its end keywords.
Of settings, defaults and what they cannot be are known here.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat import taken_out
from ..errors import DataError, GradNASWarning, PlanError, StructureError
from ..structure.trace import map_tensors
from ..types import is_integer

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


# --- settings of the search -----------------------------------------------------------------------


REDUCTIONS = ("max", "sum")
DEFAULTS: Mapping[str, Any] = {
    "checkpoint": None,
    "verbose": True,
    "forward_loop": None,
    "data_loader": None,
    "collect_func": None,
    "max_iter_data_loader": 128,
    "score_func": None,
    "loss_func": None,
    "deployment": None,
    "num_iters": None,
    "reduce": "max",
    "average_scores": False,
    "score_convergence_tol": None,
    "score_convergence_patience": 5,
    "score_convergence_min_updates": 10,
}
"""``deployment`` and ``num_iters`` change nothing; they are here so that old calls work."""


def sanitize(
    config: Mapping[str, Any], defaults: Mapping[str, Any], score_func: Callable[..., float]
) -> dict[str, Any]:
    """A complete copy of the settings (see `GradientBinarySearcher.sanitize_search_config`)."""
    if not isinstance(config, Mapping):
        raise PlanError(
            f"config: found {config!r:.60}, needed a dict with data_loader and loss_func, or None."
        )
    unknown = sorted(map(str, config.keys() - defaults.keys()))
    if {"score", "method"} & config.keys():
        raise PlanError(
            "config: score is no setting of the search, whose score is gradnas, with masks at the "
            "reference's places; for another one use GradNASPruner(model, score=…)."
        )
    if unknown:
        raise PlanError(
            f"config: {', '.join(unknown)} is no setting of the search; known are "
            f"{', '.join(defaults)}."
        )
    if config.get("score_func") is not None:
        warnings.warn(
            "config: score_func is not used by gradnas, whose score comes from gradients; "
            "leave it out.",
            GradNASWarning,
            stacklevel=3,
        )
    full = {**defaults, **config, "score_func": score_func}
    full["collect_func"] = full["collect_func"] or first_element
    _check_data(full)
    _check_numbers(full)
    return full


def _check_data(config: Mapping[str, Any]) -> None:
    if config["forward_loop"] is not None:
        raise DataError(
            "config: forward_loop cannot be used by gradnas, which needs every batch's loss; give "
            "data_loader, collect_func and loss_func."
        )
    for name, example in (
        ("data_loader", "an iterable of batches"),
        ("loss_func", "lambda output, batch: output.loss"),
    ):
        if config[name] is None:
            raise DataError(f"config: {name} is missing, needed for gradnas; give {example}.")
    if not isinstance(config["data_loader"], Iterable):
        raise DataError(
            f"config: data_loader is a {type(config['data_loader']).__name__}, needed an iterable "
            "of batches; give for example a torch.utils.data.DataLoader."
        )
    for name in ("loss_func", "collect_func"):
        if not callable(config[name]):
            raise PlanError(
                f"config: {name} is a {type(config[name]).__name__}, needed a function; give for "
                "example lambda output, batch: output.loss as loss_func."
            )


def _check_numbers(config: Mapping[str, Any]) -> None:
    if config["reduce"] not in REDUCTIONS:
        raise PlanError(f"config: reduce={config['reduce']!r}; choose one of {REDUCTIONS}.")
    limit = config["max_iter_data_loader"]
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise PlanError(
            f"config: max_iter_data_loader={limit!r}; give a number of batches of at least 1, or "
            "None for all."
        )
    if config["checkpoint"] is not None and not isinstance(config["checkpoint"], str | os.PathLike):
        raise PlanError(
            f"config: checkpoint={config['checkpoint']!r}; give the path of a file, or None."
        )
    tolerance = config["score_convergence_tol"]
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0 < tolerance < math.inf):
        raise PlanError(
            f"config: score_convergence_tol={tolerance!r}; give a relative change above 0, such as "
            "0.01, or None to read all batches."
        )
    for name in ("score_convergence_patience", "score_convergence_min_updates"):
        if not is_integer(config[name]) or config[name] < 0:
            raise PlanError(f"config: {name}={config[name]!r}; give a whole number of batches.")
    if not isinstance(config["average_scores"], bool):
        raise PlanError(
            f"config: average_scores={config['average_scores']!r:.60}; give True or False."
        )
