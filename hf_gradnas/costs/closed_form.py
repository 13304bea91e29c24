"""Parameters, bytes and FLOPs as closed forms of kept units.

Knows shapes and measured row counts; does not run models (`costs.counting` does).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from math import prod

from ..types import Axis, CostModel, Product, Rate, Shared, Slice

Shapes = Mapping[str, tuple[int, ...]]


def params_cost(
    axes: Sequence[Axis],
    shapes: Shapes,
    *,
    layout: str = "stock",
    tied: Collection[str] = (),
    name: str = "params",
    weights: Mapping[str, float] | None = None,
    routed: Set[str] = frozenset(),
) -> CostModel:
    """Number of parameters, tied ones once, or what they cost.

    Args:
        axes: All axes.
        shapes: Shape of every parameter by name, each parameter once; slices of tensors that are
            not among them (buffers) cost nothing.
        layout: In ``"per_layer"`` an attention that took its bias from a shared table gets its own
            columns of it, which adds to what its heads cost (T5).
        tied: Names of parameters that another module has too, and keeps when one of them goes.
        name: Name of the cost.
        weights: Cost of one element of each parameter, by name; None: 1 each.
        routed: Names of those of experts; `weights` has the share of it that a token meets, so that
            they cost what the neurons in one expert cost, however many experts there are.
    """
    weights = dict.fromkeys(shapes, 1.0) if weights is None else weights
    products, stacks = _products(axes, shapes, weights), _stacks(axes)
    alone = {name: shape for name, shape in shapes.items() if name not in tied}
    per_unit = {
        axis.name: sum(
            _share(s, shapes) * weights[s.tensor]
            for s in _linear(axis, shapes, products, stacks)
            if not (axis.is_chosen and s.tensor in routed)
        )
        for axis in axes
    }
    rates = _rates(axes, per_unit) if routed else {}
    while_kept = {
        axis.name: sum(size * weights[name] for name, size in _rest(axis, axes, alone).items())
        for axis in axes
        if axis.removal is not None and not axis.is_layer
    }
    total = float(sum(prod(shape) * weights[name] for name, shape in shapes.items()))
    model = _close(name, total, axes, per_unit, while_kept, products, rates)
    in_layers = {
        axis.name: _cost_below(axis.module, alone, weights) for axis in axes if axis.is_layer
    }
    model = with_layers(model, axes, in_layers)
    if layout == "per_layer":
        own = {axis.name: _own_table(axis, shapes, weights) for axis in axes}
        per_unit = {name: value + own[name] for name, value in model.per_unit.items()}
        return replace(model, per_unit=per_unit, shared=tuple(_shared(axes, own)))
    return model


def _rates(axes: Sequence[Axis], per_unit: dict[str, float]) -> dict[str, Rate]:
    """What units in chosen ones cost, taken out of `per_unit`."""
    sizes = {axis.name: axis.size for axis in axes}
    chosen = {axis.name for axis in axes if axis.is_chosen}
    return {
        axis.name: Rate(axis.parent, per_unit.pop(axis.name) * sizes[axis.parent])
        for axis in axes
        if axis.parent in chosen
    }


def _own_table(axis: Axis, shapes: Shapes, weights: Mapping[str, float]) -> float:
    """What one head adds when its layer gets its own columns of a shared table."""
    if not axis.tied or any(s.tensor == axis.tied for s in axis.slices) or axis.removal is None:
        return 0.0
    return shapes[axis.tied][0] * weights[axis.tied]


def _shared(axes: Sequence[Axis], own: Mapping[str, float]) -> Iterator[Shared]:
    """What tables of their own would cost, while the attentions that share one stay whole."""
    sizes: dict[str, dict[str, int]] = {}
    for axis in axes:
        if axis.tied:
            sizes.setdefault(axis.tied, {})[axis.name] = axis.size
    for together in sizes.values():
        yield Shared(together, sum(own[name] * size for name, size in together.items()))


def flops_cost(
    axes: Sequence[Axis],
    shapes: Shapes,
    *,
    rows: Mapping[str, float],
    macs_per_head: Mapping[str, float],
    total_flops: float,
    in_layers: Mapping[str, float] | None = None,
) -> CostModel:
    """FLOPs (2 x multiply-accumulates) of one forward.

    Args:
        axes: All axes.
        shapes: Shape of every weight by name.
        rows: Row vectors that each weight multiplies in the forward, summed over calls; a weight
            that is not in a matmul (a look-up table) is missing or 0.
        macs_per_head: MACs of the products between activations per head, per ``heads`` axis.
        total_flops: FLOPs of the whole forward.
        in_layers: FLOPs of each layer, per axis of a layer.
    """
    products = _products(axes, shapes, {name: 2.0 * rows.get(name, 0) for name in shapes})
    stacks = _stacks(axes)
    per_unit = {
        axis.name: 2.0
        * sum(
            _share(s, shapes) * rows.get(s.tensor, 0)
            for s in _linear(axis, shapes, products, stacks)
            if s.role == "makes" or not axis.is_chosen
        )
        + 2.0 * macs_per_head.get(axis.name, 0.0)
        for axis in axes
    }
    rates = _rates(axes, per_unit)
    while_kept = {
        axis.name: 2.0
        * sum(size * rows.get(name, 0) for name, size in _rest(axis, axes, shapes).items())
        for axis in axes
        if axis.removal is not None and not axis.is_layer
    }
    model = _close("flops", total_flops, axes, per_unit, while_kept, products, rates)
    return with_layers(model, axes, in_layers or {})


def _cost_below(path: str, shapes: Shapes, weights: Mapping[str, float]) -> float:
    """Cost of the parameters below a path."""
    names = (name for name in shapes if name.startswith(f"{path}."))
    return float(sum(prod(shapes[name]) * weights[name] for name in names))


def with_layers(
    model: CostModel, axes: Sequence[Axis], in_layers: Mapping[str, float]
) -> CostModel:
    """The closed form in which a layer costs what is in it beside the axes that are in it.

    So that a layer that goes, with all units of these axes, takes all its cost along.
    """
    sizes = {axis.name: axis.size for axis in axes}
    per_unit, constant = dict(model.per_unit), model.constant
    for layer, amount in in_layers.items():
        without = {a.name: 0 if a.within == layer else a.size for a in axes}
        per_unit[layer] = amount - (model.of(sizes) - model.of(without))
        constant -= per_unit[layer]
    return replace(model, per_unit=per_unit, constant=constant)


def _products(
    axes: Sequence[Axis], shapes: Shapes, factors: Mapping[str, float]
) -> dict[str, Product]:
    """Cost of every tensor that axes cut in two or more dimensions, by its name.

    A convolution between two channels axes has ``out · in/groups · kernel`` elements: no sum over
    axes, whose units would each cost the same whatever the others keep.
    """
    sizes, stacks = {axis.name: axis.size for axis in axes}, _stacks(axes)
    products = {}
    for tensor, cut in _rows_per_unit(axes, shapes).items():
        if len(cut) > 1 and tensor not in stacks:
            dims = []
            for dim, length in enumerate(shapes[tensor]):
                weights = cut.get(dim, {})
                constant = length - sum(rows * sizes[name] for name, rows in weights.items())
                dims.append((float(constant), tuple(weights.items())))
            products[tensor] = Product(factors[tensor], tuple(dims))
    return products


def _rows_per_unit(axes: Sequence[Axis], shapes: Shapes) -> dict[str, dict[int, dict[str, float]]]:
    """Rows that a unit of each axis owns, per parameter and dimension."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for axis in axes:
        for s in axis.slices:
            if s.tensor in shapes:
                dim = s.dim % len(shapes[s.tensor])
                rows = found.setdefault(s.tensor, {}).setdefault(dim, {})
                rows[axis.name] = rows.get(axis.name, 0.0) + s.width
    return found


def _stacks(axes: Sequence[Axis]) -> frozenset[str]:
    """Tensors of which nested units own rows in one matrix each: all their cost is those units'."""
    return frozenset(part.tensor for axis in axes for part in axis.slices if part.each)


def _linear(
    axis: Axis, shapes: Shapes, products: Mapping[str, Product], stacks: Set[str]
) -> Iterator[Slice]:
    """Slices of parameters whose cost is linear in what the axis keeps."""
    return (
        part
        for part in axis.slices
        if part.tensor in shapes and part.tensor not in products
        if part.each or part.tensor not in stacks
    )


def _close(
    name: str,
    total: float,
    axes: Sequence[Axis],
    per_unit: dict[str, float],
    while_kept: dict[str, float],
    products: Mapping[str, Product],
    rates: Mapping[str, Rate] | None = None,
) -> CostModel:
    """The closed form whose value for the whole model is `total`."""
    sizes = {axis.name: axis.size for axis in axes}
    costly = tuple(product for product in products.values() if product.factor)
    variable = sum(value * sizes[axis] for axis, value in per_unit.items())
    variable += sum(product.of(sizes) for product in costly)
    rates = {axis: rate for axis, rate in (rates or {}).items() if rate.amount}
    variable += sum(rate.amount * sizes[axis] / sizes[rate.of] for axis, rate in rates.items())
    while_kept = {axis: value for axis, value in while_kept.items() if value}
    constant = total - variable - sum(while_kept.values())
    return CostModel(name, constant, per_unit, while_kept, costly, rates=rates)


def _share(s: Slice, shapes: Shapes) -> int:
    """Elements of a tensor that one unit owns."""
    shape = shapes[s.tensor]
    matrices = shape[0] if s.each else 1
    return s.width * prod(shape) // shape[s.dim] // matrices


def _rest(axis: Axis, axes: Sequence[Axis], shapes: Shapes) -> dict[str, int]:
    """Elements that go with the last unit only: what a removed module holds beside its units.

    The bias of the out-projection stays, and a norm that the replacement needs. A tensor that other
    axes cut too is counted as theirs: a plan that removes the module costs at most what is said.
    """
    removal = axis.removal
    if removal is None:
        return {}
    prefix = removal.module + "."
    bias = f"{prefix}{removal.projection}.bias"
    norm = f"{prefix}{removal.norm}."
    family = {other.name: other for other in _family(axis, axes)}
    others = {s.tensor for other in axes if other.name not in family for s in other.slices}
    rest = {
        name: prod(shape)
        for name, shape in shapes.items()
        if name.startswith(prefix) and name != bias and not name.startswith(norm)
        if name not in others
    }
    for other in family.values():
        for s in other.slices:
            if s.tensor in rest:
                rest[s.tensor] -= _share(s, shapes) * other.size
    return rest


def _family(axis: Axis, axes: Sequence[Axis]) -> Iterator[Axis]:
    yield axis
    yield from (other for other in axes if other.name == axis.parent)
