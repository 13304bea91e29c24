"""Weights that a module holds as parameters of its own: masks on what products read with them.

Such are the matrices of all experts in one tensor, or a weight that is no layer. There is no module
whose input could be masked, so that the parameter is multiplied, or the product is watched. Knows
neither routers nor scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .running.hooks import When, add_hook, add_pre_hook, only_when
from .types import Axis

PRODUCTS = frozenset("linear matmul mm bmm addmm baddbmm __matmul__".split())

Read = Callable[[str, Tensor], Tensor]
"""Gets the name of a parameter, and values ``(…, entries)`` that a product reads with it; returns
those that it reads instead."""


class Products(TorchFunctionMode):
    """While it is on, shows what products read with some parameters.

    Args:
        parameters: Those, by name; their views and copies count as them.
        read: What is done with the values.
    """

    def __init__(self, parameters: Mapping[str, Tensor], read: Read) -> None:
        super().__init__()
        self._held = [(name, tensor) for name, tensor in parameters.items()]  # ids may come again
        self._read = read

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        values = list(args)
        given = [place for place, x in enumerate(args) if isinstance(x, Tensor)]
        names = {place: self._name_of(args[place]) for place in given[-2:]}
        held = [place for place, name in names.items() if name]
        kind = getattr(func, "__name__", "")
        if kind in PRODUCTS and len(given) > 1 and len(held) == 1:
            (place,) = held
            (other,) = set(names) - {place}
            is_first = place < other  # then its columns meet rows of the other factor
            x = values[other].transpose(-1, -2) if is_first else values[other]
            x = self._read(names[place], x)
            values[other] = x.transpose(-1, -2) if is_first else x
        out = func(*values, **(kwargs or {}))
        is_view = held == [0] and (len(given) == 1 or kind == "__getitem__")
        if is_view and isinstance(out, Tensor) and out.numel() == args[0].numel():
            self._held.append((names[0], out))
        return out

    def _name_of(self, x: Tensor) -> str:
        return next((name for name, tensor in self._held if tensor is x), "")


class WatchProducts:
    """Hooks of a module that show what products read with a parameter of it.

    Args:
        name: Of the parameter, in the module.
        read: What is done with the values ``(…, entries)``, given the parameter.
    """

    def __init__(self, name: str, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._name, self._read = name, read
        self._running: list[Products] = []

    def attach(self, stack: ExitStack, module: nn.Module) -> None:
        """Hook into the module until `stack` closes."""
        add_pre_hook(stack, module, self._begin)
        add_hook(stack, module, self._end, always_call=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        weight = module.get_parameter(self._name)
        mode = Products({self._name: weight}, lambda _, x: self._read(weight, x))
        mode.__enter__()
        self._running.append(mode)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._running:
            self._running.pop().__exit__(None, None, None)


class MultiplyStack:
    """Hooks of a module that multiply what a parameter of it reads by a mask.

    ``W·(m∘h) = (W∘m)·h``: the module runs with the parameter multiplied by the mask, whatever
    kernel it runs, and has its own back afterwards.
    """

    def __init__(self, axis: Axis, parameter: str, mask: Tensor) -> None:
        self.name, self.mask, self.size = parameter.rpartition(".")[2], mask, axis.size
        (self.reader,) = (part for part in axis.readers if part.tensor == parameter)
        self._own: list[Tensor | None] = []

    def attach(self, stack: ExitStack, module: nn.Module, when: When | None) -> None:
        """Hook into the module until `stack` closes."""
        add_pre_hook(stack, module, only_when(self._begin, when))
        add_hook(stack, module, self._end, always_call=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        own = module.get_parameter(self.name)
        self._own.append(module._parameters[self.name])
        module._parameters[self.name] = own * self._factors(own)  # type: ignore[assignment]

    def _factors(self, own: Tensor) -> Tensor:
        """The mask as factors of the parameter's entries."""
        mask, part = self.mask.to(device=own.device, dtype=own.dtype), self.reader
        shape = [1] * own.ndim
        shape[part.dim] = own.shape[part.dim]
        if part.each:  # each matrix has units of its own
            shape[0], shape[part.dim] = own.shape[0], part.each
            return mask.view(shape)
        rows = torch.tensor(part.rows(range(self.size)), device=own.device)
        ones = mask.new_ones(own.shape[part.dim])
        return ones.index_copy(0, rows, mask.repeat_interleave(part.width)).view(shape)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._own:
            module._parameters[self.name] = self._own.pop()  # type: ignore[assignment]
