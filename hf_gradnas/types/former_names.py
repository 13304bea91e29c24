"""Axes of files of format 1 (version 0.1), found again under the names that they have now.

Format 1 named neurons after the module around their out-projection and the weights that had run
shortly before it, whatever these were; after the out-projection itself where a module had several
such pairs, also refused ones; and after the layer that makes them, as channels, outside of numbered
layers. Several present axes may fit such a name: then nobody guesses. Knows names and sizes only.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

from ..errors import GradNASError, GradNASWarning, PlanError, ScoresError
from .kinds import Kind
from .plans import UNSCORED, Plan, Scores
from .structure import Axis

Value = TypeVar("Value")

NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
"""A path inside of numbered layers; only there format 1 knew neurons."""
RENAMED_IN = 2
"""The first format of plans and scores in which axes have their present names."""


def present_plan(plan: Plan, axes: Iterable[Axis]) -> Plan:
    """A plan of format 1 by the present names of axes; those that format 1 did not know stay whole.

    Raises:
        PlanError: It prunes an axis that is none any more, or several axes fit one name.
    """
    axes = tuple(axes)
    names = _present_names(plan.sizes, axes, PlanError)
    for name, units in plan.kept.items():
        if name not in names and len(units) < plan.sizes[name]:
            raise PlanError(
                f"{name}: the plan keeps {len(units)} of {plan.sizes[name]} units, but no axis of "
                "this model is what version 0.1 found there; score the model and make the plan "
                "again."
            )
    kept = _renamed(plan.kept, names)
    return replace(
        plan,
        kept={axis.name: kept.get(axis.name, tuple(range(axis.size))) for axis in axes},
        sizes={axis.name: axis.size for axis in axes},
        format_version=RENAMED_IN,
    )


def present_scores(scores: Scores, axes: Iterable[Axis]) -> Scores:
    """Scores of format 1 by the present names of axes; those of what is no axis now are dropped.

    Axes that format 1 did not know have no scores (`Scores.unscored`), which is a warning.

    Raises:
        ScoresError: Several axes fit one name.
    """
    axes = tuple(axes)
    sizes = {name: _size(values) for name, values in scores.values.items()}
    names = _present_names(sizes, axes, ScoresError)
    found = set(names.values())
    new = {axis.name: np.zeros(axis.size) for axis in axes if found and axis.name not in found}
    if new:
        warnings.warn(
            f"Scores: version 0.1 did not find {next(iter(new))} ({len(new)} of the {len(axes)} "
            "axes of this model), so that they stay whole; score the model again to prune them.",
            GradNASWarning,
            stacklevel=2,
        )
    return replace(
        scores,
        values=_renamed(scores.values, names) | new,
        also={method: _renamed(values, names) | new for method, values in scores.also.items()},
        metadata={**scores.metadata, UNSCORED: ",".join(new)} if new else scores.metadata,
        format_version=RENAMED_IN,
    )


def _size(values: np.ndarray) -> int:
    """Number of units; -1 for what is no array, which the check of values refuses."""
    return getattr(values, "size", -1)


def _renamed(values: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    return {names[name]: value for name, value in values.items() if name in names}


def _present_names(
    sizes: Mapping[str, int], axes: tuple[Axis, ...], error: type[GradNASError]
) -> dict[str, str]:
    """Present name per name of format 1, as far as there is one; present names win.

    Raises:
        GradNASError: Of the given class, where more than one axis fits a name, or the reverse.
    """
    found = {axis.name: axis.name for axis in axes if sizes.get(axis.name) == axis.size}
    free = [(axis, former_names(axis)) for axis in axes if axis.name not in found]
    owners: dict[str, str] = {}
    for name, size in sizes.items():
        if name in found:
            continue
        fitting = [axis.name for axis, former in free if axis.size == size and name in former]
        if len(fitting) > 1:
            raise error(
                f"{name}: {fitting[0]} and {fitting[1]} both have {size} units and may have had "
                "this name in version 0.1; score the model and make the plan again."
            )
        for present in fitting:
            if present in owners:
                raise error(
                    f"{present}: {owners[present]} and {name} both have {size} units and may be "
                    "its name in version 0.1; score the model and make the plan again."
                )
            owners[present] = name
    return found | {name: present for present, name in owners.items()}


def former_names(axis: Axis) -> frozenset[str]:
    """All names that format 1 can have given to an axis."""
    readers = [part.module for part in axis.readers]
    made = {f"{part.module}:{Kind.CHANNELS}" for part in axis.makers}
    if axis.kind is Kind.NEURONS:
        around = {path for module in readers for path in _numbered(module)}
        return frozenset(made | {f"{path}:{Kind.NEURONS}" for path in around})
    if axis.kind is Kind.CHANNELS:
        return frozenset(made | {f"{path}:{Kind.NEURONS}" for path in readers})
    return frozenset(f"{path}:{axis.kind}" for path in (axis.module, axis.taps[0].module))


def _numbered(module: str) -> list[str]:
    """A module and all around it that are in a numbered layer."""
    around = accumulate(module.split("."), lambda path, part: f"{path}.{part}")
    return [path for path in around if NUMBERED.search(path)]
