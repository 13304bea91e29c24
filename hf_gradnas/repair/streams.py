"""Where the outputs of readers meet the residual stream.

The best place to see a layer's output beside the original's is the sum of it and the residual
stream: errors of earlier layers are in that, and it has no activation after it. One traced forward
finds these sums by following each output through what leaves its rows in order: views, copies,
factors per feature that are the model's own, and norms with fixed statistics. Where none is found,
the place is the layer's own output.

Knows operations and module calls; knows no architecture, and nothing of least squares.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..running.hooks import add_hook, add_pre_hook
from ..running.offloading import is_offloaded
from ..surgery.rows import Kept, gone_layers
from ..types import Axis
from .memory import address_of, tensors_of
from .readers import Feed, Found, Gate, Place, Reader, others_of, readers_of

aten = torch.ops.aten

# Operations that leave every row of features in its place.
VIEWS = frozenset(
    getattr(aten, name)
    for name in (
        "view _unsafe_view reshape _reshape_alias alias detach clone contiguous _to_copy squeeze "
        "unsqueeze"
    ).split()
)
ADDS = frozenset([aten.add, aten.add_])
FACTORS = frozenset([aten.mul, aten.mul_])
NORMS = frozenset(
    [aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm]
)
_DID_NOT_RUN = "it did not run on the sample, or in inference mode"
_LARGEST_FACTOR = 1 << 16  # values of a tensor that may be a factor per feature


def find_readers(
    model: nn.Module,
    axes: Sequence[Axis],
    kept: Kept,
    call: Mapping[str, Any],
    *,
    examples: int,
) -> Found:
    """Find the layers that lose inputs, and where to compare their outputs, by one forward.

    Args:
        model: The whole model.
        axes: Its axes.
        kept: Kept units per axis name.
        call: Arguments of the forward.
        examples: Examples in it.
    """
    layers = gone_layers(axes, kept)  # nothing in them is run
    gone = tuple(f"{axis.module}." for axis in axes if axis.name in layers)
    staying = [axis for axis in axes if axis.within not in layers]
    readers, reasons = readers_of(model, staying, kept)
    others = {m: path for m, path in others_of(model, readers).items() if not path.startswith(gone)}
    trace = _Trace(model, readers, others, examples)
    with torch.no_grad(), trace.attached():
        model(**call)
    mendable: list[Reader] = []
    for reader in readers:
        times = trace.times.get(reader.path, 0)
        if reader.module in trace.elsewhere:
            reasons[reader.path] = "its weight is read by other code too"
        elif times == 1:
            mendable.append(reader)
        else:
            reasons[reader.path] = f"it runs {times} times in a forward" if times else _DID_NOT_RUN
    return Found(tuple(trace.gates(mendable)), reasons, tuple(trace.times))


Key = tuple[Any, ...]


def _key(tensor: Tensor) -> Key:
    """What tells a tensor from another, also where torch wraps the same memory anew."""
    return (
        address_of(tensor),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
    )


@dataclass(slots=True)
class _Sum:
    """Outputs of readers in one tensor: per path the factor so far, and their feature dimension."""

    factors: dict[str, Tensor | float]
    dim: int
    is_stream: bool = False


@dataclass(slots=True)
class _Fed:
    """One input of others: when it was first read, its shape, who made it, and who reads it."""

    time: int
    shape: torch.Size
    maker: str
    layers: list[tuple[str, nn.Module]] = field(default_factory=list)


@dataclass
class _Trace(TorchDispatchMode):
    """Follows the outputs of readers through one forward.

    Attributes:
        model: The whole model.
        readers: Layers that lose inputs.
        others: Paths of layers that lose none.
        examples: Examples in the forward.
        times: How often a reader ran, by path.
        elsewhere: Readers and others whose weight is read outside their own forward.
    """

    model: nn.Module
    readers: Sequence[Reader]
    others: Mapping[nn.Module, str]
    examples: int
    times: dict[str, int] = field(default_factory=dict)
    elsewhere: set[nn.Module] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self._by_module = {reader.module: reader for reader in self.readers}
        self._sums: dict[Key, _Sum] = {}
        self._held: list[StorageWeakRef] = []  # so that no address is used twice
        self._found: list[tuple[int, Place, _Sum]] = []  # with the time of the event
        self._own: dict[str, tuple[int, Place, torch.Size]] = {}
        self._calls: dict[tuple[str, str], int] = {}
        self._feeds: dict[Key, _Fed] = {}
        self._makers: dict[Key, tuple[weakref.ref[Tensor], str]] = {}
        self._clock = 0
        self._running: list[nn.Module] = []
        self._weights: dict[int, list[tuple[range, nn.Module]]] = {}  # by address of the storage
        for module in (*self._by_module, *self.others):
            for weight in tensors_of((module.weight,)):
                places = range(weight.storage_offset(), weight.storage_offset() + weight.numel())
                self._weights.setdefault(address_of(weight), []).append((places, module))
        own = tensors_of((*self.model.parameters(), *self.model.buffers()))
        self._fixed = {address_of(tensor) for tensor in own}  # what does not depend on the batch
        self._is_away = is_offloaded(self.model)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook into the model within the block, and watch all operations."""
        with ExitStack() as stack:
            for path, module in self.model.named_modules():
                add_pre_hook(stack, module, partial(self._enter, path), with_kwargs=True)
                add_hook(stack, module, partial(self._leave, path))
            stack.enter_context(self)
            yield
        self._held.clear()

    def gates(self, readers: Sequence[Reader]) -> Iterator[Gate]:
        """Gates in running order; a reader that no stream was found for has one of its own."""
        left = {reader.path: reader for reader in readers}
        events: list[tuple[int, Gate]] = []
        for time, place, found in self._found:
            paths = [path for path in found.factors if path in left]
            chosen = tuple(left.pop(path) for path in paths)
            if chosen:
                scales = tuple(found.factors[path] for path in paths)
                events.append((time, Gate(place, chosen, scales)))
        for path, reader in left.items():
            time, place, shape = self._own[path]
            of_examples = shape[0] == self.examples
            own = replace(reader, alone=not (of_examples or _has_positions(shape, self.examples)))
            events.append((time, Gate(place, (own,), (1.0,))))
        for fed in self._feeds.values():
            of_examples = fed.shape[0] == self.examples
            is_fixed = of_examples or _has_positions(fed.shape, self.examples)
            layers = tuple(pair for pair in fed.layers if pair[1] not in self.elsewhere)
            if layers and is_fixed and all(self._calls[path, "input"] == 0 for path, _ in layers):
                feed = Feed(layers, fed.maker)
                events.append((fed.time, Gate(Place(feed.path, "input", 0), (feed,), (1.0,))))
        yield from (gate for _, gate in sorted(events, key=lambda event: event[0]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = list(tensors_of((args, kwargs or {})))
        self._note_elsewhere(given)
        self._note_fixed(given, out)
        if self._sums:
            self._follow(func.overloadpacket, args, kwargs or {}, out)
        return out

    def _note_elsewhere(self, given: Sequence[Tensor]) -> None:
        """Note layers whose weight is among operands, but which do not run."""
        for tensor in given:
            for places, module in self._weights.get(address_of(tensor), ()):
                if tensor.storage_offset() in places and module not in self._running[-1:]:
                    self.elsewhere.add(module)

    def _note_fixed(self, given: Sequence[Tensor], out: Any) -> None:
        """Note what is made of weights and buffers alone, such as a scale of fixed statistics."""
        is_fixed = bool(given) and all(map(self._is_fixed, given))
        for tensor in tensors_of((out,)):
            if not is_fixed:
                self._fixed.discard(address_of(tensor))  # a buffer that was written to
            elif tensor.numel() <= _LARGEST_FACTOR and not self._is_loaded(tensor):
                self._held.append(StorageWeakRef(tensor.untyped_storage()))
                self._fixed.add(address_of(tensor))

    def _is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor does not depend on the batch."""
        return address_of(tensor) in self._fixed or self._is_loaded(tensor)

    def _is_loaded(self, tensor: Tensor) -> bool:
        """Whether a tensor is of a weight that was loaded for a call that is running."""
        if not self._is_away:
            return False
        parts = (module._parameters.values() for module in self._running)
        weights = tensors_of(weight for part in parts for weight in part)
        return any(address_of(weight) == address_of(tensor) for weight in weights)

    def _follow(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Give the result of an operation the readers that are in its operands."""
        known = [a for a in tensors_of(args) if _key(a) in self._sums]
        if not known:
            return
        first = out[0] if isinstance(out, tuple | list) and out else out
        if not isinstance(first, Tensor):
            return
        result = self._result(op, args, kwargs, first)
        for tensor in known:  # what is read by anything but a view is no place to mend later
            if op not in VIEWS:
                self._sums.pop(_key(tensor), None)
        if result is not None:
            self._put(first, result)

    def _result(
        self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor
    ) -> _Sum | None:
        left, right = (*map(self._known, args[:2]), None)[:2]
        if op in VIEWS and left is not None:
            return left if _keeps_rows(args[0], out, left.dim) else None
        if op in ADDS and kwargs.get("alpha", 1) == 1:
            return self._added(args, left, right, out)
        if op in FACTORS and (left is None) != (right is None):
            known, other = (left, args[1]) if left is not None else (right, args[0])
            if isinstance(other, Tensor) and not self._is_fixed(other):
                return None
            return _scaled(cast(_Sum, known), other, out)
        is_fixed = op in NORMS and isinstance(args[4], Tensor)  # else of the batch's statistics
        if is_fixed and left is not None and not left.is_stream and left.dim == 1:
            return _normed(left, args)
        return None

    def _known(self, value: Any) -> _Sum | None:
        is_alone = isinstance(value, Tensor)
        return next((self._sums.get(_key(t)) for t in tensors_of((value,)) if is_alone), None)

    def _added(
        self, args: tuple[Any, ...], left: _Sum | None, right: _Sum | None, out: Tensor
    ) -> _Sum | None:
        known = left if left is not None else cast(_Sum, right)
        if left is not None and right is not None:
            if left.dim != right.dim or args[0].shape != args[1].shape:
                return None
            both = {**left.factors, **right.factors}
            return _Sum(both, left.dim, left.is_stream or right.is_stream)
        place = 0 if left is not None else 1
        tensor, other = args[place], args[1 - place]
        if not isinstance(other, Tensor):
            return _Sum(known.factors, known.dim, known.is_stream)
        if tensor.shape != out.shape:
            return None
        is_stream = known.is_stream or other.shape == out.shape
        return _Sum(known.factors, known.dim, is_stream)

    def _put(self, tensor: Tensor, found: _Sum) -> None:
        self._held.append(StorageWeakRef(tensor.untyped_storage()))
        self._sums[_key(tensor)] = found

    def _enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        call = self._count(path, "input")
        self._running.append(module)
        if torch.is_inference_mode_enabled():  # a forward that waits there leaves it to others
            return
        if module in self.others and args and isinstance(args[0], Tensor):
            self._held.append(StorageWeakRef(args[0].untyped_storage()))
            key = _key(args[0])
            made, maker = self._makers.get(key, (lambda: None, ""))
            fed = _Fed(self._clock, args[0].shape, maker if made() is not None else "")
            self._feeds.setdefault(key, fed).layers.append((path, module))
        values: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for key, value in values.items():
            self._see(Place(path, "input", key, call), value)

    def _leave(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._count(path, "output")
        self._running.pop()
        if torch.is_inference_mode_enabled():
            return
        for key, value in _leaves(output):
            self._see(Place(path, "output", key, call), value)
        for tensor in tensors_of((output,)):
            self._makers[_key(tensor)] = (weakref.ref(tensor), path)
        reader = self._by_module.get(module)
        if reader is None or not isinstance(output, Tensor):
            return
        self.times[reader.path] = self.times.get(reader.path, 0) + 1
        self._own[reader.path] = (self._clock, Place(path, "output", None), output.shape)
        dim = 1 if reader.is_conv else output.dim() - 1
        self._put(output, _Sum({reader.path: 1.0}, dim))

    def _count(self, path: str, side: str) -> int:
        self._clock += 1
        self._calls[path, side] = self._calls.get((path, side), -1) + 1
        return self._calls[path, side]

    def _see(self, place: Place, value: Any) -> None:
        """Note where a stream is first among the arguments or results of a module."""
        if not isinstance(value, Tensor):
            return
        found = self._sums.get(_key(value))
        if found is not None and found.is_stream:
            del self._sums[_key(value)]
            self._found.append((self._clock, place, found))


def _has_positions(shape: Sequence[int], examples: int) -> bool:
    """Whether rows are positions, or windows of them, of each example in turn."""
    return len(shape) > 2 and shape[0] % examples == 0  # noqa: PLR2004 - (rows, seq, features)


def _keeps_rows(before: Tensor, after: Tensor, dim: int) -> bool:
    """Whether a view has the same features per row; of maps it must have the same shape."""
    if dim == 1 and before.dim() > 2:  # noqa: PLR2004 - (batch, channels, …)
        return before.shape == after.shape
    return after.dim() > 0 and before.shape[-1] == after.shape[-1]


def _scaled(found: _Sum, other: Any, out: Tensor) -> _Sum | None:
    """The sum times a number or a vector over features; None for any other factor."""
    if found.is_stream:
        return None
    factor: Tensor | float
    if isinstance(other, int | float) or (isinstance(other, Tensor) and other.numel() == 1):
        factor = float(other.detach() if isinstance(other, Tensor) else other)
    elif isinstance(other, Tensor) and _is_per_feature(other, out, found.dim):
        factor = other.detach().flatten().clone()
    else:
        return None
    factors = {path: own * factor for path, own in found.factors.items()}
    return _Sum(factors, found.dim)


def _is_per_feature(other: Tensor, out: Tensor, dim: int) -> bool:
    """Whether a factor has one value per feature."""
    shape = [1] * (out.dim() - other.dim()) + list(other.shape)
    return all(size == (out.shape[dim] if n == dim else 1) for n, size in enumerate(shape))


def _normed(found: _Sum, args: tuple[Any, ...]) -> _Sum:
    """The sum after a batch norm with fixed statistics: one factor per channel."""
    weight, variance = args[1], args[4]
    scale = torch.rsqrt(variance + float(args[-1])) * (1.0 if weight is None else weight)
    factors: dict[str, Tensor | float] = {}
    for path, own in found.factors.items():
        factors[path] = own * scale.detach()
    return _Sum(factors, found.dim)


def _leaves(output: Any) -> Iterator[tuple[int | str | None, Any]]:
    """Values of a result with the key by which they are found again."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, tuple | list):
        yield from enumerate(output)
    else:
        yield None, output
