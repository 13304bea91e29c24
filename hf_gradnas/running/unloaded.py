"""A copy of a model without its weights, to run it for shapes alone.

Knows modules and tensors, and nothing of what is counted with the copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn

PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})
CONTAINERS = frozenset({dict, list, set, OrderedDict})


def can_be_unloaded(model: nn.Module) -> bool:
    """Whether a copy on the meta device runs as the model does.

    Weights must be plain tensors: those of ZeRO-3, FSDP2 and many quantizers are not.
    """
    tensors = (tensor for module in model.modules() for tensor in _held(module))
    is_plain = all(type(x) in PLAIN and "ds_id" not in vars(x) for x in tensors)
    return is_plain and not runs_the_original(model)


def runs_the_original(model: nn.Module) -> bool:
    """Whether a copy of a model would run the model, or modules of it.

    So it is where a forward that was put into an instance holds modules in a closure: TRL's
    ``SFTTrainer`` wraps the bound forward. A closure is not copied.
    """
    return any(
        _holds_module(vars(module).get("forward"))
        for module in model.modules()
        if not isinstance(vars(module).get("_hf_hook"), ModelHook)
    )


def _holds_module(function: Any, known: frozenset[int] = frozenset()) -> bool:
    """Whether a function, or one that it calls, holds a module or its method in a closure."""
    own = function.__func__ if isinstance(function, MethodType) else function
    if not isinstance(own, FunctionType) or id(own) in known:
        return False
    held = [cell.cell_contents for cell in own.__closure__ or () if cell != CellType()]
    bound = [value.__self__ if isinstance(value, MethodType) else value for value in held]
    known |= {id(own)}
    return any(isinstance(x, nn.Module) or _holds_module(x, known) for x in (*held, *bound))


def unloaded(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in eval mode, that takes no memory for weights.

    Modules and what they hold are new, so that a forward of the copy leaves nothing in the model;
    configs and hooks are those of the model, but for those of Accelerate that place weights.
    Parameters that are shared are shared in the copy.

    Args:
        model: Its weights are plain tensors (`can_be_unloaded`), on any device.
    """
    tensors: dict[int, Tensor] = {}
    twins: dict[int, nn.Module] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in tensors:
            new = torch.empty_like(tensor, device="meta", requires_grad=False)
            is_weight = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_weight else new
        return tensors[id(tensor)]

    def copied(value: Any, module: nn.Module, twin: nn.Module) -> Any:
        if isinstance(value, Tensor):
            return empty(value)
        if type(value) in CONTAINERS:
            return copy.copy(value)
        if isinstance(value, MethodType) and value.__self__ is module:
            return MethodType(value.__func__, twin)
        return value

    def twin_of(module: nn.Module) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        twin = twins[id(module)] = type(module).__new__(type(module))
        own = vars(twin)
        own.update({name: copied(value, module, twin) for name, value in vars(module).items()})
        own |= {"training": False, "_compiled_call_impl": None, **_plain_forward(own)}
        for held in (own["_parameters"], own["_buffers"]):
            held.update({name: x if x is None else empty(x) for name, x in held.items()})
        inner = own["_modules"]
        inner.update({name: m if m is None else twin_of(m) for name, m in inner.items()})
        return twin

    return twin_of(model)


def _plain_forward(own: dict[str, Any]) -> dict[str, Any]:
    """Attributes without Accelerate's forward around a module's, which would run the model."""
    if isinstance(own.pop("_hf_hook", None), ModelHook):
        return {"forward": own.pop("_old_forward")}
    return {}


def _held(module: nn.Module) -> list[Tensor]:
    held: list[Any] = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in held if tensor is not None]
