"""Weights that a module holds as parameters of its own: masks on what products read with them.

Such are the matrices of all experts in one tensor, or a weight that is no layer. There is no module
whose input could be masked, so that the parameter is multiplied, or the product is watched. Knows
neither routers nor scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import StructureError
from .running.hooks import When, add_hook, add_pre_hook, only_when
from .running.lending import give
from .running.offloading import loader_of
from .types import Axis

PRODUCTS = frozenset("linear matmul mm bmm addmm baddbmm __matmul__".split())

Read = Callable[[str, Tensor, int | None], Tensor]
"""Gets the name of a parameter, values ``(…, entries)`` that a product reads with it, and the
number of the matrix in it (None: all of it); returns those values that it reads instead."""


class Products(TorchFunctionMode):
    """While it is on, shows what products read with some parameters.

    Args:
        parameters: Those, by name; their views and copies count as them.
        read: What is done with the values.
    """

    def __init__(self, parameters: Mapping[str, Tensor], read: Read) -> None:
        super().__init__()
        # The tensors are held: the id of one that is gone may come again.
        self._held: dict[int, tuple[Tensor, str, int | None]] = {}
        for name, tensor in parameters.items():
            self._held[id(tensor)] = tensor, name, None
        self._read = read

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        values, kind = list(args), getattr(func, "__name__", "")
        given = [place for place, x in enumerate(args) if isinstance(x, Tensor)]
        held = [place for place in given[-2:] if id(args[place]) in self._held]
        if kind in PRODUCTS and len(given) > 1 and len(held) == 1:
            (place,) = held
            (other,) = set(given[-2:]) - {place}
            _, name, number = self._held[id(args[place])]
            is_first = place < other  # then its columns meet rows of the other factor
            x = values[other].transpose(-1, -2) if is_first else values[other]
            x = self._read(name, x, number)
            values[other] = x.transpose(-1, -2) if is_first else x
        out = func(*values, **(kwargs or {}))
        if isinstance(out, Tensor) and held[:1] == [0]:
            self._note(kind, args, out, is_alone=len(given) == 1)
        return out

    def _note(self, kind: str, args: tuple[Any, ...], out: Tensor, *, is_alone: bool) -> None:
        """Note a view or copy of a parameter, or one matrix of it."""
        whole, name, number = self._held[id(args[0])]
        is_one = kind == "__getitem__" and whole.ndim == out.ndim + 1 and number is None
        if is_one:
            self._held[id(out)] = out, name, int(args[1])
        elif is_alone and out.numel() == whole.numel():
            self._held[id(out)] = out, name, number


class WatchProducts:
    """Hooks of a module that show what products read with a parameter of it.

    Args:
        name: Of the parameter, in the module.
        read: What is done with the parameter, the values ``(…, entries)``, and the number of the
            matrix.
    """

    def __init__(self, name: str, read: Callable[[Tensor, Tensor, int | None], Tensor]) -> None:
        self._name, self._read = name, read
        self._running: list[Products] = []

    def attach(self, stack: ExitStack, module: nn.Module) -> None:
        """Hook into the module until `stack` closes."""
        add_pre_hook(stack, module, self._begin)
        add_hook(stack, module, self._end, always_call=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        weight = module.get_parameter(self._name)
        mode = Products({self._name: weight}, lambda _, x, number: self._read(weight, x, number))
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
        owner = axis.taps[0].owner
        path, _, self.leaf = parameter.removeprefix(f"{owner}.").rpartition(".")
        self.path, self.mask, self.size = path, mask, axis.size
        (self.reader,) = (part for part in axis.readers if part.tensor == parameter)
        self._own: list[Tensor | None] = []

    def attach(self, stack: ExitStack, module: nn.Module, when: When | None) -> None:
        """Hook into the module until `stack` closes.

        Raises:
            StructureError: The mask wants gradients, and the parameter is offloaded.
        """
        holder = module.get_submodule(self.path)
        if loader_of(holder) is not None:  # after the hooks it is loaded anew
            if self.mask.requires_grad:
                raise StructureError(
                    f"{self.leaf}: is offloaded, so that no mask on it can be trained; load the "
                    "model whole."
                )
            give(holder, self.leaf, partial(self._masked, when), stack)
            return
        add_pre_hook(stack, module, only_when(self._begin, when))
        # The last that multiplied is the first to put back what it found.
        add_hook(stack, module, self._end, always_call=True, prepend=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        holder = module.get_submodule(self.path)
        own = holder._parameters[self.leaf]  # or what another mask made of it
        self._own.append(own)
        if own is None:
            return
        holder._parameters[self.leaf] = own * self._factors(own)  # type: ignore[assignment]

    def _masked(self, when: When | None, own: Tensor) -> Tensor:
        return own * self._factors(own) if when is None or when() else own

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
            holder = module.get_submodule(self.path)
            holder._parameters[self.leaf] = self._own.pop()  # type: ignore[assignment]
