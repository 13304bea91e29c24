"""One operation of a forward: its autograd function, and the labels of what went into it.

Knows what autograd functions save; the rules are in `rules` and `products`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .labels import INSERTED, Labels, core, nobody, varying
from .measuring import measured

MEETS_NOBODY = (
    "they meet values that no layer makes (an input or a constant), which keep their size"
)
UNSIGNED = 2**64
VIEWS = frozenset("T Transpose Permute View UnsafeView Unsqueeze Squeeze ToCopy".split())
"""Operations behind which a parameter is still known."""
SPLITS = frozenset("View UnsafeView ReshapeAlias".split())
"""Operations that may split a dimension in two."""

Function = Any  # torch.autograd.graph.Node; its saved values are attributes that no stub knows
Edge = tuple[Function | None, int]
Shape = tuple[int, ...]
Parameter = tuple[str, tuple[int, ...]]


def is_leaf(function: Function) -> bool:
    """Whether an autograd function is a parameter or an input."""
    return str(function.name()).endswith("AccumulateGrad")


def kind_of(function: Function) -> str:
    """Name of an operation: ``Addmm`` of ``AddmmBackward0``."""
    return str(function.name()).rpartition("::")[2].partition("Backward")[0]


def signed(dim: int) -> int:
    """A dimension or index that autograd saved without its sign."""
    return dim - UNSIGNED if dim >= UNSIGNED // 2 else dim


@dataclass(frozen=True)
class Step:
    """One autograd function, with the labels of its operands and the shapes of its results.

    Attributes:
        labels: Labels of the whole graph.
        names: Name of every parameter by ``id``.
        function: The autograd function.
        kind: Its name.
        edges: Where its operands come from.
        operands: Labels of its operands by their roots; None for one that needs no gradient.
        products: Per operand, whether it is computed from a product of values that layers made.
        plain: Per operand, whether it is computed from parameters alone.
        shapes: Shapes of its results.
    """

    labels: Labels
    names: Mapping[int, str]
    function: Function
    kind: str
    edges: Sequence[Edge]
    operands: Sequence[Tensor | None]
    products: Sequence[bool]
    plain: Sequence[bool]
    shapes: Sequence[Shape]

    @property
    def time(self) -> int:
        """When it ran, as the graph counts."""
        return int(self.function._sequence_nr())

    @property
    def x(self) -> Tensor:
        """Labels of the first operand."""
        first = self.operands[0]
        return nobody(self.shapes[0]) if first is None else first

    def saved(self, name: str) -> Any:
        """A value that the function saved for its backward."""
        return getattr(self.function, f"_saved_{name}")

    def picks(self, dim: int) -> bool:
        """Whether it sums values times constants that are 1 at one place along a dimension."""
        function = self.edges[0][0]
        if function is None or kind_of(function) != "Mul":
            return False
        saved = (getattr(function, f"_saved_{name}", None) for name in ("self", "other"))
        ones = [x for x in saved if isinstance(x, Tensor) and not x.requires_grad]
        is_mask = len(ones) == 1 and ones[0].shape == self.x.shape
        return is_mask and bool(
            ((ones[0] == 0) | (ones[0] == 1)).all() & (ones[0].sum(dim) == 1).all()
        )

    def dims(self) -> list[int]:
        """The dimensions that the function works on, none of them negative; all if it has none."""
        saved = getattr(self.function, "_saved_dim", None)  # a full reduction saves none
        if saved is None or saved == ():
            return list(range(self.x.ndim))
        return [signed(d) % self.x.ndim for d in ([saved] if isinstance(saved, int) else saved)]

    def refuse_all(self) -> None:
        """Refuse the channels of all operands."""
        for labels in self.operands:
            if labels is not None:
                self.labels.refuse(core(labels, varying(labels)), self.why)

    @property
    def why(self) -> str:
        """Reason why channels that enter here cannot be followed."""
        return f"they go into {self.kind}, where no slice can follow them"

    def parameter(self, edge: Edge) -> Parameter | None:
        """Name of a parameter, and which of its dimensions each dimension of the value is.

        A dimension of size 1 that a view inserted is `INSERTED`.
        """
        function = edge[0]
        if function is None:
            return None
        if is_leaf(function):
            name = self.names.get(id(function.variable))
            return None if name is None else (name, tuple(range(function.variable.ndim)))
        found = None
        if kind_of(function) in VIEWS and function.next_functions:
            found = self.parameter(function.next_functions[0])
        return None if found is None else self._viewed(function, *found)

    def blocks(self, edge: Edge) -> str | None:
        """Name of a matrix ``(g·r, m)`` of which a view makes one for each group: ``(g, m, r)``."""
        turned = edge[0]
        if turned is None or kind_of(turned) != "Transpose":
            return None
        view, _ = turned.next_functions[0]
        places = {signed(d) % 3 for d in (turned._saved_dim0, turned._saved_dim1)}
        if view is None or kind_of(view) not in SPLITS or places != {1, 2}:
            return None
        leaf, _ = view.next_functions[0]
        shape = tuple(view._input_metadata[0].shape)
        if leaf is None or not is_leaf(leaf) or len(shape) != 3:  # noqa: PLR2004 - (g, r, m)
            return None
        is_split = tuple(leaf.variable.shape) == (shape[0] * shape[1], shape[2])
        return self.names.get(id(leaf.variable)) if is_split and shape[0] > 1 else None

    def _viewed(self, function: Function, name: str, dims: tuple[int, ...]) -> Parameter | None:
        """The parameter behind one more view, which may insert or take out dimensions of size 1."""
        kind = kind_of(function)
        if kind == "T":
            return name, dims[::-1]
        if kind == "Permute":
            return name, tuple(dims[signed(d)] for d in function._saved_dims)
        if kind == "Transpose":
            order = list(dims)
            first, second = signed(function._saved_dim0), signed(function._saved_dim1)
            order[first], order[second] = order[second], order[first]
            return name, tuple(order)
        shape = tuple(function._input_metadata[0].shape)
        before, _ = function.next_functions[0]
        old = before.variable.shape if is_leaf(before) else before._input_metadata[0].shape
        long = [(dim, size) for dim, size in zip(dims, old, strict=True) if size > 1]
        if [size for _, size in long] != [size for size in shape if size > 1]:
            return None
        ahead = iter([dim for dim, _ in long])
        return name, tuple(next(ahead) if size > 1 else INSERTED for size in shape)


def unknown(step: Step) -> list[Tensor]:
    """Operations without a rule: how they move labels is measured; where it cannot be, refused."""
    found = measured(step.function, step.operands, step.shapes, step.labels, step.why)
    if found is None:
        step.refuse_all()
        return [nobody(shape) for shape in step.shapes]
    return found


def fits(small: Shape, large: Shape) -> bool:
    """Whether a tensor can be broadcast to a shape."""
    tail = large[len(large) - len(small) :] if len(small) <= len(large) else ()
    return len(tail) == len(small) and all(a in (1, b) for a, b in zip(small, tail, strict=True))
