"""Modules and tensors by path, and hooks that go when a block ends, also by an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import StructureError
from ..types import Axis

When = Callable[[], bool]
"""Whether hooks act now; asked at every call."""


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that full name."""
    path, _, leaf = name.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(path), leaf))


def module_at(model: nn.Module, axis: Axis, path: str) -> nn.Module:
    """Return the module of a path that an axis names.

    Raises:
        StructureError: The model has no module of that path.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise StructureError(
            f"{axis.name}: {type(model).__name__} has no module {path!r}; use the axes "
            "that were discovered in this very model."
        ) from error


def add_pre_hook(
    stack: ExitStack, module: nn.Module, hook: Any, *, with_kwargs: bool = False
) -> None:
    """Register a forward pre-hook that goes when `stack` closes, the undo being pushed first."""
    handles: list[RemovableHandle] = []
    stack.callback(_remove, handles)
    handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))


def add_hook(
    stack: ExitStack,
    module: nn.Module,
    hook: Any,
    *,
    with_kwargs: bool = False,
    always_call: bool = False,
    prepend: bool = False,
) -> None:
    """Register a forward hook that goes when `stack` closes, the undo being pushed first."""
    handles: list[RemovableHandle] = []
    stack.callback(_remove, handles)
    settings = {"with_kwargs": with_kwargs, "always_call": always_call, "prepend": prepend}
    handles.append(module.register_forward_hook(hook, **settings))


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def stream_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The residual stream among the arguments of a layer; None where it takes none."""
    return args[0] if args else kwargs.get("hidden_states")


def stream_out(output: Any) -> Any:
    """The residual stream in what a layer returns, alone or before other things."""
    return output[0] if isinstance(output, tuple) and output else output


def only_when(hook: Any, when: When | None) -> Any:
    """A hook that acts while `when` says so; None: always."""
    if when is None:
        return hook
    return lambda *args: hook(*args) if when() else None
