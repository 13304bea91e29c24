"""Labels of entries: which entries of which tensors go together, and why some cannot be cut.

A tensor of labels has the shape of the tensor that it speaks of, and stride 0 along every dimension
in which the labels do not differ. Labels that go together have one root. Labels that meet the same
partners in a product go together; those with fewer partners stand in those with more (a query head
in its KV group). Knows neither operations nor modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

NOBODY = -1
"""Label of values that no layer makes: inputs, constants, results of products that are unknown."""
OUTPUT = "they are part of the model's output"
ATTRIBUTE = -1
"""Dimension that stands for the groups of a convolution."""
INSERTED = -2
"""Dimension that a view inserted, so that no tensor has it."""


@dataclass(frozen=True)
class Rows:
    """One dimension of one tensor; with the dimension `ATTRIBUTE`, the groups of a convolution."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class Made:
    """Labels of the entries that an operation makes with the weight `weight`, and when it ran."""

    weight: str
    labels: Tensor
    time: int


@dataclass(frozen=True)
class Meeting:
    """The finest labels of a product of two values that layers made, in order, and when it ran."""

    labels: Tensor
    time: int


@dataclass(frozen=True)
class Choice:
    """Labels of what an operation chooses the largest of, in order, and how many it chooses.

    It may be one of several that choose one each.
    """

    labels: Tensor
    chosen: int
    time: int
    is_one_of_several: bool = False


class Labels:
    """Labels of entries, which of them are the same, and why some cannot be cut."""

    def __init__(self) -> None:
        # Longer than there are labels: the last entry, at index `NOBODY`, is `NOBODY` itself.
        self._parents = torch.full((1 << 16,), NOBODY)
        self._count = 0
        self._reasons: dict[int, list[str]] = {}
        self.rows: dict[Rows, Tensor] = {}
        self.readers: dict[Rows, int] = {}
        """When a product first read with the rows, as the graph counts."""
        self.made: list[Made] = []
        self.meetings: list[Meeting] = []
        self.softmaxes: list[Meeting] = []
        self.choices: list[Choice] = []
        self.stands: dict[int, int] = {}
        """The label in which a label stands."""
        self.tables: dict[str, Tensor] = {}
        """Label of every entry of parameters that are no weight of a product, by name."""
        self.weights: list[tuple[str, Tensor, Tensor, Tensor, int]] = []
        """Parameters of several dimensions that products read as matrices: name, labels ``(m, p)``
        of their entries, labels ``(m,)`` of what is read, ``(p,)`` of what is made, and when."""
        self.later: list[tuple[Tensor, Tensor]] = []
        """Labels, and others that meet them along some of their dimensions."""
        self.constants: set[str] = set()
        """Tables whose values count as constants (a row of `couplings` says how they are cut)."""

    def fresh(self, size: int) -> Tensor:
        """New labels ``(size,)``."""
        first, self._count = self._count, self._count + size
        while self._count >= len(self._parents):
            self._parents = torch.cat([self._parents, torch.full_like(self._parents, NOBODY)])
        new = torch.arange(first, self._count)
        self._parents[first : self._count] = new
        return new

    def find(self, labels: Tensor) -> Tensor:
        """Root of each label, the smallest of all that are the same; `NOBODY` stays."""
        roots = self._parents[labels]
        while True:
            above = self._parents[roots]
            if torch.equal(above, roots):
                return roots
            roots = above

    def roots(self, labels: Tensor) -> list[int]:
        """Root of each label of a vector; `NOBODY` stays."""
        return [int(root) for root in self.find(labels).tolist()]

    def settled(self, labels: Tensor) -> Tensor:
        """The labels of a tensor by their roots, with stride 0 where these do not differ."""
        part = strided(labels)
        return compact(self.find(part).expand(labels.shape))

    def tie(self, first: Tensor, second: Tensor, why: str) -> None:
        """Make labels the same, pair by pair; one that meets `NOBODY` cannot be cut."""
        if first.shape != second.shape:
            self.refuse(first, why)
            self.refuse(second, why)
            return
        left, right = self.find(first).flatten(), self.find(second).flatten()
        lonely = ((left == NOBODY) != (right == NOBODY)).nonzero().flatten()
        for label in torch.maximum(left[lonely], right[lonely]).unique().tolist():
            self._reasons.setdefault(label, []).append(why)
        both = (left != NOBODY) & (right != NOBODY)
        left, right = left[both], right[both]
        while not torch.equal(left, right):
            high, low = torch.maximum(left, right), torch.minimum(left, right)
            self._parents.scatter_reduce_(0, high, low, "amin")
            left, right = self.find(left), self.find(right)

    def merge(self, labels: Tensor, why: str) -> None:
        """Make all labels of every row ``(rows, n)`` the same."""
        if labels.shape[-1] > 1:
            self.tie(labels[:, :1].expand_as(labels), labels, why)

    def refuse(self, labels: Tensor, why: str) -> None:
        """Say that these labels cannot be cut."""
        for label in set(strided(labels).flatten().tolist()) - {NOBODY}:
            self._reasons.setdefault(label, []).append(why)

    def bind(self, rows: Rows, labels: Tensor, *, time: int | None = None) -> None:
        """Say that the rows of a tensor belong to these labels; with `time` where it reads them."""
        if rows.dim == INSERTED:
            return
        if time is not None:
            self.readers.setdefault(rows, time)
        if rows in self.rows:
            self.tie(self.rows[rows], labels, f"{rows.tensor} is used for different channels")
        else:
            self.rows[rows] = labels

    def reasons(self) -> dict[int, list[str]]:
        """Why labels cannot be cut, by root; `OUTPUT` first."""
        found: dict[int, list[str]] = {}
        roots = self.roots(torch.tensor(list(self._reasons), dtype=torch.long))
        for root, reasons in zip(roots, self._reasons.values(), strict=True):
            found.setdefault(root, []).extend(reasons)
        for why in found.values():
            why.sort(key=OUTPUT.__ne__)
        return found

    def along(self, labels: Tensor, dim: int, why: str) -> Tensor:
        """The label of each entry of a dimension; labels that share an entry become the same."""
        dim %= labels.ndim
        dims = varying(labels)
        if dims and dim not in dims:
            self.refuse(core(labels, dims), why)
            return nobody(labels.shape[dim : dim + 1])
        ordered = core(labels, {dim, *dims}).movedim(sorted({dim, *dims}).index(dim), 0)
        flat = ordered.reshape(labels.shape[dim], -1)
        self.merge(flat, why)
        return flat[:, 0]

    def fix(self, labels: Tensor, dims: Iterable[int], why: str) -> None:
        """Say that dimensions keep their size: entries along them go together, or not at all."""
        present = varying(labels)
        held = [dim for dim in present if dim in set(dims)]
        left = [dim for dim in present if dim not in held]
        if held and left:
            flat = core(labels, present).movedim(
                [present.index(dim) for dim in left], list(range(len(left)))
            )
            self.merge(flat.flatten(0, len(left) - 1).flatten(1), why)
        elif held:
            self.refuse(core(labels, held), why)

    def bind_later(self) -> None:
        """Bind parameters that met some of the dimensions of labels, now that those are tied.

        Where all entries along a dimension turned out to go together (the entries of a head), what
        a parameter has along it is no matter of units.
        """
        for labels, others in self.later:
            dims, own = set(varying(self.settled(labels))), set(varying(others))
            if dims <= own:
                self.tie(labels, others, "they meet values of another size")
            elif dims & own:
                self.refuse(labels, "they meet values that have entries for parts of them")
        self.later.clear()
        for name, entries, lin, made, time in self.weights:
            for place, vector in enumerate((lin, made)):
                self._bind_table(
                    name, entries.select(1 - place, 0), vector, None if place else time
                )
        self.weights.clear()
        for name, labels in self.tables.items():
            along = varying(self.settled(labels))
            if len(along) == 1:
                self.bind(Rows(name, along[0]), core(labels, along))

    def table_of(self, labels: Tensor) -> str | None:
        """The table whose entries these are, if each is there once and has met no other."""
        first, last = int(labels.min()), int(labels.max())
        if first < 0 or last - first + 1 != labels.numel() or strided(labels).shape != labels.shape:
            return None
        if len(labels.unique()) != labels.numel():
            return None
        tables = ((name, own.flatten()) for name, own in self.tables.items())
        return next((name for name, own in tables if int(own[0]) == first), None)

    def _bind_table(self, name: str, entries: Tensor, vector: Tensor, time: int | None) -> None:
        """Bind those dimensions of a table along which the labels of a side of a matrix differ.

        Args:
            name: Of the parameter.
            entries: Its entries ``(m,)`` along that side.
            vector: Labels ``(m,)``.
            time: When they are read; None if they are made.
        """
        if len(vector) != len(entries):
            return
        own = self.tables[name]
        flat = entries - int(own.flatten()[0])
        roots = self.find(vector)
        for dim, size in enumerate(own.shape):
            places = flat // int(torch.tensor(own.shape[dim + 1 :]).prod()) % size
            by_place = torch.full((size,), NOBODY)
            by_place[places] = roots
            if len(places.unique()) == size > 1 and torch.equal(by_place[places], roots):
                self.bind(Rows(name, dim), by_place, time=time)

    def meet(self, rows: Tensor, time: int, why: str, *, record: bool) -> Tensor:
        """Tie the labels that meet in products, and say which stand in which.

        Labels that occur in the same rows go together. Where the rows of some are among the rows of
        others, the former stand in the latter; where rows only overlap, all go together.

        Args:
            rows: Labels ``(products, entries)`` of everything that each product sums over.
            time: When the product runs.
            why: Reason for what cannot be cut.
            record: Keep it as a meeting.

        Returns:
            Per product the finest label ``(products,)``: `NOBODY` where nothing has one.
        """
        roots = self.find(rows).numpy()
        place = np.arange(len(roots))[:, None]
        pairs = np.unique((roots * len(roots) + place)[roots != NOBODY])  # by label, then place
        numbers, places = np.divmod(pairs, len(roots))
        labels, starts = np.unique(numbers, return_index=True)
        same: dict[bytes, int] = {}  # places of a label: the first label that has them
        leaders, sets = [], []
        for label, where in zip(labels.tolist(), _split(places, starts.tolist()), strict=True):
            leader = same.setdefault(where.tobytes(), label)
            leaders.append(leader)
            if leader == label:
                sets.append((label, where))
        self.tie(torch.tensor(leaders, dtype=torch.long), torch.from_numpy(labels), why)
        sets.sort(key=lambda pair: len(pair[1]))  # the finest first
        finest = torch.full((len(roots),), NOBODY)
        if sets:
            of_set = np.repeat(np.arange(len(sets)), [len(where) for _, where in sets])
            every = np.concatenate([where for _, where in sets])
            met, first, inverse = np.unique(every, return_index=True, return_inverse=True)
            order = np.lexsort((of_set, first[inverse]))
            chained, at = of_set[order], every[order]
            follows = at[1:] == at[:-1]
            chains = zip(chained[:-1][follows].tolist(), chained[1:][follows].tolist(), strict=True)
            for inner, outer in dict.fromkeys(chains):
                nested = bool(np.isin(sets[inner][1], sets[outer][1], assume_unique=True).all())
                self._stand(sets[inner][0], sets[outer][0], nested, why)
            finest[met] = torch.tensor([sets[n][0] for n in of_set[first]])
        finest = self.find(finest)
        if record:
            self.meetings.append(Meeting(finest, time))
        return finest

    def _stand(self, inner: int, outer: int, nested: bool, why: str) -> None:
        """Say that a label stands in another; what it stands in already goes with that one."""
        if not nested:
            self.merge(torch.tensor([[inner, outer]]), why)
            return
        first, second = (int(root) for root in self.find(torch.tensor([inner, outer])))
        if first == second:
            return
        before = self.stands.setdefault(first, second)
        if before != second:
            self.merge(torch.tensor([[before, second]]), why)

    def standing(self) -> dict[int, int]:
        """Root by root of what stands in it; what stands in several of them goes with none."""
        found: dict[int, int] = {}
        for inner, outer in list(self.stands.items()):
            first, second = (int(root) for root in self.find(torch.tensor([inner, outer])))
            if first != second:
                before = found.setdefault(first, second)
                if before != second:
                    self.merge(torch.tensor([[before, second]]), "they stand in the same")
                    return self.standing()
        return found


def _split(values: np.ndarray, starts: list[int]) -> list[np.ndarray]:
    """Parts of a vector that begin at `starts`, and reach to the next one's start."""
    return [values[first:last] for first, last in pairwise([*starts, len(values)])]


def strided(labels: Tensor) -> Tensor:
    """The part of a tensor of labels that is stored: size 1 where the stride is 0."""
    index = [slice(None) if stride else slice(0, 1) for stride in labels.stride()]
    return labels[tuple(index)] if labels.ndim else labels


def varying(labels: Tensor) -> tuple[int, ...]:
    """Dimensions along which the labels of a tensor differ."""
    part = strided(labels)
    return tuple(
        dim
        for dim, size in enumerate(part.shape)
        if size > 1 and bool((part != part.narrow(dim, 0, 1)).any())
    )


def compact(labels: Tensor) -> Tensor:
    """The same labels with stride 0 in every dimension along which they do not differ."""
    if not labels.numel():
        return labels
    dims = set(varying(labels))
    index = [slice(None) if dim in dims else slice(0, 1) for dim in range(labels.ndim)]
    return (labels[tuple(index)] if index else labels).expand(labels.shape)


def core(labels: Tensor, dims: Iterable[int]) -> Tensor:
    """Labels along `dims` only."""
    wanted = set(dims)
    return labels[tuple(slice(None) if d in wanted else 0 for d in range(labels.ndim))]


def nobody(shape: Sequence[int]) -> Tensor:
    """Labels of a tensor that no layer makes."""
    return torch.full((), NOBODY).expand(tuple(shape))


def spread(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels ``(n,)`` as those of a tensor of `shape` along `dim`."""
    dim %= len(shape)
    return vector.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(tuple(shape))


def kept(shape: Sequence[int], dims: Iterable[int]) -> list[int]:
    """`shape` with size 1 outside of `dims`."""
    wanted = set(dims)
    return [size if dim in wanted else 1 for dim, size in enumerate(shape)]


def is_nobody(labels: Tensor) -> bool:
    """Whether no layer makes any value of a tensor."""
    return bool((strided(labels) == NOBODY).all())
