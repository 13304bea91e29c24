"""What kept units mean for tensors and attributes: the rows that stay, and the new sizes.

Knows axes and shapes by name. Nothing of a model is changed here: what is done to its modules
is in `modeling_gradnas`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..types import Attribute, Axis
from . import modeling_gradnas
from .lists import stacks_in, with_stacks

PART = "part"

Kept = Mapping[str, Sequence[int]]
Rows = dict[str, dict[int, Any]]
"""Rows that stay by tensor and dimension: indices, or a list of them per matrix of a stack."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every parameter and buffer by full name, tied ones under each of their names."""


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of all parameters and buffers of a model."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: tuple(tensor.shape) for name, tensor in named}


def lost_units(axis: Axis, kept: Kept) -> list[int]:
    """Units of an axis that go; an axis that `kept` does not name stays whole."""
    stay = set(kept.get(axis.name, range(axis.size)))
    return [unit for unit in range(axis.size) if unit not in stay]


def gone_layers(axes: Iterable[Axis], kept: Kept) -> set[str]:
    """Names of the axes of layers that go as a whole, with all axes that are in them."""
    return {axis.name for axis in axes if axis.is_layer and not kept.get(axis.name, (0,))}


def kept_rows(shapes: Shapes, axes: Iterable[Axis], kept: Kept) -> Rows:
    """Rows that stay, per tensor and dim; several axes may take rows of one dim.

    Tensors of modules in a list are there one by one; not those of modules that go.
    """
    axes = tuple(axes)
    stacks = stacks_in(shapes, axes)
    found = _rows_of_all(with_stacks(shapes, axes), axes, kept)
    for stack, names in stacks.items():
        dims = found.pop(stack)
        members = dims.pop(0, range(len(names)))
        for place, member in enumerate(members):
            own = {dim - 1: _rows_of_one(rows, place) for dim, rows in dims.items()}
            if own:
                found[names[member]] = own
    return found


def _rows_of_one(rows: Sequence[Any], place: int) -> Any:
    """Rows of one of the matrices that stay."""
    return rows[place] if rows and not isinstance(rows[0], int) else rows


def _rows_of_all(shapes: Shapes, axes: Iterable[Axis], kept: Kept) -> Rows:
    """As `kept_rows`, of stacks as they are."""
    lost: dict[str, dict[int, set[int]]] = {}
    within: dict[str, dict[int, set[tuple[int, int]]]] = {}  # (matrix of a stack, row)
    for axis in axes:
        gone = lost_units(axis, kept)
        for s in axis.slices:
            if s.each:
                pairs = {(u // s.each, row) for u in gone for row in s.rows([u % s.each])}
                within.setdefault(s.tensor, {}).setdefault(s.dim, set()).update(pairs)
            else:
                lost.setdefault(s.tensor, {}).setdefault(s.dim, set()).update(s.rows(gone))
    found: Rows = {
        name: {
            dim: [row for row in range(shapes[name][dim]) if row not in rows]
            for dim, rows in dims.items()
        }
        for name, dims in lost.items()
    }
    for name, stacks in within.items():
        matrices = found.setdefault(name, {}).get(0, range(shapes[name][0]))
        for dim, rows in stacks.items():
            found[name][dim] = [
                [row for row in range(shapes[name][dim]) if (matrix, row) not in rows]
                for matrix in matrices
            ]
    return found


def new_sizes(
    shapes: Shapes,
    attributes: Iterable[tuple[Attribute, Axis]],
    counts: Mapping[str, int],
    rows: Mapping[str, Mapping[int, Sequence[Any]]],
) -> dict[str, dict[str, Any]]:
    """Per module path the shapes of its tensors and the values of its attributes.

    Args:
        shapes: Of the model before the cut.
        attributes: Each with the axis whose units it counts.
        counts: Number of kept units per axis name.
        rows: Rows that stay (see `kept_rows`).
    """
    modules: dict[str, dict[str, Any]] = {}
    for name, dims in rows.items():
        path, _, leaf = name.rpartition(".")
        shape = list(shapes[name])
        for dim, stay in dims.items():
            is_nested = len(stay) > 0 and not isinstance(stay[0], int)
            shape[dim] = len(stay[0]) if is_nested else len(stay)
        modules.setdefault(path, {})[leaf] = shape
    for attribute, axis in attributes:
        entry = modules.setdefault(attribute.module, {})
        if attribute.in_config:
            entry = entry.setdefault("config", {})
        if attribute.per is not None:
            entry[attribute.name] = attribute.factor * counts[axis.name] // counts[attribute.per]
            continue
        whole = attribute.factor * axis.size if attribute.value is None else attribute.value
        # Counted down: the channels of a concatenation belong to several axes, or to none.
        before = entry.get(attribute.name, whole)
        entry[attribute.name] = before - attribute.factor * (axis.size - counts[axis.name])
    return modules


def cut_part(
    model: nn.Module, path: str, axes: Iterable[Axis], kept: Kept
) -> tuple[nn.Module, Rows]:
    """Copy of one module as a cut of the model leaves it, and the rows that its tensors kept.

    Args:
        model: Root of the names in `axes`; it is left as it is, and its hooks are not copied.
        path: The module's path.
        axes: Axes that own rows or attributes inside the module.
        kept: Kept units per axis name.

    Raises:
        RecordError: The axes do not fit the module.
    """
    holder = nn.ModuleDict({PART: _copy_without_hooks(model.get_submodule(path))})
    inside = [_within(axis, path) for axis in axes]
    shapes = shapes_of(holder)
    rows = kept_rows(shapes, inside, kept)
    counts = {axis.name: axis.size - len(lost_units(axis, kept)) for axis in inside}
    attributes = [(attribute, axis) for axis in inside for attribute in axis.attributes]
    record = {
        "format_version": modeling_gradnas.FORMAT_VERSION,
        "architecture": type(holder).__name__,
        "modules": new_sizes(shapes, attributes, counts, rows),
    }
    modeling_gradnas.resize(holder, record, rows=rows)
    return holder[PART], {name.removeprefix(f"{PART}."): dims for name, dims in rows.items()}


def _copy_without_hooks(module: nn.Module) -> nn.Module:
    """Copy of a module; what its forward hooks hold is not copied either."""
    own = [hook for m in module.modules() for hooks in _hooks(m) for hook in hooks.values()]
    twin = copy.deepcopy(module, {id(hook): hook for hook in own})
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        if _ACCELERATE[0] in vars(part):
            for name in _ACCELERATE:
                vars(part).pop(name, None)
    return twin


_ACCELERATE = ("_hf_hook", "_old_forward", "forward")
"""What Accelerate puts into a module whose weights it places."""


def _hooks(module: nn.Module) -> Iterator[Mapping[Any, Any]]:
    """All that runs around a module's forward."""
    own = vars(module)
    yield from (module._forward_hooks, module._forward_pre_hooks)
    if _ACCELERATE[0] in own:
        yield {name: own[name] for name in _ACCELERATE if name in own}


def _within(axis: Axis, path: str) -> Axis:
    """The axis with what it owns inside the module at `path` only, by its names in `cut_part`."""

    def moved(name: str) -> str:
        return above(below(name, path), PART)

    inside = f"{path}." if path else ""
    return replace(
        axis,
        slices=tuple(
            replace(s, tensor=moved(s.tensor)) for s in axis.slices if s.tensor.startswith(inside)
        ),
        attributes=tuple(
            replace(a, module=moved(a.module))
            for a in axis.attributes
            if f"{a.module}.".startswith(inside)
        ),
    )


# --- paths of modules -----------------------------------------------------------------------------


def below(path: str, scope: str) -> str:
    """`path` relative to `scope`."""
    return path[len(scope) + 1 :] if scope and path != scope else ("" if path == scope else path)


def above(path: str, scope: str) -> str:
    """Inverse of `below`."""
    return ".".join(part for part in (scope, path) if part)
