"""Offloaded weights for many forwards that wait for each other, and with other values in place.

Accelerate loads a weight for each call of its module, and puts it back after the call. Forwards
that wait at a layer for each other would load it one by one, and one that waits inside a module
would find its weights put back by another. So within `lending`

- weights that were loaded last stay for the next call, as many as a layer has;
- a forward that waits takes its weights with it (`Lender.resumed`);
- a call may get other values, of another shape too (`give`).

Knows Accelerate's hooks; knows nothing of what the forwards are for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import StructureError
from .offloading import is_offloaded, loader_of

Make = Callable[[Tensor], Tensor]
"""Makes what a call computes with of a weight."""


class Lender:
    """Which calls have loaded weights that are not put back yet, innermost last."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    @contextmanager
    def resumed(self, calls: list[_Call]) -> Iterator[None]:
        """Let a forward go on that waits in some calls; their weights are there within the block.

        Args:
            calls: Empty before it starts; then those in which it waits.
        """
        before, self._calls = self._calls, calls
        try:
            for call in calls:
                call.exchange()
            yield
        finally:
            for call in reversed(calls):
                call.exchange()
            self._calls = before

    def enter(self, module: nn.Module) -> None:
        """Note what a module holds before its weights are loaded."""
        self._calls.append(_Call(module))

    def leave(self, module: nn.Module) -> None:
        """Give a module what it held, after its weights were put back."""
        while self._calls:
            call = self._calls.pop()
            call.exchange()
            if call.module is module:
                return

    def abandon(self) -> None:
        """Put back what calls that broke off have loaded."""
        while self._calls:
            self._calls.pop().exchange()


class _Call:
    """A call of a module, and the parameters and buffers that the module does not hold now."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parameters, self._buffers = dict(module._parameters), dict(module._buffers)

    def exchange(self) -> None:
        """Let the module hold the others."""
        module = self.module
        held = dict(module._parameters), dict(module._buffers)
        module._parameters.update(self._parameters)
        module._buffers.update(self._buffers)
        self._parameters, self._buffers = held


class _Recent:
    """Weights that were loaded last, up to some bytes; more if the last alone is larger."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._tensors: OrderedDict[tuple[int, str], Tensor] = OrderedDict()

    def get(self, key: tuple[int, str], load: Callable[[], Tensor]) -> Tensor:
        """One of them, or what `load` gives."""
        if key in self._tensors:
            self._tensors.move_to_end(key)
            return self._tensors[key]
        tensor = load()
        self._size += tensor.nbytes
        while self._tensors and self._size > self._most:
            self._size -= self._tensors.popitem(last=False)[1].nbytes
        self._tensors[key] = tensor
        return tensor


class _Loads(Mapping[str, Tensor]):
    """Weights of one module in their types, from where Accelerate loads them, or of `_Recent`."""

    def __init__(self, number: int, own: Mapping[str, Tensor], module: nn.Module, recent: _Recent):
        self._number, self._own, self._recent = number, own, recent
        self._dtypes = {name: p.dtype for name, p in module.named_parameters(recurse=False)}

    def __getitem__(self, name: str) -> Tensor:
        def load() -> Tensor:
            return self._own[name].to(self._dtypes.get(name))

        return self._recent.get((self._number, name), load)

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


class Lending(ModelHook):
    """Accelerate's hook of a module, with what its calls get instead of its weights.

    Attributes:
        inner: That hook.
        lender: Told of the calls.
        makes: By the name of a parameter, what is made of it, one after another.
    """

    def __init__(self, inner: ModelHook, lender: Lender) -> None:
        self.inner, self.lender = inner, lender
        self.no_grad = inner.no_grad
        self.makes: dict[str, list[Make]] = {}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Load the weights, and make of them what is asked for."""
        self.lender.enter(module)
        with _disable_current_modes():  # those note what a forward makes
            given = self.inner.pre_forward(module, *args, **kwargs)
            for name, makes in self.makes.items():
                parameter = module._parameters[name]
                assert parameter is not None
                for make in makes:
                    parameter.data = make(parameter.data)
        return given

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Put the weights back."""
        output = self.inner.post_forward(module, output)
        self.lender.leave(module)
        return output


@contextmanager
def lending(model: nn.Module) -> Iterator[None]:
    """Load offloaded weights once for calls one after another within the block; see the module.

    At any end, the model is as it was.

    Raises:
        StructureError: Weights are loaded with those of the modules in theirs.
    """
    if not is_offloaded(model):
        yield
        return
    lender, recent = Lender(), _Recent(largest_layer(model))
    with ExitStack() as stack:
        for number, (path, module) in enumerate(model.named_modules()):
            loader = loader_of(module)
            if loader is None:
                continue
            if loader.place_submodules and any(module.children()):
                raise StructureError(
                    f"repair: {path or 'the model'} is offloaded as a whole "
                    "(preload_module_classes), and waits with its weights in memory; offload it "
                    "without that argument."
                )
            loads = _Loads(number, loader.weights_map, module, recent)
            stack.callback(setattr, loader, "weights_map", loader.weights_map)
            loader.weights_map = loads
            inner: Any = module._hf_hook
            stack.callback(setattr, module, "_hf_hook", inner)
            module._hf_hook = Lending(inner, lender)
        stack.callback(lender.abandon)
        yield


def lender_of(model: nn.Module) -> Lender:
    """Who lends the weights of a model; one that lends none where all are in memory."""
    hooks = (vars(module).get("_hf_hook") for module in model.modules())
    return next((hook.lender for hook in hooks if isinstance(hook, Lending)), Lender())


def largest_layer(model: nn.Module) -> int:
    """Bytes of the largest layer of a stack, or of the largest weight."""
    layers = [layer for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m]
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    return max([*sizes, *(p.nbytes for p in model.parameters())], default=0)


def give(module: nn.Module, name: str, make: Make, undo: ExitStack) -> None:
    """Let a module compute with what is made of its parameter, until undone.

    Args:
        module: Not in a call.
        name: Of the parameter in it.
        make: Gives the values, of any shape, where those that it is given are.
        undo: Puts the parameter back, unless it forgets it.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    if parameter.is_meta and loader_of(module) is not None:
        hook: Any = module._hf_hook
        if not isinstance(hook, Lending):
            undo.callback(setattr, module, "_hf_hook", hook)
            hook = module._hf_hook = Lending(hook, Lender())
        makes = hook.makes.setdefault(name, [])
        makes.append(make)
        undo.callback(makes.pop)
        return
    undo.callback(setattr, parameter, "data", parameter.data)
    parameter.data = make(parameter.data)


def value_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter of a module, detached; loaded to where the module runs if it is offloaded."""
    parameter = module._parameters[name]
    assert parameter is not None
    loader: AlignDevicesHook | None = loader_of(module) if parameter.is_meta else None
    if loader is None:
        return parameter.detach()
    with _disable_current_modes():
        value: Tensor = loader.weights_map[name]
        device = loader.execution_device
        where = value.device if device is None else torch.device(device)
        return value.detach().to(where, parameter.dtype)
