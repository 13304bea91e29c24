"""Equal layers: the first two of them run, and what is found in the second holds for the others.

A forward with a graph, and the labels of all that it computes, are most of the cost of discovery;
a deep model computes the same dozens of times. Layers of a list are equal if they, and all modules
in them, have the same classes, shapes and attributes, but for the number of the layer. One is
passed over if it is called as the second was, but for its stream (the first tensor that it takes),
and the second returned a stream of that form. It then returns its stream as it came.

That says the same as if it had run where the labels of the second's stream are the same at both
ends, and where the first two layers show the same. If not, `UnlikeLayers` is raised: all layers
have to run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .steps import Edge
from .trace import Call

SHOWN = 1
"""Place of the layer that shows what is in the ones after it, among equal ones."""
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.Size)
BETWEEN = 1 << 20
"""More operations than a layer runs."""
T = TypeVar("T")


class UnlikeLayers(Exception):
    """Layers that seem equal are not: all of them have to run."""


# --- which layers are equal -----------------------------------------------------------------------


@dataclass
class Group:
    """Equal layers of a list, and what happens when they are called.

    Attributes:
        layers: Path and module of each, in the order of the list.
        ran: Arguments, keyword arguments and output of the layer that shows what is in the others,
            and where its stream came from; one entry a call.
        passed: Paths of those that were passed over.
    """

    layers: Sequence[tuple[str, nn.Module]]
    ran: list[tuple[tuple[Any, ...], dict[str, Any], Any, Edge]] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Pass over layers inside the ``with``; their hooks run as ever."""
        with ExitStack() as stack:
            for path, layer in self.layers[SHOWN:]:
                stack.callback(setattr, layer, "__class__", type(layer))
                layer.__class__ = self._watching(type(layer), path)
            yield

    def _watching(self, kind: type[nn.Module], path: str) -> type[nn.Module]:
        """The class of a layer with a forward that notes what it does, or does nothing."""
        run: Callable[..., Any] = kind.forward

        @wraps(run)
        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            stream = _stream(args, kwargs)
            if path == self.layers[SHOWN][0]:
                came = _edge(stream)
                output = run(layer, *args, **kwargs)
                self.ran.append((args, kwargs, output, came))
                return output
            if path in self.passed:
                raise UnlikeLayers(f"{path} runs twice")
            if len(self.ran) != 1 or not self._is_called_alike(args, kwargs):
                return run(layer, *args, **kwargs)
            self.passed.append(path)
            output = self.ran[0][2]
            return stream if isinstance(output, Tensor) else (stream, *output[1:])

        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        return type(kind.__name__, (kind,), {**names, "forward": forward})

    def _is_called_alike(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call differs in nothing but the stream, and that is what will come out."""
        shown_args, shown_kwargs, output, _ = self.ran[0]
        stream, shown = _stream(args, kwargs), _stream(shown_args, shown_kwargs)
        out = _first(output)
        if stream is None or shown is None or out is None or kwargs.keys() != shown_kwargs.keys():
            return False
        if len({(x.shape, x.dtype, x.device) for x in (stream, shown, out)}) > 1:
            return False
        given = (args, tuple(kwargs[name] for name in shown_kwargs))
        shown_given = (shown_args, tuple(shown_kwargs.values()))
        return _is_alike(given, shown_given, {id(stream): id(shown)})


def equal_layers(model: nn.Module) -> list[Group]:
    """The groups of equal layers of which some can be passed over; none is inside another.

    Layers with convolutions always run, since channels may be tied through all of them, and so do
    those that share a module or a parameter with any other.
    """
    modules = list(model.modules())
    held = Counter(id(child) for module in modules for child in module._modules.values())
    held.update(id(p) for module in modules for p in module._parameters.values() if p is not None)

    def is_fit(layer: nn.Module) -> bool:
        parts = list(layer.modules())
        owners = [part for part in parts if part._parameters or part._buffers]
        is_alone = all(held[id(part)] == 1 for part in (layer, *owners, *layer.parameters()))
        return is_alone and len(parts) > 1 and not any(isinstance(p, _ConvNd) for p in parts)

    def visit(path: str, module: nn.Module) -> Iterator[Group]:
        groups: list[list[tuple[int, str, nn.Module]]] = []
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        for place, (name, layer) in enumerate(module.named_children()):
            entry = (place, f"{path}.{name}".lstrip("."), layer)
            equal = (g for g in groups if is_list and _is_equal(g[0][2], layer, place - g[0][0]))
            group = next(equal, None)
            if group is None:
                groups.append([entry])
            else:
                group.append(entry)
        for group in groups:
            layers = [(inner, layer) for _, inner, layer in group]
            if len(layers) > SHOWN + 1 and all(is_fit(layer) for _, layer in layers):
                yield Group(layers)
            else:
                for inner, layer in layers:
                    yield from visit(inner, layer)

    return list(visit("", model))


def _is_equal(module: nn.Module | None, other: nn.Module | None, shift: int) -> bool:
    """Whether modules are equal, but for numbers that differ by as much as their places."""
    if module is None or other is None or type(module) is not type(other):
        return module is other
    own, others = vars(module), vars(other)
    inner, outer = own["_modules"], others["_modules"]
    if own.keys() != others.keys() or inner.keys() != outer.keys():
        return False
    names = (own.keys() - OF_EVERY_MODULE) | {"_parameters", "_buffers"}
    same = (_is_same(own[name], others[name], shift) for name in names)
    return all(same) and all(_is_equal(inner[name], outer[name], shift) for name in inner)


def _is_same(value: Any, other: Any, shift: int) -> bool:
    """Whether attributes are one object, plain and equal, or tensors of one form."""
    if value is other or type(value) is not type(other):
        return value is other
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device) == (other.shape, other.dtype, other.device)
    if isinstance(value, partial):
        value, other = ((part.func, part.args, part.keywords) for part in (value, other))
    if isinstance(value, dict):
        value, other = tuple(value.items()), tuple(other.items())
    if isinstance(value, tuple | list):
        pairs = zip(value, other, strict=False)
        return len(value) == len(other) and all(_is_same(a, b, shift) for a, b in pairs)
    is_shifted = type(value) is int and other - value == shift
    return is_shifted or (isinstance(value, PLAIN) and bool(value == other))


def _is_alike(value: Any, other: Any, streams: Mapping[int, int]) -> bool:
    """Whether arguments are one object, plain and equal, or the streams of a pair (by ``id``)."""
    if id(value) in streams:
        return id(other) == streams[id(value)]
    if isinstance(value, list | dict):  # layers may leave something there
        return False
    if type(value) is tuple and type(other) is tuple:
        pairs = zip(value, other, strict=False)
        return len(value) == len(other) and all(_is_alike(a, b, streams) for a, b in pairs)
    return value is other or (isinstance(value, PLAIN) and _is_same(value, other, 0))


def _stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor of a call."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def _first(output: Any) -> Tensor | None:
    """What a layer returns for its stream."""
    first = output[0] if type(output) is tuple and output else output
    return first if isinstance(first, Tensor) else None


def _edge(x: Tensor | None) -> Edge:
    return (None, 0) if x is None else (x.grad_fn, x.output_nr)


# --- what is found in a layer that ran holds for others -------------------------------------------


@dataclass(frozen=True)
class Repeat:
    """A layer that shows what another one showed.

    Attributes:
        path: Its path.
        shown: Path of the other.
        time: When it was called, as the graph counts.
        start: When the other was called.
    """

    path: str
    shown: str
    time: float
    start: float

    def moved(self, value: Any) -> Any:
        """A name, a text, or data that hold names, with this layer's path for the other's."""
        if type(value) is str:
            return re.sub(rf"(?<![\w.]){re.escape(self.shown)}(?!\w)", self.path, value)
        if type(value) is tuple:
            return tuple(map(self.moved, value))
        if is_dataclass(value) and not isinstance(value, type):
            given = {item.name: self.moved(getattr(value, item.name)) for item in fields(value)}
            return replace(value, **given)
        return value

    def moment(self, time: float) -> float:
        """When this layer would have done what the other did."""
        return self.time + (time - self.start) / BETWEEN

    def inner(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are inside the other layer."""
        return [name for name in names if name.startswith(f"{self.shown}.")]

    def holds(self, names: Iterable[str]) -> bool:
        """Whether the other layer holds what is named.

        Raises:
            UnlikeLayers: It holds some of it only.
        """
        inside = {f"{name}.".startswith(f"{self.shown}.") for name in names}
        if len(inside) > 1:
            raise UnlikeLayers(f"{self.shown} shares something with other layers")
        return inside == {True}


@dataclass(frozen=True)
class Repeats:
    """What was passed over in a forward.

    Attributes:
        passed: Layers that were passed over, as they were called.
        checks: Layers that ran, as repeats of the first ones of their groups.
        streams: Where the streams of these layers began and ended, in the graph.
    """

    passed: tuple[Repeat, ...] = ()
    checks: tuple[Repeat, ...] = ()
    streams: tuple[tuple[Edge, Edge], ...] = ()

    @classmethod
    def of(cls, groups: Iterable[Group], began: Mapping[str, float]) -> Repeats:
        """What the groups saw of a forward in which modules first ran at these moments."""

        def repeat(path: str, shown: str) -> Repeat:
            return Repeat(path, shown, began[path], began[shown])

        used = [group for group in groups if group.passed]
        names = [[path for path, _ in group.layers] for group in used]
        pairs = [(p, paths[SHOWN]) for g, paths in zip(used, names, strict=True) for p in g.passed]
        return cls(
            tuple(sorted((repeat(*pair) for pair in pairs), key=lambda r: r.time)),
            tuple(repeat(paths[SHOWN], paths[0]) for paths in names),
            tuple((came, _edge(_first(output))) for g in used for _, _, output, came in g.ran),
        )

    def with_inner(
        self, calls: Mapping[str, Call], began: Mapping[str, float]
    ) -> tuple[dict[str, Call], dict[str, float]]:
        """Calls of modules and when they began, with those in the layers that were passed over."""
        repeats, called, times = {repeat.path: repeat for repeat in self.passed}, {}, {}
        for path, call in calls.items():
            called[path], times[path] = call, began[path]
            for inner in repeats[path].inner(calls) if path in repeats else ():
                moved = repeats[path].moved(inner)
                called[moved], times[moved] = calls[inner], repeats[path].moment(began[inner])
        return called, times

    def spread(
        self,
        found: Iterable[tuple[float, T]],
        names: Callable[[T], Iterable[str]],
        *,
        is_compared: bool = True,
    ) -> list[tuple[float, T]]:
        """What was found, and when, and the same in the layers that were passed over.

        Args:
            found: In running order.
            names: Names of all modules and tensors that belong to it.
            is_compared: It has to be the same in the first two layers.

        Raises:
            UnlikeLayers: The first two layers of a group differ, or layers have something together.
        """
        spread = list(found)
        for check in self.checks if is_compared else ():
            first = [check.moved(item) for _, item in spread if check.holds(names(item))]
            there = replace(check, shown=check.path)
            if first != [item for _, item in spread if there.holds(names(item))]:
                raise UnlikeLayers(f"{check.path} differs from {check.shown}")
        for repeat in self.passed:
            new = [
                (repeat.moment(time), repeat.moved(item))
                for time, item in spread
                if repeat.holds(names(item))
            ]
            later = (place for place, (time, _) in enumerate(spread) if time > repeat.time)
            place = next(later, len(spread))
            spread[place:place] = new
        return spread
