"""Prove for the heads and neurons of a module that cutting it equals masking it.

For each kind of module: a copy in float64 runs on its captured input, once with masks and once cut,
for several choices of kept units and every attention kernel the model offers. What cannot be proved
is refused with the reason, and the rest is pruned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import attention_implementation
from ..errors import StructureError, described
from ..masks import masked
from ..structure.discovery import (
    MAX_TRIES,
    Discovery,
    Place,
    Template,
    move_axis,
)
from ..structure.probe import double_call, double_copy
from ..structure.trace import Call, above
from ..surgery import cut
from ..types import Axis, Kind, Refusal, Structure

TOLERANCE = 1e-10
"""Largest difference between masked and cut, relative to the largest output, in float64."""
EFFECT = 1e-7
"""Smallest effect of a mask, relative to the largest output, that counts as one."""
NO_EFFECT = "has no effect on the input"
NOT_RUNNING = "it does not run"
HOLDER = "module"
ROUNDING = 1e-6
"""Differences below this may come from rounding to float32 inside the module."""
RETRY_SCALES = (1.0, 1.01, 0.97)


def some_axes(model: nn.Module, structure: Structure) -> Structure:
    """The structure itself, if it has an axis.

    Raises:
        StructureError: It has none.
    """
    refusals = structure.refusals
    if not structure.axes:
        reasons = "; ".join(f"{r.module} {r.kind}: {r.reason}" for r in refusals[:4])
        raise StructureError(
            f"{type(model).__name__}: found {len(refusals)} modules, but none can be pruned with "
            f"proof ({reasons or 'no attention, no FFN, no channels'}). Report the model type."
        )
    return structure


def proved(model: nn.Module, discovery: Discovery) -> Structure:
    """Axes whose kind is proved; the others become refusals. There may be no axis."""
    kernels = _kernels(model)
    same: dict[int, list[Place]] = {}
    for place in discovery.places:
        same.setdefault(id(place.template), []).append(place)
    outcomes = {key: _outcome(model, places, kernels) for key, places in same.items()}
    axes: list[Axis] = []
    refusals = list(discovery.refusals)
    names = _distinct_names(discovery.places)
    for place, name in zip(discovery.places, names, strict=True):
        outcome = outcomes[id(place.template)]
        if isinstance(outcome, str):
            refusals.append(Refusal(place.scope, place.template.kind, outcome))
        else:
            axes += [move_axis(axis, place.scope, tied=place.tied, name=name) for axis in outcome]
    refusals = [r for r in refusals if not _is_settled(r, axes)]
    return Structure(tuple(axes), tuple(refusals))


def _distinct_names(places: Sequence[Place]) -> list[str]:
    """Path that names the axes of each place: its module, or what is inside it if that has several.

    A layer with two FFNs, or a list of experts, has two axes of one kind: they are named after
    their out-projections.
    """
    same = Counter((place.scope, place.template.kind) for place in places)
    return [
        place.scope
        if same[place.scope, place.template.kind] == 1
        else above(place.template.versions[0][-1].taps[0].module, place.scope)
        for place in places
    ]


def _is_settled(refusal: Refusal, axes: Sequence[Axis]) -> bool:
    """Whether another pair of weights in the refused module turned out to be its FFN."""
    return any(
        axis.kind is Kind.NEURONS and refusal.kind == axis.kind and axis.module == refusal.module
        for axis in axes
    )


def _kernels(model: nn.Module) -> list[str]:
    """Attention kernels that the model can run on any device."""
    sdpa = any(vars(base).get("_supports_sdpa") for base in type(model).__mro__)
    return ["eager", "sdpa"] if sdpa else ["eager"]


def _outcome(
    model: nn.Module, places: Sequence[Place], kernels: Sequence[str]
) -> tuple[Axis, ...] | str:
    """As `_prove_template`; where the proof itself cannot be made, the reason is its error."""
    try:
        return _prove_template(model, places, kernels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it cannot be proved ({described(error)})"


def _prove_template(
    model: nn.Module, places: Sequence[Place], kernels: Sequence[str]
) -> tuple[Axis, ...] | str:
    """The first version of the axes that is proved, or the reason why there is none.

    Where everything but the removal of the whole module is proved, one unit has to stay. A module
    on which no mask has an effect proves nothing; then the next one of its kind is tried.
    """
    reasons: list[str] = []
    for place in places[:MAX_TRIES]:
        module = model.get_submodule(place.scope)
        tables = {place.tied: model.get_parameter(place.tied).double()} if place.tied else None
        for minimum in (0, 1):
            for version in place.template.versions:
                axes = tuple(replace(a, tied=place.tied, minimum=minimum) for a in version)
                reason = _disproof(module, place.template, axes, kernels, tables)
                if not reason:
                    return axes
                reasons.append(reason)
        if not any(NO_EFFECT in reason for reason in reasons):
            break
    return next((r for r in reasons if NOT_RUNNING not in r), reasons[0])


def _disproof(
    module: nn.Module,
    template: Template,
    axes: tuple[Axis, ...],
    kernels: Sequence[str],
    tables: Mapping[str, Tensor] | None,
) -> str:
    """Why masking and cutting differ; "" when they agree everywhere."""
    for kept in trial_plans(axes):
        for kernel in kernels:
            try:
                difference, effect = _smallest_difference(
                    module, template, axes, kept, kernel=kernel, tables=tables
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the module's own code may raise anything
                told = f"{NOT_RUNNING} ({described(error)})"
                return f"cut to {_counts(kept)} {told}"
            if not effect > EFFECT:
                return f"masking down to {_counts(kept)} {NO_EFFECT}"
            if not difference <= TOLERANCE:
                return (
                    f"cut to {_counts(kept)} it differs from masked by {difference:.1e} "
                    f"({kernel}, relative, float64)"
                )
    return ""


def _smallest_difference(
    module: nn.Module, template: Template, *args: Any, **kwargs: Any
) -> tuple[float, float]:
    """Difference and effect on the captured input, scaled anew while rounding may be at fault.

    Forwards that compute a norm or a softmax in float32 round there: two values that differ by
    1e-16 may then differ by 1e-8, in rare elements. Another input meets other elements.
    """
    for scale in RETRY_SCALES:
        call = double_call(template.call, scale=scale)
        difference, effect = masked_against_cut(module, call, *args, **kwargs)
        if not TOLERANCE < difference < ROUNDING:
            break
    return difference, effect


def _counts(kept: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{len(units)} {name.rpartition(':')[2]}" for name, units in kept.items())


@torch.no_grad()
def masked_against_cut(
    module: nn.Module,
    call: Call,
    axes: tuple[Axis, ...],
    kept: Mapping[str, Sequence[int]],
    *,
    kernel: str,
    tables: Mapping[str, Tensor] | None = None,
) -> tuple[float, float]:
    """Difference between masked and cut, and effect of the mask, relative to the largest output."""
    holder = nn.ModuleDict({HOLDER: double_copy(module)})  # the module itself may be replaced
    axes = tuple(move_axis(axis, HOLDER, tied=axis.tied) for axis in axes)
    kept = {HOLDER + name: units for name, units in kept.items()}
    with attention_implementation(holder, kernel):
        whole = _run(holder[HOLDER], call)
        with masked(holder, axes, kept):
            reference = _run(holder[HOLDER], call)
        cut(holder, axes, kept, tables=tables)
        result = _run(holder[HOLDER], call)
    scale = max(float(whole.abs().max()), torch.finfo(whole.dtype).tiny)
    difference = float((result - reference).abs().max()) / scale
    return difference, float((reference - whole).abs().max()) / scale


def _run(module: nn.Module, call: Call) -> Tensor:
    output = module(*call.args, **call.kwargs)
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise TypeError(f"the module returns {type(first).__name__} where a tensor was expected")
    return first


def trial_plans(axes: tuple[Axis, ...]) -> Iterator[dict[str, list[int]]]:
    """Irregular choices of kept units for one module, and nothing kept at all."""
    last = axes[-1]
    if last.parent is not None:
        yield from _grouped_plans(axes[0], last)
    else:
        for kept in _subsets(last):
            yield {last.name: kept}
    if not last.minimum:
        yield {axis.name: [] for axis in axes}


def _subsets(axis: Axis) -> Iterator[list[int]]:
    if axis.kind is Kind.HEADS and axis.size > 1:
        yield [unit for unit in range(axis.size) if unit != 1]
    generator = torch.Generator().manual_seed(axis.size)
    half = torch.randperm(axis.size, generator=generator)[: axis.size // 2]
    if len(half):
        yield sorted(half.tolist())


def _grouped_plans(groups: Axis, heads: Axis) -> Iterator[dict[str, list[int]]]:
    per_group = heads.size // groups.size
    fewer_groups = list(range(1, groups.size))
    irregular = [  # one head less in each group, at another place each time
        g * per_group + h
        for g in range(groups.size)
        for h in range(per_group)
        if h != g % per_group
    ]
    for kept_groups, kept_heads in (
        (fewer_groups, list(range(heads.size))),
        (list(range(groups.size)), irregular),
        (fewer_groups, irregular),
    ):
        inside = [h for h in kept_heads if h // per_group in kept_groups]
        if inside:
            yield {groups.name: kept_groups, heads.name: inside}
