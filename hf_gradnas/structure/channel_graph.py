"""The graph of one forward, as autograd recorded it, and the labels of channels in it.

Every layer that makes channels gives each of them a label, and the operations in between move and
join the labels as they move and join the channels. In which dimension of a tensor the channels
stand is what autograd saved (`channel_rules`), so that nothing is guessed from shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..running.wrappers import evaluating, unfrozen
from .channel_labels import Labels, Rows, compact, nobody, spread
from .channel_rules import (
    RULES,
    UNKNOWN,
    Edge,
    Function,
    Step,
    elementwise,
    is_leaf,
    kind_of,
    unknown,
)
from .trace import map_tensors


@dataclass(frozen=True)
class Run:
    """First call of a module: the value that it returned, by its place in the autograd graph."""

    path: str
    module: nn.Module
    edge: Edge


@dataclass(frozen=True)
class Forward:
    """One traced forward: autograd functions and modules in running order, and the outputs."""

    functions: tuple[Function, ...]
    runs: tuple[Run, ...]
    outputs: tuple[Edge, ...]


def trace_graph(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Forward:
    """Run the model in eval mode, and collect the graph of the forward.

    The model is left as it was; whatever its forward raises is raised.
    """
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(unfrozen(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for path, module in model.named_modules():
            stack.callback(module.register_forward_hook(_remember(runs, path)).remove)
        output = model(*map_tensors(args, _joined), **map_tensors(dict(kwargs), _joined))
    results = [x for x in _tensors(output) if x.grad_fn is not None]
    if not results:
        raise StructureError(
            f"{type(model).__name__}: no tensor that its forward returns depends on its "
            "parameters through autograd; let the forward return its output as a tensor, "
            "without torch.no_grad()."
        )
    outputs = tuple((x.grad_fn, x.output_nr) for x in results)
    return Forward(_in_order(f for f, _ in outputs), tuple(runs.values()), outputs)


def _joined(x: Tensor) -> Tensor:
    """A copy of an input that has a place in the graph."""
    return x.detach().clone().requires_grad_().clone() if x.is_floating_point() else x


def _remember(runs: dict[str, Run], path: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = next(iter(_tensors(output)), None)
        if path not in runs and first is not None and first.grad_fn is not None:
            runs[path] = Run(path, module, (first.grad_fn, first.output_nr))

    return hook


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


class Flow:
    """The labels of every value of a traced forward.

    Args:
        functions: Autograd functions of the forward in running order.
        names: Name of every parameter by ``id``.
    """

    def __init__(self, functions: Sequence[Function], names: Mapping[int, str]) -> None:
        self.labels = Labels()
        self._names = names
        self._leaves: dict[int, Tensor] = {}
        self._values: dict[Edge, Tensor] = {}
        for function in functions:
            self._run(function)

    def at(self, edge: Edge) -> Tensor | None:
        """Labels of the value behind an edge; None for one that needs no gradient."""
        function, _ = edge
        if function is None:
            return None
        return self._leaf(function.variable) if is_leaf(function) else self._values.get(edge)

    def _leaf(self, variable: Tensor) -> Tensor:
        """A parameter with one dimension is labelled; a matrix is where it meets channels."""
        if id(variable) not in self._leaves:
            labels = nobody(variable.shape)
            long = [dim for dim, size in enumerate(variable.shape) if size > 1]
            if len(long) == 1 and id(variable) in self._names:
                vector = self.labels.fresh(variable.shape[long[0]])
                self.labels.bind(Rows(self._names[id(variable)], long[0]), vector)
                labels = spread(vector, long[0], variable.shape)
            self._leaves[id(variable)] = labels
        return self._leaves[id(variable)]

    def _run(self, function: Function) -> None:
        kind, edges = kind_of(function), function.next_functions
        shapes = [tuple(m.shape) for m in function._input_metadata]
        operands = [self.at(edge) for edge in edges]
        rule = RULES.get(kind, unknown if kind.startswith(UNKNOWN) else elementwise)
        step = Step(self.labels, self._names, function, kind, edges, operands, shapes)
        try:
            results = rule(step)
        except (AttributeError, IndexError, RuntimeError, ValueError):
            results = unknown(step)  # saved values that differ from those of the torch we know
        for number, (labels, shape) in enumerate(zip(results, shapes, strict=False)):
            fits = tuple(labels.shape) == shape
            self._values[function, number] = compact(labels) if fits else nobody(shape)
            if not fits:
                step.refuse_all()
