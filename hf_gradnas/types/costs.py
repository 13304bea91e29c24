"""What kept units cost, and the limits on it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite

COSTS: Mapping[str, str] = {
    "flops": "FLOPs",
    "params": "parameters",
    "memory": "bytes of weights",
    "kv_cache": "bytes of keys and values per token",
    "active_params": "active parameters",
    "latency_ms": "milliseconds",
}
"""Names of costs in words; not every model has all of them, and latency is of a table."""
USUAL = ("flops", "params")
"""Costs that every model has, and that tables show which have no room for all."""
LATENCY = "latency_ms"
"""The cost that is read from a table of one machine."""
MEASURED = frozenset({LATENCY})
"""Costs of a small model may be less than 1."""
BYTES = frozenset({"memory", "kv_cache"})
"""Costs in bytes, whose limits may end in MB or MiB."""


@dataclass(frozen=True, slots=True)
class Product:
    """Cost of a tensor with more than one prunable dimension.

    ``factor · Π_dims (constant + Σ_axes weight·kept)``.

    Attributes:
        factor: Cost per element.
        dims: Per dimension of the tensor its constant size, and ``(axis name, weight)`` pairs.
    """

    factor: float
    dims: tuple[tuple[float, tuple[tuple[str, float], ...]], ...]

    def of(self, kept: Mapping[str, int]) -> float:
        """Cost when ``kept[axis]`` units of each axis stay."""
        total = self.factor
        for constant, weights in self.dims:
            total *= constant + sum(weight * kept[axis] for axis, weight in weights)
        return total


@dataclass(frozen=True, slots=True)
class Shared:
    """Cost that units of several axes have together while none of them is cut, once for all.

    Attributes:
        sizes: Units of every axis by name, as long as it is whole.
        amount: What the units' own costs then count too much (T5: each layer gets its own table of
            position biases when a stack's heads are pruned, but the whole stack has one).
    """

    sizes: Mapping[str, int]
    amount: float

    def of(self, kept: Mapping[str, int]) -> float:
        """What is counted too much where ``kept[axis]`` units of each axis stay."""
        is_whole = all(kept[axis] == size for axis, size in self.sizes.items())
        return self.amount if is_whole else 0.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Cost of the units of an axis that are in one unit of another: ``amount · kept / kept[of]``.

    A token runs through as many experts however many there are, so that it costs what the neurons
    in one of them cost.

    Attributes:
        of: Name of the other axis.
        amount: Cost of one unit in every unit of the other axis.
    """

    of: str
    amount: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A cost that is measured at some widths: straight lines between them, and beyond the last.

    Attributes:
        widths: Kept units, from 0 on, growing.
        values: Cost at each width, from 0.0 on, never falling.
        of: Name of the axis by whose kept units the width is divided, where it is that of one of
            them; "" for the width of the axis itself.

    Raises:
        ValueError: They do not begin at 0, or fall.
    """

    widths: tuple[float, ...]
    values: tuple[float, ...]
    of: str = ""

    def __post_init__(self) -> None:
        pairs = list(zip(self.widths, self.values, strict=True))
        grows = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(pairs))
        begins = len(pairs) > 1 and not any(pairs[0])
        if not (begins and grows and isfinite(self.values[-1])):
            raise ValueError(f"a curve through {pairs} does not begin at 0 and never fall")

    def at(self, width: float) -> float:
        """Cost at a width."""
        place = min(max(bisect_right(self.widths, width), 1), len(self.widths) - 1)
        low, high = self.widths[place - 1 : place + 1]
        below, above = self.values[place - 1 : place + 1]
        return below + (above - below) * (width - low) / (high - low)

    @property
    def slope(self) -> float:
        """What the last unit costs."""
        return self.at(self.widths[-1]) - self.at(self.widths[-1] - 1)


@dataclass(frozen=True, slots=True)
class CostModel:
    """A cost as a closed form of how many units each axis keeps.

    ``cost(kept) = constant + Σ_axes (per_unit·kept + while_kept·[kept > 0]) + Σ rates + Σ products
    + Σ curves - Σ shared``. Exact for nested axes, since the kept heads are counted over all kept
    groups. A search may leave `shared` out: it is an upper bound then, and exact as soon as a unit
    goes.

    Attributes:
        name: One of `COSTS`, or of a user's own.
        constant: What no plan can change.
        per_unit: Cost of one unit, per axis name.
        while_kept: Cost that goes only when the axis loses its last unit (q/k norms of a head).
        rates: Cost of units that share the cost with those of another axis, per axis name.
        products: Costs of tensors that two axes cut (a convolution between two others), or one axis
            in two dimensions.
        shared: What is counted too much as long as some axes are whole.
        parts: What holds the constant, such as ``embeddings``, largest first; empty where that is
            not known.
        unit: What it is counted in, such as ``parameters``.
        curves: Measured cost of the units of an axis, per axis name.
    """

    name: str
    constant: float
    per_unit: Mapping[str, float]
    while_kept: Mapping[str, float] = field(default_factory=dict)
    products: tuple[Product, ...] = ()
    shared: tuple[Shared, ...] = ()
    rates: Mapping[str, Rate] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def of(self, kept: Mapping[str, int]) -> float:
        """Cost of a model that keeps ``kept[axis]`` units of each axis."""
        total = self.constant
        for axis, per_unit in self.per_unit.items():
            total += per_unit * kept[axis]
            if kept[axis]:
                total += self.while_kept.get(axis, 0.0)
        for axis, rate in self.rates.items():
            total += rate.amount * kept[axis] / max(kept[rate.of], 1)
        for axis, curve in self.curves.items():
            total += curve.at(kept[axis] / max(kept[curve.of], 1) if curve.of else kept[axis])
        total += sum(product.of(kept) for product in self.products)
        return total - sum(shared.of(kept) for shared in self.shared)

    @property
    def is_constant(self) -> bool:
        """Whether it is the same whatever is pruned."""
        parts = (*self.per_unit.values(), *self.while_kept.values(), *self.rates.values())
        return not any(parts) and not self.products and not self.curves


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit on one cost: `limit` in the cost's unit, `ratio` of the original's `total`."""

    cost: str
    limit: float
    total: float

    @property
    def ratio(self) -> float:
        """Limit as a fraction of the original cost."""
        return self.limit / self.total
