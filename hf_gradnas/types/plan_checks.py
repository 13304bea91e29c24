"""Whether the values of a plan are what their types say, wherever the plan came from.

Knows names and numbers only; whether a plan fits a model is the matter of `surgery`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from .costs import Budget

if TYPE_CHECKING:
    from .plans import Plan

LAYOUTS = ("stock", "per_layer")
_SHOWN = 8
_ROUNDING = 1e-9


def check_values(plan: Plan) -> None:
    """Check that every value of a plan is of its type and makes sense by itself.

    Raises:
        PlanError: One does not; the message names it.
    """
    _check_units(plan.kept, plan.sizes)
    if plan.layout not in LAYOUTS:
        raise PlanError(
            f"layout {plan.layout!r} of the plan: known are {LAYOUTS}; make the plan again."
        )
    names: dict[str, Any] = {"search": plan.search, "score": plan.score}
    for what, name in names.items():
        if not isinstance(name, str):
            raise _wrong(what, name, "a name")
    if not _is_finite(plan.loss_increase):
        raise _wrong("loss_increase", plan.loss_increase, "a finite number")
    _check_amounts("costs", plan.costs)
    _check_amounts("steps", plan.steps)
    _check_amounts("tried", plan.tried)
    _check_budgets(plan.budgets)


def _check_units(kept: Any, sizes: Any) -> None:
    _check_mapping("sizes", sizes)
    for name, size in sizes.items():
        if not is_integer(size) or size < 0:
            raise _wrong(f"sizes[{name!r}]", size, "a whole number of units, 0 or more")
    _check_mapping("kept", kept)
    for name, units in kept.items():
        if name not in sizes:
            raise _wrong(f"kept[{name!r}]", "an axis without a size", "one of those in sizes")
        check_indices(name, units, sizes[name])


def _check_amounts(what: str, values: Any) -> None:
    _check_mapping(what, values)
    for name, value in values.items():
        if not _is_finite(value) or value < 0:
            raise _wrong(f"{what}[{name!r}]", value, "a finite number, 0 or more")


def check_indices(name: str, units: Any, size: int) -> None:
    """Check that kept indices are sorted, distinct integers below `size`.

    Raises:
        PlanError: They are not.
    """
    is_list = isinstance(units, Sequence) and not isinstance(units, str | bytes)
    fits = is_list and all(type(unit) is int or is_integer(unit) for unit in units)
    if fits and units:
        fits = list(units) == sorted(set(units)) and 0 <= units[0] <= units[-1] < size
    if not fits:
        shown = f"{list(units)[:_SHOWN]}" if is_list else f"{units!r:.80}"
        raise PlanError(
            f"{name}: kept indices must be integers that are sorted, distinct and below {size}, "
            f"found {shown}; make the plan again."
        )


def _check_budgets(budgets: Any) -> None:
    needed = "costs, each with a limit above 0 and at most its total"
    if not isinstance(budgets, list | tuple):
        raise _wrong("budgets", budgets, needed)
    for budget in budgets:
        if not isinstance(budget, Budget) or not isinstance(budget.cost, str):
            raise _wrong("budgets", budget, needed)
        is_number = _is_finite(budget.limit) and _is_finite(budget.total)
        if not is_number or not 0 < budget.limit <= budget.total * (1 + _ROUNDING):
            raise _wrong(f"budgets[{budget.cost!r}]", budget, needed)


def _check_mapping(what: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise _wrong(what, values, "a mapping from names")
    for name in values:
        if not isinstance(name, str):
            raise _wrong(what, name, "a text as every name")


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number of an integer type, NumPy's too; True and 1.0 are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer above every float
        return False


def _wrong(what: str, found: object, needed: str) -> PlanError:
    shown = f"{found!r:.80}"
    return PlanError(f"Plan: {what} holds {shown}, needed {needed}; make the plan again.")
