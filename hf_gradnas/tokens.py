"""Follow which token each row of a value is of, where a module takes rows out of a sequence.

A router's choice gives every expert other rows. Knows operations that move rows; knows neither
experts nor scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .running.hooks import add_hook, add_pre_hook

PICKS = frozenset(
    "__getitem__ index_select split split_with_sizes tensor_split cat repeat_interleave".split()
)
"""Operations that may take rows out, or put them together."""
MIXES = ("index_add", "index_copy", "index_put", "scatter", "flip", "roll", "sort", "transpose")
"""Operations after which rows are not known any more; also those that begin so."""


class Tokens(TorchFunctionMode):
    """While it is on, follows the rows of a value ``(…, features)``.

    Args:
        x: The value; its rows are the tokens, in order.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.count = x[..., 0].numel()
        numbers = torch.arange(self.count, device=x.device).view(x.shape[:-1])
        # The values are held: the id of one that is gone may come again.
        self._known = {id(x): (x, numbers)}

    def of(self, x: Tensor) -> Tensor | None:
        """Number of the token ``(…)`` of every row of a value ``(…, features)``; None: unknown."""
        return self._known[id(x)][1] if id(x) in self._known else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [self.of(x) for x in _tensors((args, kwargs or {}))]
        known = [numbers for numbers in given if numbers is not None]
        if not known:
            return out
        kind = getattr(func, "__name__", "")
        if kind in PICKS:
            self._note_all(out, self._picked(func, args, kwargs or {}))
        elif not kind.startswith(MIXES):
            for value in _tensors(out):
                self._note(value, _kept(known, value))
        return out

    def _picked(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What the operation makes of the numbers; None where it cannot be run on them."""

        def change(value: Any) -> Any:
            if isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value):
                return type(value)(change(x) for x in value)
            numbers = self.of(value) if isinstance(value, Tensor) else None
            return value if numbers is None else numbers[..., None]

        try:
            return func(*map(change, args), **kwargs)
        except (IndexError, RuntimeError, TypeError):
            return None

    def _note_all(self, out: Any, picked: Any) -> None:
        for value, numbers in zip(_tensors(out), _tensors(picked), strict=False):
            is_rows = numbers.ndim and numbers.shape[-1] == 1
            self._note(value, numbers[..., 0] if is_rows else None)

    def _note(self, value: Tensor, numbers: Tensor | None) -> None:
        if numbers is not None and value.ndim and numbers.shape == value.shape[:-1]:
            self._known[id(value)] = (value, numbers)


def _kept(known: list[Tensor], value: Tensor) -> Tensor | None:
    """Numbers of rows that an operation has left as they were, or has put in another shape."""
    first, *others = known
    if any(x.shape != first.shape or not torch.equal(x, first) for x in others):
        return None
    rows = value.shape[:-1]
    return first.reshape(rows) if first.numel() == rows.numel() else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


class Following:
    """Hooks of a module that follow the rows of its input while it runs."""

    def __init__(self) -> None:
        self._running: list[Tokens] = []

    @property
    def tokens(self) -> Tokens | None:
        """The rows of the present call; None while the module does not run."""
        return self._running[-1] if self._running else None

    def attach(self, stack: ExitStack, module: nn.Module) -> None:
        """Hook into the module until `stack` closes."""
        add_pre_hook(stack, module, self._begin, with_kwargs=True)
        add_hook(stack, module, self._end, always_call=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = next(x for x in _tensors((args, kwargs)) if x.is_floating_point())
        mode = Tokens(x)
        mode.__enter__()
        self._running.append(mode)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._running:
            self._running.pop().__exit__(None, None, None)
