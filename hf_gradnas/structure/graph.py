"""The graph of one forward, as autograd recorded it, and the labels of channels in it.

Every layer that makes channels gives each of them a label, and the operations in between move and
join the labels as they move and join the channels. In which dimension of a tensor the channels
are is what autograd saved (`channel_rules`), so that nothing is guessed from shapes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..running.states import evaluating, unfrozen
from .labels import Labels, Rows, nobody, spread, strided
from .repeats import Group, Repeats
from .rules import MAKING, is_product, rule_of
from .steps import Edge, Function, Step, is_leaf, kind_of, unknown
from .trace import Call, map_tensors


@dataclass(frozen=True)
class Run:
    """First call of a module: the value that it returned, by its place in the autograd graph."""

    path: str
    module: nn.Module
    edge: Edge


@dataclass(frozen=True)
class Forward:
    """One traced forward.

    Attributes:
        functions: Autograd functions in running order.
        runs: First call of each module whose output is in the graph, as they end.
        outputs: The model's outputs.
        calls: First call of each module by path, as they begin.
        moments: Moments at which another module began to run, and its path, in order.
        began: Moment at which each module first ran.
        repeats: Layers that were passed over; they have calls, but no runs.
    """

    functions: tuple[Function, ...]
    runs: tuple[Run, ...]
    outputs: tuple[Edge, ...]
    calls: Mapping[str, Call]
    moments: Sequence[tuple[int, str]]
    began: Mapping[str, float]
    repeats: Repeats

    def running(self, time: int) -> str:
        """Path of the module that ran at a moment."""
        place = bisect_right(self.moments, time, key=lambda moment: moment[0]) - 1
        return self.moments[place][1] if place >= 0 else ""


def trace_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    groups: Sequence[Group] = (),
) -> Forward:
    """Run the model in eval mode, and collect the graph of the forward.

    The model is left as it was; whatever its forward raises is raised.

    Args:
        model: Any module.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        groups: Equal layers, of which some are passed over.
    """
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(unfrozen(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for path, module in model.named_modules():
            enter, leave = watch.hooks(path)
            before = module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            stack.callback(before.remove)  # first: what came, not what other hooks make of it
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        for group in groups:
            stack.enter_context(group.watched())
        output = model(*map_tensors(args, _joined), **map_tensors(dict(kwargs), _joined))
    _let_go(model)
    results = [x for x in _tensors(output) if x.grad_fn is not None]
    if not results:
        raise StructureError(
            f"{type(model).__name__}: no tensor that its forward returns depends on its "
            "parameters through autograd; let the forward return its output as a tensor, "
            "without torch.no_grad()."
        )
    outputs = tuple((x.grad_fn, x.output_nr) for x in results)
    began: dict[str, float] = {path: time for time, path in reversed(watch.moments)}
    repeats = Repeats.of(groups, began)
    calls, began = repeats.with_inner(watch.calls, began)
    passed = {repeat.path for repeat in repeats.passed}
    runs = tuple(run for path, run in watch.runs.items() if path not in passed)
    ends = [f for f, _ in (*outputs, *(run.edge for run in runs))]
    return Forward(_in_order(ends), runs, outputs, calls, watch.moments, began, repeats)


def _let_go(model: nn.Module) -> None:
    """Take the graph off what the forward left in its modules (caches of biases)."""
    for module in model.modules():
        own = vars(module)
        for held in (own, *(value for value in own.values() if type(value) is dict)):
            for name, value in held.items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    held[name] = value.detach()


def _joined(x: Tensor) -> Tensor:
    """A copy of an input that has a place in the graph."""
    return x.detach().clone().requires_grad_().clone() if x.is_floating_point() else x


class _Watch:
    """Hooks that note which module runs when, and with what."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.calls: dict[str, Call] = {}
        self.moments: list[tuple[int, str]] = []
        self._running = [""]
        self._leaf = torch.zeros((), requires_grad=True)

    def hooks(self, path: str) -> tuple[Any, Any]:
        """Forward pre-hook and forward hook of the module at a path."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls.setdefault(path, Call(args, dict(kwargs), ()))
            self._running.append(path)
            self._note()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            self._note()
            call = self.calls[path]
            if not call.returns and isinstance(output, tuple):
                shapes = [tuple(o.shape) if isinstance(o, Tensor) else None for o in output]
                names = {id(x): name for name, x in call.kwargs.items() if isinstance(x, Tensor)}
                returns = (names.get(id(o), s) for o, s in zip(output, shapes, strict=True))
                self.calls[path] = replace(call, returns=tuple(returns))
            first = next(iter(_tensors(output)), None)
            if path not in self.runs and first is not None and first.grad_fn is not None:
                self.runs[path] = Run(path, module, (first.grad_fn, first.output_nr))

        return enter, leave

    def _note(self) -> None:
        with torch.enable_grad():
            now = (self._leaf * 1).grad_fn
        self.moments.append((int(now._sequence_nr()), self._running[-1]))  # type: ignore[union-attr]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an output of any structure."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _in_order(functions: Iterable[Function]) -> tuple[Function, ...]:
    """All functions of a graph in the order in which the forward ran them."""
    waiting, seen = list(functions), dict[Function, None]()
    while waiting:
        function = waiting.pop()
        if function not in seen and not is_leaf(function):
            seen[function] = None
            waiting += [f for f, _ in function.next_functions if f is not None]
    return tuple(sorted(seen, key=lambda function: int(function._sequence_nr())))


WHOLE = frozenset("T Mm Addmm Linear Convolution Embedding Index IndexSelect".split())
"""Operations that take a matrix of parameters as it is: its rows are known by them."""
MAX_TABLE = 1 << 16
"""Parameters with more entries are not labelled entry by entry."""


class Flow:
    """The labels of every value of a traced forward.

    Args:
        functions: Autograd functions of the forward in running order.
        names: Name of every parameter by ``id``.
        constants: Names of tables whose values count as constants.
    """

    def __init__(
        self,
        functions: Sequence[Function],
        names: Mapping[int, str],
        *,
        constants: Iterable[str] = (),
    ) -> None:
        self.labels = Labels()
        self.labels.constants.update(constants)
        self._names = names
        self._leaves: dict[int, Tensor] = {}
        self._values: dict[Edge, Tensor] = {}
        self._products: set[Function] = set()
        self._plain: set[Function] = set()
        self._tables = {
            id(edge[0].variable): edge[0].variable
            for function in functions
            for edge in function.next_functions
            if edge[0] is not None and is_leaf(edge[0]) and kind_of(function) not in WHOLE
            if edge[0].variable.numel() <= MAX_TABLE
        }
        for function in functions:
            self._run(function)
        self.labels.bind_later()

    def at(self, edge: Edge) -> Tensor | None:
        """Labels of the value behind an edge, by their roots; None if it needs no gradient."""
        function, _ = edge
        if function is None:
            return None
        found = self._leaf(function.variable) if is_leaf(function) else self._values.get(edge)
        return None if found is None else self.labels.settled(found)

    def is_same(self, first: Edge, second: Edge) -> bool:
        """Whether the values behind two edges have the same labels."""
        one, other = self.at(first), self.at(second)
        return one is not None and other is not None and torch.equal(strided(one), strided(other))

    def _leaf(self, variable: Tensor) -> Tensor:
        """A parameter is labelled entry by entry, but for the matrices of products."""
        if id(variable) not in self._leaves:
            labels = nobody(variable.shape)
            name = self._names.get(id(variable))
            long = [dim for dim, size in enumerate(variable.shape) if size > 1]
            if name is not None and len(long) == 1:
                vector = self.labels.fresh(variable.shape[long[0]])
                self.labels.bind(Rows(name, long[0]), vector)
                labels = spread(vector, long[0], variable.shape)
            elif name is not None and id(variable) in self._tables and long:
                labels = self.labels.fresh(variable.numel()).view(variable.shape)
                self.labels.tables[name] = labels
            self._leaves[id(variable)] = labels
        return self._leaves[id(variable)]

    def _is_plain(self, edge: Edge) -> bool:
        """Whether a value is computed from parameters and constants alone."""
        function, _ = edge
        if function is None or function in self._plain:
            return True
        return is_leaf(function) and id(function.variable) in self._names

    def _run(self, function: Function) -> None:
        kind, edges = kind_of(function), function.next_functions
        shapes = [tuple(m.shape) for m in function._input_metadata]
        operands = [self.at(edge) for edge in edges]
        products = [edge[0] in self._products for edge in edges]
        if all(x is None for x in operands):  # it depends on constants only
            return
        plain = [self._is_plain(edge) for edge in edges]
        step = Step(
            self.labels, self._names, function, kind, edges, operands, products, plain, shapes
        )
        rule = rule_of(step)
        if is_product(step, rule):
            self._products.add(function)
        if all(plain) and rule not in MAKING:
            self._plain.add(function)
        try:
            results = rule(step)
        except (AttributeError, IndexError, RuntimeError, ValueError):
            results = unknown(step)  # saved values that differ from those of the torch we know
        for number, (labels, shape) in enumerate(zip(results, shapes, strict=False)):
            fits = tuple(labels.shape) == shape
            self._values[function, number] = labels if fits else nobody(shape)
            if not fits:
                step.refuse_all()
