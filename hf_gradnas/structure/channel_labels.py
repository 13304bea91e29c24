"""Labels of channels: which entries of which tensors go together, and why some cannot be cut.

A tensor of labels has the shape of the tensor that it speaks of, and stride 0 along every dimension
in which the labels do not differ. Knows neither operations nor modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOBODY = -1
"""Label of values that no layer makes: inputs, constants, results of products that are unknown."""
OUTPUT = "they are part of the model's output"
ATTRIBUTE = -1
"""Dimension that stands for the groups of a convolution."""


@dataclass(frozen=True)
class Rows:
    """One dimension of one tensor; with the dimension `ATTRIBUTE`, the groups of a convolution."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class Made:
    """Labels of the channels that an operation makes with the weight `weight`."""

    weight: str
    labels: Tensor


class Labels:
    """Labels of channels, which of them are the same, and why some cannot be cut."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, list[str]] = {}
        self.rows: dict[Rows, Tensor] = {}
        self.columns: set[Rows] = set()
        self.made: list[Made] = []

    def fresh(self, size: int) -> Tensor:
        """New labels ``(size,)``."""
        first = len(self._parents)
        self._parents.extend(range(first, first + size))
        return torch.arange(first, first + size)

    def root(self, label: int) -> int:
        """The one label that stands for all that are the same as `label`."""
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def roots(self, labels: Tensor) -> list[int]:
        """Root of each label of a vector; `NOBODY` stays."""
        return [label if label == NOBODY else self.root(label) for label in labels.tolist()]

    def tie(self, first: Tensor, second: Tensor, why: str) -> None:
        """Make labels the same, pair by pair; one that meets `NOBODY` cannot be cut."""
        if first.shape != second.shape:
            self.refuse(first, why)
            self.refuse(second, why)
            return
        for left, right in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
            if NOBODY not in (left, right):
                self._parents[max(self.root(left), self.root(right))] = min(
                    self.root(left), self.root(right)
                )
            elif left != right:
                self._reasons.setdefault(max(left, right), []).append(why)

    def refuse(self, labels: Tensor, why: str) -> None:
        """Say that these channels cannot be cut."""
        for label in set(labels.flatten().tolist()) - {NOBODY}:
            self._reasons.setdefault(label, []).append(why)

    def bind(self, rows: Rows, labels: Tensor, *, column: bool = False) -> None:
        """Say that the rows of a tensor belong to these channels; `column` where it reads them."""
        if column:
            self.columns.add(rows)
        if rows in self.rows:
            self.tie(self.rows[rows], labels, f"{rows.tensor} is used for different channels")
        else:
            self.rows[rows] = labels

    def reasons(self) -> dict[int, list[str]]:
        """Why channels cannot be cut, by root; `OUTPUT` first."""
        found: dict[int, list[str]] = {}
        for label, reasons in self._reasons.items():
            found.setdefault(self.root(label), []).extend(reasons)
        return {root: sorted(why, key=lambda w: w != OUTPUT) for root, why in found.items()}

    def along(self, labels: Tensor, dim: int, why: str) -> Tensor:
        """The label of each entry of a dimension; labels that share an entry become the same."""
        dim %= labels.ndim
        dims = varying(labels)
        if dims and dim not in dims:
            self.refuse(core(labels, dims), why)
            return nobody(labels.shape[dim : dim + 1])
        ordered = core(labels, {dim, *dims}).movedim(sorted({dim, *dims}).index(dim), 0)
        flat = ordered.reshape(labels.shape[dim], -1)
        first = flat[:, 0]
        for column in range(1, flat.shape[1]):
            self.tie(first, flat[:, column], why)
        return first


def varying(labels: Tensor) -> tuple[int, ...]:
    """Dimensions along which the labels of a tensor differ."""
    return tuple(
        dim
        for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True))
        if size > 1 and stride != 0 and bool((labels != labels.narrow(dim, 0, 1)).any())
    )


def compact(labels: Tensor) -> Tensor:
    """The same labels with stride 0 in every dimension along which they do not differ."""
    if not labels.numel():
        return labels
    kept = varying(labels)
    for dim in range(labels.ndim):
        if dim not in kept:
            labels = labels.narrow(dim, 0, 1).expand(
                [-1 if d != dim else labels.shape[dim] for d in range(labels.ndim)]
            )
    return labels


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
    return not varying(labels) and bool((core(labels, ()) == NOBODY).all())
