"""Costs in which blocks multiply: a convolution between two channels axes has ``in·out`` weights.

What an option costs then depends on the options of other blocks. Given those, the cost is a plain
table again, and it never falls when another block grows: that is all the strategies need. Knows
blocks, options and closed forms; nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..types import Axis, CostModel, Product
from .options import Block

ROUNDING = 1e-12
"""Relative rounding of sums that are compared."""

Dim = tuple[float, tuple[tuple[str, float], ...]]
Term = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Coupling:
    """Costs of all plans of a space, exactly: constant + Σ blocks + Σ products of blocks.

    A term is a product of dimensions that blocks change, the same for all costs but for its factor.

    Attributes:
        constant: ``(costs,)`` what no option changes.
        linear: Per block ``(costs, options)`` what an option costs whatever the others do.
        factors: ``(costs, terms)`` cost per element.
        own_factors: Per block those of its terms.
        base: ``(terms, dims)`` what no block changes of each dimension; 1 for missing dimensions.
        terms: Per block the terms it is in.
        sizes: Per block ``(its terms, dims, options)`` what an option adds to each dimension.
        neighbours: Per block the other blocks that it shares a term with.
        pairs: ``(pairs, 2)`` every block with every term it is in.
        table: ``(pairs, dims, longest options)`` the same sizes, padded, for whole plans at once.
        linear_table: ``(costs, blocks, longest options)`` `linear`, padded.
    """

    constant: np.ndarray
    linear: tuple[np.ndarray, ...]
    factors: np.ndarray
    own_factors: tuple[np.ndarray, ...]
    base: np.ndarray
    terms: tuple[np.ndarray, ...]
    sizes: tuple[np.ndarray, ...]
    neighbours: tuple[tuple[int, ...], ...] = field(repr=False)
    pairs: np.ndarray = field(repr=False)
    table: np.ndarray = field(repr=False)
    linear_table: np.ndarray = field(repr=False)

    def dims_of(self, picks: np.ndarray) -> np.ndarray:
        """``(terms, dims)`` sizes when block ``b`` takes option ``picks[b]``."""
        dims = self.base.copy()
        blocks, terms = self.pairs.T
        np.add.at(dims, terms, self.table[np.arange(len(self.pairs)), :, picks[blocks]])
        return dims

    def costs_of(self, picks: np.ndarray, dims: np.ndarray) -> np.ndarray:
        """``(costs,)`` of a plan, given its `dims_of`."""
        linear = self.linear_table[:, np.arange(len(picks)), picks].sum(axis=1)
        return self.constant + linear + self.factors @ _volume(dims)

    def lowest(self, row: int) -> float:
        """Lowest reachable value of one cost: every block at its cheapest, given the others."""
        walk = Walk(self, np.array([linear.shape[1] - 1 for linear in self.linear], dtype=int))
        waiting = list(range(len(self.linear)))
        while waiting:
            block = waiting.pop()
            changes = walk.changes(block)
            option = int(changes[row].argmin())
            if changes[row, option] < -ROUNDING * abs(walk.costs[row]):
                walk.move(block, option)
                waiting.extend(self.neighbours[block])
        return float(walk.costs[row])


class Walk:
    """One plan that changes block by block, with the exact cost of every next change.

    Attributes:
        picks: ``(blocks,)`` option of each.
        costs: ``(costs,)`` of the plan.
    """

    def __init__(self, coupling: Coupling, picks: np.ndarray) -> None:
        self._coupling = coupling
        self.picks = picks.copy()
        self._dims = coupling.dims_of(picks)
        self.costs = coupling.costs_of(picks, self._dims)

    def changes(self, block: int) -> np.ndarray:
        """``(costs, options)`` what the plan's costs change by when the block takes an option."""
        coupling, pick = self._coupling, self.picks[block]
        linear = coupling.linear[block]
        changes = linear - linear[:, pick, None]
        terms = coupling.terms[block]
        if terms.size:
            sizes = coupling.sizes[block]
            lengths = sizes + (self._dims[terms] - sizes[:, :, pick])[:, :, None]
            elements = _volume(lengths)
            changes += coupling.own_factors[block] @ (elements - elements[:, pick, None])
        return changes

    def move(self, block: int, option: int) -> None:
        """Let a block take an option."""
        coupling, pick = self._coupling, self.picks[block]
        terms, sizes, linear = coupling.terms[block], coupling.sizes[block], coupling.linear[block]
        before = self._dims[terms]
        after = before - sizes[:, :, pick] + sizes[:, :, option]
        elements = coupling.own_factors[block] @ (_volume(after) - _volume(before))
        self.costs = self.costs + (linear[:, option] - linear[:, pick]) + elements
        self._dims[terms] = after
        self.picks[block] = option


def couple(
    blocks: Sequence[Block],
    whole: Sequence[Axis],
    costs: Sequence[CostModel],
    *,
    gone: Sequence[Axis] = (),
) -> Coupling | None:
    """Exact costs of the plans of a space; None where no product has an axis that is decided.

    Args:
        blocks: What is decided; their costs have one row per entry of `costs`.
        whole: Axes that stay whole.
        costs: Budgeted costs.
        gone: Axes that lose all units.
    """
    if not blocks or not any(cost.products for cost in costs):
        return None
    fixed = {axis.name: axis.size for axis in whole} | {axis.name: 0 for axis in gone}
    none = fixed | {axis.name: 0 for block in blocks for axis in block.axes}
    constant = np.array([replace(cost, products=()).of(none) for cost in costs])
    found: dict[Term, np.ndarray] = {}
    for row, cost in enumerate(costs):
        for product in cost.products:
            factor, dims = _reduce(product, fixed)
            found.setdefault(dims, np.zeros(len(costs)))[row] += factor
    constant += found.pop((), np.zeros(len(costs)))
    terms = tuple(found)
    if not terms:
        return None
    base = np.ones((len(terms), max((len(dims) for dims in terms), default=1)))
    for term, dims in enumerate(terms):
        base[term, : len(dims)] = [size for size, _ in dims]
    own = _terms_of(blocks, terms)
    sizes = [_sizes(block, terms, own[row], base.shape[1]) for row, block in enumerate(blocks)]
    factors = np.array(list(found.values())).reshape(len(terms), len(costs)).T
    return Coupling(
        constant=constant,
        linear=tuple(block.costs for block in blocks),
        factors=factors,
        own_factors=tuple(factors[:, terms_of_block] for terms_of_block in own),
        base=base,
        terms=own,
        sizes=tuple(sizes),
        neighbours=_neighbours(own),
        pairs=np.array(
            [(block, term) for block, found in enumerate(own) for term in found], dtype=np.int64
        ).reshape(-1, 2),
        table=np.concatenate([_padded(size, blocks) for size in sizes]),
        linear_table=np.stack([_padded(block.costs, blocks) for block in blocks], axis=1),
    )


def _volume(lengths: np.ndarray) -> np.ndarray:
    """Product over axis 1, the dimensions; these are few, for which `prod` is slow."""
    volume = lengths[:, 0]
    for dim in range(1, lengths.shape[1]):
        volume = volume * lengths[:, dim]
    return volume


def _padded(values: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    """Zeros behind the last dimension, up to the most options of any block."""
    missing = max(block.num_options for block in blocks) - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def _reduce(product: Product, fixed: Mapping[str, int]) -> tuple[float, Term]:
    """Factor and changeable dimensions of a product, once some axes are fixed."""
    factor, dims = product.factor, []
    for constant, weights in product.dims:
        size = constant + sum(weight * fixed[axis] for axis, weight in weights if axis in fixed)
        free = tuple((axis, weight) for axis, weight in weights if axis not in fixed)
        if free:
            dims.append((size, free))
        else:
            factor *= size
    return factor, tuple(dims)


def _terms_of(blocks: Sequence[Block], terms: Sequence[Term]) -> tuple[np.ndarray, ...]:
    """Per block the sorted numbers of the terms it is in."""
    block_of = {axis.name: row for row, block in enumerate(blocks) for axis in block.axes}
    own: list[set[int]] = [set() for _ in blocks]
    for term, dims in enumerate(terms):
        for _, weights in dims:
            for axis, _ in weights:
                own[block_of[axis]].add(term)
    return tuple(np.array(sorted(found), dtype=np.int64) for found in own)


def _neighbours(own: Sequence[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    sharing: dict[int, set[int]] = {}
    for block, terms in enumerate(own):
        for term in terms.tolist():
            sharing.setdefault(term, set()).add(block)
    return tuple(
        tuple(sorted(set().union(*(sharing[term] for term in terms.tolist())) - {block}))
        for block, terms in enumerate(own)
    )


def _sizes(block: Block, terms: Sequence[Term], own: np.ndarray, num_dims: int) -> np.ndarray:
    """``(its terms, dims, options)`` what the options of a block add to each dimension."""
    kinds = {axis.name: axis.kind for axis in block.axes}
    sizes = np.zeros((own.size, num_dims, block.num_options))
    for row, term in enumerate(own.tolist()):
        for dim, (_, weights) in enumerate(terms[term]):
            for axis, weight in weights:
                if axis in kinds:
                    sizes[row, dim] += weight * block.counts[kinds[axis]]
    return sizes
