"""Cut a model: say what kept indices mean for its tensors (`plan_cut`), and do it (`apply_cut`).

Knows axes and tensors; does not know how the kept indices were chosen, nor how a model is saved.
What is done to the modules is in `surgery.modeling_gradnas`, which also loads a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import PlanError
from ..running.hooks import tensor_at
from ..types import (
    KINDS,
    Axis,
    Copied,
    Cut,
    Plan,
    check_indices,
    check_values,
    present_plan,
)
from . import modeling_gradnas
from .lists import members_that_stay
from .rows import Kept, Shapes, gone_layers, kept_rows, new_sizes, shapes_of

Record = Mapping[str, Any]
EXPERTS_KERNEL = "_experts_implementation"
"""Config value by which a module of experts chooses its kernel."""


def plan_cut(
    shapes: Shapes,
    axes: Sequence[Axis],
    kept: Kept,
    *,
    architecture: str,
    layout: str = "per_layer",
) -> Cut:
    """Say what a cut down to the kept units does, from names and shapes alone.

    Args:
        shapes: Of all parameters and buffers before the cut, and of shared tables outside of them.
        axes: All axes of the model, proved.
        kept: Sorted kept indices per axis name; an axis that is not named stays whole.
        architecture: Name of the model's class.
        layout: In ``"per_layer"``, modules that took a bias from a shared table get their own.

    Raises:
        PlanError: `kept` does not fit the axes.
    """
    check_kept(axes, kept)
    counts = {axis.name: len(kept.get(axis.name, range(axis.size))) for axis in axes}
    gone = gone_layers(axes, kept)
    changed = [a for a in axes if a.within not in gone and _is_changed(a, axes, counts)]
    rows = kept_rows(shapes, changed, kept)
    sizes = dict(_sizes_and_removals(shapes, axes, changed, counts, rows))
    own: dict[str, list[int]] = {}
    copied: dict[str, Copied] = {}
    if layout == "per_layer":
        own, copied = _own_tables(shapes, axes, counts, kept)
    kernels = _slower_kernels(changed, counts, {axis.name: axis for axis in axes})
    for path, config in kernels.items():
        sizes["modules"].setdefault(path, {}).setdefault("config", {}).update(config)
    members = members_that_stay(shapes, changed, kept)
    for each in members:
        rows, sizes["modules"] = each.all_renamed(rows), each.all_renamed(sizes["modules"])
    record: dict[str, Any] = {
        "format_version": modeling_gradnas.FORMAT_VERSION,
        "architecture": architecture,
        **sizes,
        "own_position_bias": own,
    }
    if members:
        record["lists"] = {each.holder: each.names_gone for each in members}
    adapted = _adaptations(changed, kept, record["removed"])
    if adapted:
        record["adapted"] = adapted
    stay: dict[str, dict[int, tuple[Any, ...]]] = {
        name: {
            dim: tuple(row if isinstance(row, int) else tuple(row) for row in left)
            for dim, left in dims.items()
        }
        for name, dims in rows.items()
    }
    return Cut(stay, record, copied, {each.holder: each.names_before for each in members})


def apply_cut(
    model: nn.Module, planned: Cut, *, tables: Mapping[str, Tensor] | None = None
) -> None:
    """Cut a model in place; everything is checked before the first write.

    Args:
        model: Root of the names in the cut.
        planned: What `plan_cut` said for its shapes.
        tables: Tensors that are copied from by name, where the model is only a part without them.

    Raises:
        RecordError: The cut does not fit the model, which is unchanged.
    """
    new_tensors = {}
    for name, part in planned.copied.items():
        source = (tables or {}).get(part.source)
        whole = tensor_at(model, part.source) if source is None else source
        index = torch.tensor(part.rows, device=whole.device)
        new_tensors[name] = whole.detach().index_select(part.dim, index).clone()
    rows: dict[str, dict[int, list[Any]]] = {
        name: {
            dim: [row if isinstance(row, int) else list(row) for row in stay]
            for dim, stay in dims.items()
        }
        for name, dims in planned.rows.items()
    }
    modeling_gradnas.resize(
        model, planned.record, rows=rows, new_tensors=new_tensors, members=planned.members
    )
    _forget_results(model, {name.rpartition(".")[0] for name in rows})


def _forget_results(model: nn.Module, paths: Set[str]) -> None:
    """Empty the dictionaries of results that modules keep, made of tensors as they were (LeViT)."""
    for path, module in model.named_modules():
        for name, kept in vars(module).items() if path in paths else ():
            is_own = type(kept) is dict and not name.startswith("_")
            if is_own and kept and all(isinstance(value, Tensor) for value in kept.values()):
                kept.clear()


def cut(
    model: nn.Module,
    axes: Sequence[Axis],
    kept: Kept,
    *,
    layout: str = "per_layer",
    tables: Mapping[str, Tensor] | None = None,
) -> Record:
    """Plan a cut for a model and apply it; returns the record of new shapes.

    Args:
        model: As of `apply_cut`.
        axes: As of `plan_cut`.
        kept: As of `plan_cut`.
        layout: As of `plan_cut`.
        tables: Shared tables by name (`Axis.tied`), where `model` is only a part that lacks them.

    Raises:
        PlanError: `kept` does not fit the axes.
    """
    shapes = {**shapes_of(model), **{name: tuple(t.shape) for name, t in (tables or {}).items()}}
    planned = plan_cut(shapes, axes, kept, architecture=type(model).__name__, layout=layout)
    apply_cut(model, planned, tables=tables)
    return planned.record


def check_plan(axes: Sequence[Axis], plan: Plan) -> Plan:
    """Check that a plan was made for a model with these axes, and give it their present names.

    Raises:
        PlanError: It holds nonsense, counts other units, or keeps what cannot be kept.
    """
    check_values(plan)
    if plan.format_version == 1:  # of version 0.1
        plan = present_plan(plan, axes)
    sizes = {axis.name: axis.size for axis in axes}
    for name in [*sizes, *plan.sizes]:
        if plan.sizes.get(name) != sizes.get(name):
            raise PlanError(
                f"{name}: the plan counts {plan.sizes.get(name, 'no')} units, this model has "
                f"{sizes.get(name, 'none')}; make the plan from this model's scores."
            )
    check_kept(axes, plan.kept)
    return plan


def check_kept(axes: Sequence[Axis], kept: Kept) -> None:
    """Check that kept indices fit the axes.

    Raises:
        PlanError: An unknown axis, an index that is outside it or no integer, an unsorted list,
            fewer units than can stay, or heads that are not in the kept KV groups in equal number.
    """
    by_name, gone = {axis.name: axis for axis in axes}, gone_layers(axes, kept)
    for name, units in kept.items():
        if name not in by_name:
            raise PlanError(
                f"{name}: the plan names an axis that this model lacks; it has "
                f"{', '.join(by_name)}. Make the plan from this model's scores."
            )
        size = by_name[name].size
        check_indices(name, units, size)
        if by_name[name].within in gone:
            _check_gone(by_name[name], units)
        elif len(units) < by_name[name].minimum:
            plural = KINDS[by_name[name].kind].plural
            raise PlanError(
                f"{name}: {len(units)} of its {size} {plural} are kept, but at least "
                f"{by_name[name].minimum} must stay; keep more, or leave the axis out of the plan."
            )
    for axis in axes:
        if axis.within in gone:
            _check_gone(axis, kept.get(axis.name, range(axis.size)))
        elif axis.parent is not None:
            _check_groups(axis, by_name[axis.parent], kept)
        if axis.blocks > 1 and axis.name in kept and axis.within not in gone:
            _check_blocks(axis, kept[axis.name])


def _check_gone(axis: Axis, units: Sequence[int]) -> None:
    if units:
        raise PlanError(
            f"{axis.name}: {len(units)} {KINDS[axis.kind].plural} are kept, but they are in "
            f"{axis.within}, which the plan removes; keep none of them, or the layer."
        )


def _check_blocks(axis: Axis, units: Sequence[int]) -> None:
    stay = Counter(axis.block_of(unit) for unit in units)
    if len({stay[block] for block in range(axis.blocks)}) > 1:
        found = [stay[block] for block in range(axis.blocks)]
        raise PlanError(
            f"{axis.name}: every one of the {axis.blocks} groups that the router chooses among "
            f"must keep the same number of {KINDS[axis.kind].plural}, found {found}; make the plan "
            "again."
        )


def _check_groups(heads: Axis, groups: Axis, kept: Kept) -> None:
    inner, outer = KINDS[heads.kind], KINDS[groups.kind]
    per_group = heads.size // groups.size
    in_groups: dict[int, int] = dict.fromkeys(kept.get(groups.name, range(groups.size)), 0)
    for head in kept.get(heads.name, range(heads.size)):
        if head // per_group not in in_groups:
            raise PlanError(
                f"{heads.name}: {inner.singular} {head} is in {outer.singular} "
                f"{head // per_group}, which the plan removes; keep it in {groups.name} or drop "
                f"the {inner.singular}."
            )
        in_groups[head // per_group] += 1
    if len(set(in_groups.values())) > 1 or 0 in in_groups.values():
        raise PlanError(
            f"{heads.name}: every {outer.singular} must keep the same number of {inner.plural}, "
            f"found {in_groups}; make the plan again."
        )


def _is_changed(axis: Axis, axes: Sequence[Axis], counts: Mapping[str, int]) -> bool:
    """Whether the axis, or one nested with it, loses units."""
    family = [axis.name, axis.parent] + [a.name for a in axes if a.parent == axis.name]
    sizes = {a.name: a.size for a in axes}
    return any(name is not None and counts[name] < sizes[name] for name in family)


def _sizes_and_removals(
    shapes: Shapes,
    axes: Sequence[Axis],
    changed: Sequence[Axis],
    counts: Mapping[str, int],
    rows: Mapping[str, Mapping[int, Sequence[Any]]],
) -> Record:
    """New sizes, attributes and removals; what is in a removed module is left out."""
    going = [a for a in changed if a.removal is not None and counts[a.name] == 0]
    removed = {a.removal.module: removal_spec(a) for a in going if a.removal is not None}

    def gone(path: str) -> bool:
        return any(path == r or path.startswith(r + ".") for r in removed)

    changing = {axis.name: axis for axis in changed}
    attributes = [
        (attribute, changing[attribute.axis])
        for axis in axes
        for attribute in axis.attributes
        if attribute.axis in changing and not gone(attribute.module)
    ]
    left = {name: dims for name, dims in rows.items() if not gone(name.rpartition(".")[0])}
    return {"modules": new_sizes(shapes, attributes, counts, left), "removed": removed}


def removal_spec(axis: Axis) -> dict[str, Any]:
    """How the module of an axis is replaced, as the loader file takes it."""
    removal = axis.removal
    if removal is None:
        return {}
    return {
        "projection": removal.projection,
        "features": removal.features,
        "returns": list(removal.returns),
        "cross": removal.cross,
        **({"norm": removal.norm} if removal.norm else {}),
        **({"passes": True} if removal.passes else {}),
    }


def _slower_kernels(
    changed: Sequence[Axis], counts: Mapping[str, int], axes: Mapping[str, Axis]
) -> dict[str, dict[str, str]]:
    """Config values of modules of experts whose width the grouped kernel cannot run."""
    found = {}
    for axis in changed:
        if axis.multiple > 1 and axis.parent is not None:
            each = counts[axis.name] // max(counts[axis.parent], 1)
            if each % axis.multiple and each < axis.size // axes[axis.parent].size:
                found[axis.taps[0].owner] = {EXPERTS_KERNEL: "eager"}
    return found


def _own_tables(
    shapes: Shapes, axes: Sequence[Axis], counts: Mapping[str, int], kept: Kept
) -> tuple[dict[str, list[int]], dict[str, Copied]]:
    """Tables for modules that shared one: its columns of the kept heads; [] for cross-attention.

    Cross-attention has no table, but passes zeros of its own number of heads from layer to layer.
    """
    own: dict[str, list[int]] = {}
    copied: dict[str, Copied] = {}
    changed = [axis for axis in axes if _is_changed(axis, axes, counts)]
    groups = {axis.tied for axis in changed if axis.tied}
    crossing = any(a.removal is not None and a.removal.cross for a in changed)
    for axis in axes:
        if axis.removal is None or not axis.removal.table:
            continue
        module, units = axis.removal.module, list(kept.get(axis.name, range(axis.size)))
        if axis.removal.cross and crossing and units:
            own[module] = []
        name = f"{module}.{axis.removal.table}.weight"
        if axis.tied in groups and axis.tied != name and units:
            copied[name] = Copied(axis.tied, 1, tuple(units))
            own[module] = [shapes[axis.tied][0], len(units)]  # (buckets, heads)
    return own, copied


def _adaptations(
    changed: Sequence[Axis], kept: Kept, removed: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What calls of modules need besides, by path."""
    found: dict[str, dict[str, Any]] = {}
    for axis in changed:
        need, units = axis.adaptation, list(kept.get(axis.name, range(axis.size)))
        if need is not None and units and need.module not in removed:
            found[need.module] = {
                "arguments": list(need.arguments),
                "units": [axis.size, units],
                "width": [need.width, axis.width * len(units)] if need.width else [],
            }
    return found


def make_per_layer(model: PreTrainedModel, record: Record) -> PreTrainedModel:
    """Turn a model that has the record's shapes into its per-layer class, and note the record.

    From then on the model's own ``save_pretrained`` writes a checkpoint that loads everywhere.
    """
    model.config.gradnas = dict(modeling_gradnas.checked(record))
    model.__class__ = modeling_gradnas.per_layer_class(type(model))
    modeling_gradnas.name_files(model)
    return model
