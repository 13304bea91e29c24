"""Places of units: rows of tensors, and entries of activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["makes", "reads", "follows"]
"""What rows do for a unit: make its values, read them, or follow (biases, norms, statistics)."""
MEMBER = "*"
"""Stands in a path for the name of each module in a list (`Slice.tensor`)."""


class Pattern:
    """Places of units along one dimension, the same for tensors and for activations.

    Unit ``i`` owns rows ``offset + i*stride … offset + i*stride + width - 1`` of dimension `dim`.
    """

    __slots__ = ()

    dim: int
    width: int
    offset: int
    stride: int

    def rows(self, units: Iterable[int]) -> list[int]:
        """Rows of the given units, in the order of the units."""
        return [
            self.offset + unit * self.stride + row for unit in units for row in range(self.width)
        ]

    def end(self, size: int) -> int:
        """One after the last row of `size` units."""
        return self.offset + (size - 1) * self.stride + self.width


@dataclass(frozen=True, slots=True)
class Slice(Pattern):
    """The rows of one tensor that belong to each unit of an axis.

    Attributes:
        tensor: Full name of a parameter or buffer. With ``*`` for the names of the modules in a
            list (``mlp.experts.*.up.weight``), the stack of this tensor of all of them, in which
            dimension 0 counts the modules.
        dim: Dimension of the tensor, or of the stack.
        role: ``"makes"``: rows of a weight that put out the unit's values (query, key, value, up
            and gate projections, producing convolutions). ``"reads"``: columns of a weight that
            take them in (out-projections, consuming convolutions). ``"follows"``: all else that
            goes with the unit (biases, norms, statistics, depthwise kernels, position tables).
            Slices are equal when they are the same rows.
        each: Units in each unit of the parent axis, where the tensor holds a matrix per such unit
            along dimension 0 (stacked experts): unit ``i`` then owns rows of matrix ``i // each``
            only, those of ``i % each``. 0: rows of the whole tensor.
    """

    tensor: str
    dim: int
    width: int = 1
    offset: int = 0
    stride: int = 1
    role: Role = field(default="follows", compare=False)
    each: int = 0

    @property
    def module(self) -> str:
        """Path of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def holder(self) -> str:
        """Path of the list whose modules each have such a tensor; "" where it is one tensor."""
        before, found, _ = self.tensor.partition(f".{MEMBER}.")
        return before if found else ""


@dataclass(frozen=True, slots=True)
class Tap(Pattern):
    """Where the units of an axis are among the activations of a module.

    An axis may have several taps at one module.

    Attributes:
        module: Path of the module.
        side: ``"input"`` (the module's first), ``"output"``, or one of a module of experts.
            ``"choice"``: among its arguments are the indices of the units that were chosen for each
            token, and their weights, both ``(tokens, chosen)``. ``"every"``: every unit runs for
            all tokens, and the output is ``(units · tokens, features)``. ``"stack"``: `module` is
            the path of a parameter of the module, such as one that holds a matrix per expert, and
            what products read with it is meant.
            ``"bypass"``: the one unit is the module, from what it is given to its first output.
            ``"inputs"``, ``"outputs"``: those of a module in each module of a list; `module` is
            their path, with ``*`` for the names in the list. Each holds the units of one module
            only, or is itself one unit.
        dim: 1 for channels ``(batch, channels, …)``, -1 for features ``(batch, …, features)`` and
            for a choice.
        runner: Path of a module around it that takes rows out of its input, such as the tokens that
            a router sends to an expert; of a ``"stack"``, the module that runs the products. ""
            where there is none other than the module itself.
    """

    module: str
    side: str
    dim: int
    width: int = 1
    offset: int = 0
    stride: int = 1
    runner: str = field(default="", compare=False)

    @property
    def owner(self) -> str:
        """Path of the module that is called there, or of the list of those that are."""
        if self.side in ("inputs", "outputs"):
            return self.module.partition(f".{MEMBER}")[0]
        if self.side != "stack":
            return self.module
        return self.runner or self.module.rpartition(".")[0]

    @property
    def inner(self) -> str:
        """Path of the module that is called, in each module of a list; "" for these themselves."""
        return self.module.partition(f".{MEMBER}")[2].removeprefix(".")
