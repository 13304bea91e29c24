"""What one block can become: kept counts, predicted loss and cost of each option.

A block is the unit of decision: the axes whose widths hang together (an attention's heads and KV
groups, one FFN's neurons; in a stock checkpoint all axes that read the same config value). Its
members are the axes that keep the same units; an option fixes how many, the scores say which.
Knows scores and costs as numbers; knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..types import KINDS, Axis, CostModel, Kind, Units

Counts = Mapping[Kind, np.ndarray]


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums of pruned scores per option.

    Attributes:
        total: Over all members of a block: its predicted loss.
        degradation: The largest sum of any one member: what the threshold of `binary` limits.
    """

    total: np.ndarray
    degradation: np.ndarray

    def __add__(self, other: Losses) -> Losses:
        return Losses(self.total + other.total, np.maximum(self.degradation, other.degradation))


@dataclass(frozen=True, slots=True)
class FlatMember:
    """Axes that keep the same units, each unit on its own.

    Attributes:
        axes: Names of the axes; more than one only where a stock checkpoint ties them.
        kind: What the units are.
        scores: ``(units,)``, summed over the axes.
        ranks: ``(units,)``, 0 for the largest score; among equal scores the first unit. In an axis
            of blocks, the best of each block come before the second of each.
    """

    axes: tuple[str, ...]
    kind: Kind
    scores: np.ndarray
    ranks: np.ndarray

    def losses(self, counts: Counts) -> Losses:
        """Losses of keeping the best ``counts[kind]`` units."""
        worst_first = self.scores[np.argsort(-self.ranks)]
        sums = np.concatenate(([0.0], np.cumsum(worst_first)))
        total = sums[self.scores.size - counts[self.kind]]
        return Losses(total, total)

    def kept(self, counts: Mapping[Kind, int]) -> dict[str, Units]:
        """Sorted kept units per axis name; among equal scores the first units stay."""
        return dict.fromkeys(self.axes, Units(np.flatnonzero(self.ranks < counts[self.kind])))


@dataclass(frozen=True, slots=True)
class NestedMember:
    """Heads inside KV groups: `k` groups stay, and in each of them the same number `r` of heads.

    Removing group ``j`` costs its joint score ``S_j``; keeping it with `r` heads costs ``P_j(r)``,
    the sum of its smallest head scores. The best `k` groups for a given `r` are those with the
    largest ``S_j - P_j(r)``.

    Attributes:
        kind: What is nested: heads.
        parent: What it is nested in: KV groups.
        heads: Names of the head axes; more than one only where a stock checkpoint ties them.
        groups: Names of the group axes.
        head_scores: ``(groups, heads per group)``, summed over the axes.
        group_scores: ``(groups,)`` joint scores, summed over the axes.
        blocks: Runs of neighbouring groups of which each keeps the same number.
    """

    kind: Kind
    parent: Kind
    heads: tuple[str, ...]
    groups: tuple[str, ...]
    head_scores: np.ndarray
    group_scores: np.ndarray
    blocks: int = 1

    def losses(self, counts: Counts) -> Losses:
        """Losses of keeping the best ``counts[parent]`` groups and heads in them."""
        num_groups, num_heads = self.head_scores.shape
        ascending = np.sort(self.head_scores, axis=1)
        # Column r of each table is about keeping r heads of a group, r = 0 … heads per group.
        thinned = self._bounded(np.pad(np.cumsum(ascending, axis=1), ((0, 0), (1, 0)))[:, ::-1])
        order = self._group_order(thinned)
        best_first = np.take_along_axis(thinned, order, axis=0)
        removed = self.group_scores[order]
        total = np.zeros((num_groups + 1, num_heads + 1))
        total[1:] += np.cumsum(best_first, axis=0)
        total[:-1] += np.cumsum(removed[::-1], axis=0)[::-1]
        groups = counts[self.parent]
        heads_each = counts[self.kind] // np.maximum(groups, 1)
        picked = total[groups, heads_each]
        return Losses(picked, picked)

    def kept(self, counts: Mapping[Kind, int]) -> dict[str, Units]:
        """Sorted kept units per axis name; among equal scores the first units stay."""
        num_heads = self.head_scores.shape[1]
        num_kept = counts[self.parent]
        heads_each = counts[self.kind] // max(num_kept, 1)
        pruned = np.sort(self.head_scores, axis=1)[:, : num_heads - heads_each]
        # A running sum, so that ties fall here as they do in the table of losses.
        thinned = np.cumsum(pruned, axis=1)[:, -1:] if pruned.size else np.zeros((len(pruned), 1))
        groups = np.sort(self._group_order(self._bounded(thinned))[:num_kept, 0])
        best = np.argsort(-self.head_scores, axis=1, kind="stable")[:, :heads_each]
        heads = np.sort((groups[:, None] * num_heads + best[groups]).ravel())
        return dict.fromkeys(self.groups, Units(groups)) | dict.fromkeys(self.heads, Units(heads))

    def _bounded(self, thinned: np.ndarray) -> np.ndarray:
        """``P_j(r)``, at most ``S_j`` where a thinner group costs less time, and one less does not.

        Signs of gradients cancel in the joint score: without the bound a budget of FLOPs would
        remove experts, which saves none, rather than keep a part of them.
        """
        if not KINDS[self.parent].is_routed:
            return thinned
        return np.minimum(thinned, self.group_scores[:, None])

    def _group_order(self, thinned: np.ndarray) -> np.ndarray:
        """Groups in the order in which they stay, per column of ``P_j(r)``."""
        gains = self.group_scores[:, None] - thinned
        return np.argsort(_ranks(gains, self.blocks), axis=0, kind="stable")


@dataclass(frozen=True)
class Block:
    """A unit of decision with its options; option 0 keeps everything.

    Attributes:
        axes: All axes of the block.
        members: The same axes, those that keep the same units together.
        counts: ``(options,)`` kept units of every axis of a kind.
        losses: Predicted loss per option.
        costs: ``(cost models, options)``.
    """

    axes: tuple[Axis, ...]
    members: tuple[FlatMember | NestedMember, ...]
    counts: Counts
    losses: Losses
    costs: np.ndarray
    units: np.ndarray = field(repr=False)

    @property
    def num_options(self) -> int:
        """Number of options."""
        return self.units.size

    def kept(self, option: int) -> dict[str, Units]:
        """Sorted kept units per axis name."""
        counts = {kind: int(values[option]) for kind, values in self.counts.items()}
        units: dict[str, Units] = {}
        for member in self.members:
            units |= member.kept(counts)
        return units


def make_block(
    axes: Sequence[Axis],
    *,
    members: Sequence[FlatMember | NestedMember],
    counts: Counts,
    costs: Sequence[CostModel],
) -> Block:
    """Evaluate the options of a block and order them from the most expensive to the cheapest.

    The order makes every later tie, ``argmin`` takes the first, fall to the option that keeps more.

    Args:
        axes: All axes of the block.
        members: Their scores; none where nothing but costs is asked for.
        counts: ``(options,)`` kept units of every axis of a kind; one option keeps everything.
        costs: Cost models, the budgeted ones or all.
    """
    units = np.sum([counts[axis.kind] for axis in axes], axis=0)
    table = np.array([_block_cost(axes, counts, cost) for cost in costs])
    largest = table.max(axis=1, keepdims=True)
    weight = (table / np.where(largest > 0, largest, 1.0)).sum(axis=0)
    order = np.lexsort((-units, -weight))
    counts = {kind: values[order] for kind, values in counts.items()}
    parts = [member.losses(counts) for member in members]
    losses = parts[0] if parts else Losses(np.zeros(units.size), np.zeros(units.size))
    for part in parts[1:]:
        losses = losses + part
    return Block(
        axes=tuple(axes),
        members=tuple(members),
        counts=counts,
        losses=losses,
        costs=table[:, order],
        units=units[order],
    )


def make_members(
    axes: Sequence[Axis], scores: Mapping[str, np.ndarray], *, tie: bool
) -> tuple[FlatMember | NestedMember, ...]:
    """Group axes that must keep the same units, and sum their scores.

    Args:
        axes: Axes of one block; the parent of a nested axis is among them.
        scores: ``(size,)`` per axis name.
        tie: Whether equal `Axis.tied` keys bind, as they do in a stock checkpoint.
    """
    by_name = {axis.name: axis for axis in axes}
    parents = {axis.parent for axis in axes}
    keys = {axis.name: axis.tied for axis in axes if tie}
    together: dict[tuple[str, Kind, bool], list[Axis]] = {}
    for axis in axes:
        if axis.name not in parents:
            key = keys.get(axis.name) or keys.get(axis.parent or "") or axis.name
            together.setdefault((key, axis.kind, axis.parent is None), []).append(axis)
    members: list[FlatMember | NestedMember] = []
    for (_, kind, is_flat), tied in together.items():
        names = tuple(axis.name for axis in tied)
        summed = np.sum([scores[name] for name in names], axis=0)
        if is_flat:
            ranks = _ranks(summed[:, None], tied[0].blocks)[:, 0]
            members.append(FlatMember(names, kind, summed, ranks))
            continue
        groups = tuple(axis.parent for axis in tied if axis.parent is not None)
        joint = np.sum([scores[name] for name in groups], axis=0)
        outer = by_name[groups[0]]
        inside = summed.reshape(joint.size, -1)
        members.append(NestedMember(kind, outer.kind, names, groups, inside, joint, outer.blocks))
    return tuple(members)


def _ranks(values: np.ndarray, blocks: int) -> np.ndarray:
    """Rank of each row in every column of ``(rows, columns)``, 0 for the largest value.

    Of several blocks of neighbouring rows, the best of each come before the second of each.
    """
    parts = values.reshape(blocks, -1, values.shape[1])
    ranks = np.argsort(np.argsort(-parts, axis=1, kind="stable"), axis=1)
    return (ranks * blocks + np.arange(blocks)[:, None, None]).reshape(values.shape)


def _block_cost(axes: Sequence[Axis], counts: Counts, cost: CostModel) -> np.ndarray:
    total = np.zeros(counts[axes[0].kind].size)
    for axis in axes:
        kept = counts[axis.kind]
        total += cost.per_unit.get(axis.name, 0.0) * kept
        total += cost.while_kept.get(axis.name, 0.0) * (kept > 0)
        if axis.name in cost.rates and axis.parent is not None:
            parents = counts[KINDS[axis.kind].parent or axis.kind]
            total += cost.rates[axis.name].amount * kept / np.maximum(parents, 1)
        if axis.name in cost.curves:
            curve = cost.curves[axis.name]
            each = counts[KINDS[axis.kind].parent or axis.kind] if curve.of else np.ones_like(kept)
            total += np.interp(kept / np.maximum(each, 1), curve.widths, curve.values)
    return total
