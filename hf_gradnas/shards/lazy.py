"""Tensors that stand for numbers in files, so that code of Transformers and ours runs on them.

Loading renames, stacks and splits tensors; a cut takes rows of them; saving does the reverse of
loading. All of this runs on `LazyTensor` as on any tensor, and reads nothing: each result says
where its numbers come from (`parts`). An operation that is not known here is kept as it is, and run
when its result is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CutError
from .parts import (
    Cast,
    Computed,
    Flat,
    Joined,
    Part,
    Taken,
    TakenEach,
    Turned,
    Widened,
)

aten = torch.ops.aten
CPU = torch.device("cpu")
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]  # a descriptor


class LazyTensor(Tensor):
    """A tensor on the CPU of which only shape and type are there.

    Attributes:
        part: Where its numbers come from.
    """

    part: Part

    @staticmethod
    def __new__(cls: type[LazyTensor], part: Part) -> LazyTensor:
        """A tensor of a part."""
        made = Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype, device=CPU)
        made.part = part
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.numpy:
            found = args[0].part.whole().numpy()
            found.flags.writeable = False  # nobody would see it
            return found
        if func is Tensor.__dlpack__:
            raise _refused("__dlpack__")
        # Below this, its index is as large as the tensor.
        if func in (Tensor.take_along_dim, torch.take_along_dim):
            found = _take_along_dim(*_parts(args), **_parts(kwargs or {}))
            if found is not None:
                return LazyTensor(found)
        if func == SET_DATA:
            return _pointed(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as PyTorch calls it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = RULES.get(func)
        found = None if rule is None else rule(*_parts(args), **_parts(kwargs or {}))
        return computed(func, args, kwargs or {}) if found is None else _lazy(found)


def _lazy(found: Any) -> Any:
    if isinstance(found, Part):
        return LazyTensor(found)
    return [LazyTensor(part) for part in found]


def _parts(value: Any) -> Any:
    """Arguments with parts in place of lazy tensors."""
    if isinstance(value, LazyTensor):
        return value.part
    if isinstance(value, Mapping):
        return {name: _parts(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_parts(inner) for inner in value)
    return value


# --- any operation --------------------------------------------------------------------------------


def computed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation without a rule, to be computed when it is read.

    Raises:
        CutError: The operation writes into its arguments.
    """
    if func._schema.is_mutable:
        return _overwritten(func, args, kwargs)
    given = _parts(args), _parts(kwargs)
    try:
        shown = func(*_on_meta(args), **_on_meta(kwargs))
    except (NotImplementedError, RuntimeError):  # its result depends on the numbers
        return func(*_numbers(args), **_numbers(kwargs))
    if isinstance(shown, Tensor):
        return LazyTensor(Computed(func, *given, shown, is_fresh=_is_fresh(func)))
    if isinstance(shown, list | tuple) and all(isinstance(x, Tensor) for x in shown):
        made = (Computed(func, *given, x, n, is_fresh=_is_fresh(func)) for n, x in enumerate(shown))
        return [LazyTensor(part) for part in made]
    return func(*_numbers(args), **_numbers(kwargs))


def _is_fresh(func: Any) -> bool:
    """Whether an operation makes a tensor of its own, rather than a view."""
    return all(each.alias_info is None for each in func._schema.returns)


def _overwritten(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Note that an operation writes into the results of others.

    They may be written into as long as nobody saves them, nor what is made of them: the part
    itself is marked, since other names of the same tensor (``x.detach()``, ``x.data``) hold it too.
    """
    given = {each.name: value for each, value in zip(func._schema.arguments, args, strict=False)}
    given |= kwargs
    infos = {each.name: each.alias_info for each in func._schema.arguments}
    written = [x for name, x in given.items() if infos[name] is not None and infos[name].is_write]
    for x in written:
        if not (isinstance(x, LazyTensor) and isinstance(x.part, Computed) and x.part.is_fresh):
            raise _refused(func)
    for x in written:
        x.part.written_by = str(func)
    return written[0]


def _pointed(x: Tensor, other: Any) -> None:
    """``x.data = other``: its numbers are those of the other from now on."""
    if not (isinstance(x, LazyTensor) and isinstance(other, LazyTensor)):
        raise _refused("data")
    with torch._C.DisableTorchFunctionSubclass():
        SET_DATA(x, other)
    x.part = other.part


def _refused(func: Any) -> CutError:
    return CutError(
        f"{func}: would write into a tensor that is only read from the checkpoint's files, so "
        "that the model cannot be cut from them; load it, and cut it in memory (prune)."
    )


def _on_meta(value: Any) -> Any:
    return _mapped(value, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"))


def _numbers(value: Any) -> Any:
    return _mapped(value, lambda x: x.part.whole() if isinstance(x, LazyTensor) else x)


def _mapped(value: Any, change: Callable[[Any], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(inner, change) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(inner, change) for inner in value)
    return value


# --- operations that only choose and arrange ------------------------------------------------------


def _same(x: Part, *_: Any, **__: Any) -> Part:
    return x


def _to(x: Part, *, dtype: torch.dtype | None = None, **_: Any) -> Part:
    return x if dtype is None or dtype is x.dtype else Cast(x, dtype)


def _dim(x: Part, dim: int) -> int:
    return dim % len(x.shape)


def _range(x: Part, dim: int, start: int, stop: int, step: int = 1) -> Part:
    if (start, stop, step) == (0, x.shape[dim], 1):
        return x
    return Taken(x, dim, torch.arange(start, stop, step))


def _index_select(x: Any, dim: int, index: Any) -> Part | None:
    return None if isinstance(index, Part) else Taken(x, _dim(x, dim), index.long().clone())


def _slice(
    x: Part, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Part:
    dim = _dim(x, dim)
    return _range(x, dim, *slice(start, end, step).indices(x.shape[dim]))


def _select(x: Part, dim: int, index: int) -> Part:
    dim = _dim(x, dim)
    return x.at(dim, index % x.shape[dim])


def _unbind(x: Part, dim: int = 0) -> list[Part]:
    return [_select(x, dim, place) for place in range(x.shape[_dim(x, dim)])]


def _split(x: Part, size: int, dim: int = 0) -> list[Part]:
    dim = _dim(x, dim)
    total = x.shape[dim]
    starts = range(0, max(total, 1), max(size, 1))
    return [_range(x, dim, start, min(start + size, total)) for start in starts]


def _split_with_sizes(x: Part, sizes: list[int], dim: int = 0) -> list[Part]:
    dim, found, start = _dim(x, dim), [], 0
    for size in sizes:
        found.append(_range(x, dim, start, start + size))
        start += size
    return found


def _cat(parts: list[Any], dim: int = 0) -> Part | None:
    if not all(isinstance(part, Part) for part in parts):
        return None
    if len({part.dtype for part in parts}) > 1 or len({len(part.shape) for part in parts}) > 1:
        return None
    return Joined(parts, _dim(parts[0], dim))


def _stack(parts: list[Any], dim: int = 0) -> Part | None:
    if not all(isinstance(part, Part) for part in parts):
        return None
    dim = dim % (len(parts[0].shape) + 1)
    return _cat([Widened(part, dim) for part in parts], dim)


def _transpose(x: Part, first: int, second: int) -> Part:
    order = list(range(len(x.shape)))
    first, second = _dim(x, first), _dim(x, second)
    order[first], order[second] = second, first
    return Turned(x, tuple(order))


def _t(x: Part) -> Part:
    return _transpose(x, 0, 1) if len(x.shape) > 1 else x


def _permute(x: Part, dims: list[int]) -> Part:
    return Turned(x, tuple(_dim(x, dim) for dim in dims))


def _unsqueeze(x: Part, dim: int) -> Part:
    return Widened(x, dim % (len(x.shape) + 1))


def _squeeze(x: Part, dim: int) -> Part:
    dim = _dim(x, dim)
    return x.at(dim, 0) if x.shape[dim] == 1 else x


def _view(x: Part, size: list[int]) -> Part | None:
    return Flat(x) if len(size) == 1 and len(x.shape) > 1 else None


def _expand(x: Any, size: list[int], **_: Any) -> Part | None:
    return x if isinstance(x, Part) and tuple(size) == x.shape else None


def _take_along_dim(x: Any, index: Any, dim: int | None = None) -> Part | None:
    """Rows of each matrix of a stack, where the index is the same for all other dimensions."""
    if not isinstance(x, Part) or isinstance(index, Part) or dim is None:
        return None
    dim = _dim(x, dim)
    sizes = [size for place, size in enumerate(index.shape) if place not in (0, dim)]
    if dim == 0 or index.ndim != len(x.shape) or {*sizes, 1} != {1}:
        return None
    rows = index.reshape(index.shape[0], -1).clone()  # may be written into later
    return TakenEach(x, dim, rows.expand(x.shape[0], -1))


RULES: dict[Any, Callable[..., Part | list[Part] | None]] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.lift_fresh.default: _same,
    aten._to_copy.default: _to,
    aten.index_select.default: _index_select,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.view.default: _view,
    aten.expand.default: _expand,
}
"""What each operation makes of parts; None: it is computed when it is read."""
