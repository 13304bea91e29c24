"""Parameters and FLOPs as closed forms of kept units.

Knows shapes and measured row counts; does not run models (`structure.counting` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from ..types import Axis, CostModel, Slice

Shapes = Mapping[str, tuple[int, ...]]


def params_cost(axes: Sequence[Axis], shapes: Shapes, *, layout: str = "stock") -> CostModel:
    """Number of parameters, tied ones once.

    Args:
        axes: All axes.
        shapes: Shape of every parameter by name, each parameter once.
        layout: In ``"per_layer"`` an attention that took its bias from a shared table gets its own
            columns of it, which adds to what its heads cost (T5).
    """
    per_unit = {
        axis.name: float(sum(_share(s, shapes) for s in axis.slices if s.tensor in shapes))
        for axis in axes
    }
    while_kept = {
        axis.name: float(sum(_rest(axis, axes, shapes).values()))
        for axis in axes
        if axis.removal is not None
    }
    total = float(sum(prod(shape) for shape in shapes.values()))
    model = _close("params", total, axes, per_unit, while_kept)
    if layout == "per_layer":
        own = {axis.name: float(own_table_rows(axis, shapes)) for axis in axes}
        per_unit = {name: value + own[name] for name, value in per_unit.items()}
        return CostModel(model.name, model.constant, per_unit, model.while_kept)
    return model


def own_table_rows(axis: Axis, shapes: Shapes) -> int:
    """Parameters that one head adds when its layer gets its own columns of a shared table."""
    if not axis.tied or any(s.tensor == axis.tied for s in axis.slices) or axis.removal is None:
        return 0
    return shapes[axis.tied][0]


def unsplit_table_params(axes: Sequence[Axis], shapes: Shapes, kept: Mapping[str, int]) -> int:
    """Parameters that `params_cost` counts for tables of their own, but that no layer gets.

    A shared table stays shared as long as all attentions that read it stay whole.
    """
    split = {axis.tied for axis in axes if axis.tied and kept[axis.name] < axis.size}
    return sum(own_table_rows(axis, shapes) * axis.size for axis in axes if axis.tied not in split)


def flops_cost(
    axes: Sequence[Axis],
    shapes: Shapes,
    *,
    rows: Mapping[str, int],
    macs_per_head: Mapping[str, float],
    total_flops: float,
) -> CostModel:
    """FLOPs (2 x multiply-accumulates) of one forward.

    Args:
        axes: All axes.
        shapes: Shape of every weight by name.
        rows: Row vectors that each weight multiplies in the forward, summed over calls; a weight
            that is not in a matmul (a look-up table) is missing or 0.
        macs_per_head: MACs of the products between activations per head, per ``heads`` axis.
        total_flops: FLOPs of the whole forward.
    """
    per_unit = {
        axis.name: 2.0 * sum(_share(s, shapes) * rows.get(s.tensor, 0) for s in axis.slices)
        + 2.0 * macs_per_head.get(axis.name, 0.0)
        for axis in axes
    }
    while_kept = {
        axis.name: 2.0
        * sum(size * rows.get(name, 0) for name, size in _rest(axis, axes, shapes).items())
        for axis in axes
        if axis.removal is not None
    }
    return _close("flops", total_flops, axes, per_unit, while_kept)


def _close(
    name: str,
    total: float,
    axes: Sequence[Axis],
    per_unit: dict[str, float],
    while_kept: dict[str, float],
) -> CostModel:
    sizes = {axis.name: axis.size for axis in axes}
    variable = sum(value * sizes[axis] for axis, value in per_unit.items())
    while_kept = {axis: value for axis, value in while_kept.items() if value}
    return CostModel(name, total - variable - sum(while_kept.values()), per_unit, while_kept)


def _share(s: Slice, shapes: Shapes) -> int:
    """Elements of a tensor that one unit owns."""
    shape = shapes[s.tensor]
    return s.width * prod(shape) // shape[s.dim]


def _rest(axis: Axis, axes: Sequence[Axis], shapes: Shapes) -> dict[str, int]:
    """Elements that go with the last unit only: what a removed module holds beside its units.

    The bias of the out-projection stays, and a norm that the replacement needs.
    """
    removal = axis.removal
    if removal is None:
        return {}
    prefix = removal.module + "."
    bias = f"{axis.read_at}.bias"
    norm = f"{prefix}{removal.norm}."
    rest = {
        name: prod(shape)
        for name, shape in shapes.items()
        if name.startswith(prefix) and name != bias and not name.startswith(norm)
    }
    for other in _family(axis, axes):
        for s in other.slices:
            if s.tensor in rest:
                rest[s.tensor] -= _share(s, shapes) * other.size
    return rest


def _family(axis: Axis, axes: Sequence[Axis]) -> Iterator[Axis]:
    yield axis
    yield from (other for other in axes if other.name == axis.parent)
