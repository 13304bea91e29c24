"""Plans: which units stay so that the predicted loss is smallest within the budgets.

The entry to the search. Checks what comes in, builds the space of a layout, runs a strategy and
writes the plan down. Whether budgets can be reached is known without scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..config.limits import Rules, format_amount, percent_up, say_lowest, warn_near_lowest
from ..errors import BudgetError, PlanError, ScoresError
from ..types import Axis, Budget, CostModel, Plan, Prunable, Scores, Units
from .binary import search_binary
from .choices import Choices
from .descent import search_coupled
from .lagrangian import search_lagrangian
from .layers import PATIENCE, layer_choices
from .space import (
    CoupledProblem,
    Problem,
    Solution,
    Space,
    build_space,
    make_coupled_problem,
    make_problem,
)


def _search_smallest_loss(problem: Problem, *, fill: bool = True) -> Solution | None:
    """Strategy `lagrangian`; it always keeps what fits."""
    if isinstance(problem, CoupledProblem):
        return search_coupled(problem)
    return search_lagrangian(problem)


STRATEGIES: dict[str, Callable[..., Solution | None]] = {
    "lagrangian": _search_smallest_loss,
    "binary": search_binary,
}


def find_plan(
    prunable: Prunable,
    scores: Scores,
    budgets: Sequence[Budget],
    *,
    search: str = "lagrangian",
    rules: Rules | None = None,
    choices: Choices | None = None,
    fill: bool = True,
) -> Plan:
    """Find the units to keep; see `find_plans`, of which this is the case of one plan."""
    return find_plans(
        prunable, scores, [budgets], search=search, rules=rules, choices=choices, fill=fill
    )[0]


def find_plans(
    prunable: Prunable,
    scores: Scores,
    budgets: Sequence[Sequence[Budget]],
    *,
    search: str = "lagrangian",
    rules: Rules | None = None,
    choices: Choices | None = None,
    fill: bool = True,
) -> list[Plan]:
    """Find the units to keep for many budgets; the options are evaluated once.

    Args:
        prunable: Axes, costs and layout of the model.
        scores: ``(size,)`` per axis; those of ``kv_groups`` are joint scores of whole groups. Axes
            that they do not know (`Scores.unscored`) stay whole.
        budgets: One sequence of simultaneous limits per plan.
        search: A name in `STRATEGIES`.
        rules: Limits per glob over module paths; later ones win.
        choices: Permitted kept counts per axis name, used for these axes in place of rules and
            default multiples; the full size is always permitted.
        fill: Whether `binary` keeps what still fits beside its threshold's own plan.

    Returns:
        One plan per entry of `budgets`, with the sum of pruned scores as its ``loss_increase``.

    Raises:
        BudgetError: No limit is given, a cost is unknown, or the limits cannot be reached.
        PlanError: The search or the layout is unknown, or does not fit the axes; or choices do not.
        ScoresError: Scores are missing, of a wrong shape, negative or not finite.
    """
    _check_search(search)
    values, exponent = _scaled(prunable.axes, scores)
    names = [_names(limits, prunable.costs) for limits in budgets]
    given: dict[str, Any] = {"rules": rules or {}, "whole": scores.unscored}
    plans = []

    @cache
    def space_of(key: tuple[str, ...], layers: frozenset[str]) -> Space:
        return build_space(prunable, values, key, choices=choices, layers=layers, **given)

    for key, limits in zip(names, budgets, strict=True):
        gone = layer_choices(prunable, values, key, **given)
        _check(space_of(key, gone[-1]).lowest(), limits, prunable)
        spaces = (space_of(key, layers) for layers in gone)
        space, picks, loss = _best(spaces, values, limits, search=search, fill=fill)
        plans.append(
            Plan(
                **_outcome(prunable, space.kept(picks)),
                layout=prunable.layout,
                budgets=tuple(limits),
                loss_increase=float(np.ldexp(loss, exponent)),
                search=search,
                score=scores.metadata.get("method", ""),
                steps=space.steps(picks),
            )
        )
    return plans


def lowest_costs(
    prunable: Prunable,
    *,
    rules: Rules | None = None,
    choices: Choices | None = None,
    budgets: Sequence[Budget] = (),
) -> dict[str, float]:
    """Lowest reachable value of each cost, without scores.

    Args:
        prunable: Axes, costs and layout of the model.
        rules: Limits per glob over module paths; later ones win.
        choices: Permitted kept counts per axis name; see `find_plans`.
        budgets: Limits whose costs set the default multiples, and which are answered for; without
            any, all costs.

    Raises:
        BudgetError: A cost is unknown.
        PlanError: The layout is unknown, or does not fit the axes; or choices do not.
    """
    names = _names(budgets, prunable.costs) if budgets else tuple(prunable.costs)
    of_layers = {axis.name: np.zeros(axis.size) for axis in prunable.axes if axis.is_layer}
    *_, layers = layer_choices(prunable, of_layers, names, rules=rules or {})
    return build_space(
        prunable, None, names, rules=rules or {}, choices=choices, layers=layers
    ).lowest()


def check_budgets(
    prunable: Prunable,
    budgets: Sequence[Budget],
    *,
    rules: Rules | None = None,
    choices: Choices | None = None,
    warns: bool = False,
) -> None:
    """Check before any scoring that every budget can be reached on its own.

    Args:
        prunable: Axes, costs and layout of the model.
        budgets: Simultaneous limits.
        rules: Limits per glob over module paths; later ones win.
        choices: Permitted kept counts per axis name; see `find_plans`.
        warns: Whether to warn of budgets that leave less than a tenth of what can be pruned.

    Raises:
        BudgetError: No limit is given, a cost is unknown, or a limit is below what can be reached.
        PlanError: The layout is unknown, or does not fit the axes; or choices do not.
    """
    _names(budgets, prunable.costs)
    lowest = lowest_costs(prunable, rules=rules, choices=choices, budgets=budgets)
    _check(lowest, budgets, prunable)
    if warns:
        warn_near_lowest(lowest, budgets)


def _check_search(search: str) -> None:
    if search not in STRATEGIES:
        raise PlanError(
            f"search {search!r}: unknown strategy, known are {', '.join(sorted(STRATEGIES))}; "
            "pass one of these."
        )


def _names(budgets: Sequence[Budget], costs: Mapping[str, CostModel]) -> tuple[str, ...]:
    """Names of the budgeted costs, in order."""
    if not budgets:
        raise BudgetError(
            "budgets: found none, needed at least one limit; give for example {'flops': '50%'}."
        )
    for budget in budgets:
        if budget.cost not in costs:
            raise BudgetError(
                f"budget {budget.cost}: unknown cost, known are {', '.join(sorted(costs))}; "
                "limit one of these."
            )
    return tuple(budget.cost for budget in budgets)


def _check(lowest: Mapping[str, float], budgets: Sequence[Budget], prunable: Prunable) -> None:
    layout = prunable.layout
    for budget in budgets:
        least = lowest[budget.cost]
        if budget.limit < least:
            more = ""
            if layout == "stock":
                more = "layout='per_layer' reaches further (--layout per_layer), or "
            cost = prunable.costs[budget.cost]
            held = say_lowest(cost, least, budget.total)
            raise BudgetError(
                f"budget {budget.cost}: {100 * budget.ratio:.4g}% ({format_amount(budget.limit)}) "
                f"cannot be reached in layout {layout!r}; the lowest is "
                f"{percent_up(least / budget.total)}% ({format_amount(least)} of "
                f"{format_amount(budget.total)}{f' {cost.unit}' if cost.unit else ''})"
                f".{f' {held}' if held else ''} Raise the budget, {more}allow more in "
                "rules (--exclude, --min-units)."
            )


def _outcome(prunable: Prunable, kept: Mapping[str, Units]) -> dict[str, Any]:
    """Fields of a plan that say what stays and what it costs."""
    counts = {name: len(units) for name, units in kept.items()}
    return {
        "kept": {axis.name: kept[axis.name] for axis in prunable.axes},
        "sizes": {axis.name: axis.size for axis in prunable.axes},
        "costs": {name: cost.of(counts) for name, cost in prunable.costs.items()},
    }


def check_scores(axes: Sequence[Axis], scores: Scores) -> None:
    """Check that scores hold a number of every unit.

    Raises:
        ScoresError: Scores are missing, of a wrong shape, negative or not finite.
    """
    for axis in axes:
        _checked(axis, scores)


def _scaled(axes: Sequence[Axis], scores: Scores) -> tuple[dict[str, np.ndarray], int]:
    """Checked scores divided by ``2**exponent``, about their largest; the division is exact."""
    values = {axis.name: _checked(axis, scores) for axis in axes}
    largest = max((array.max() for array in values.values() if array.size), default=0.0)
    exponent = int(np.frexp(largest)[1])
    return {name: np.ldexp(array, -exponent) for name, array in values.items()}, exponent


def _checked(axis: Axis, scores: Scores) -> np.ndarray:
    if axis.name not in scores.values:
        raise ScoresError(
            f"{axis.name}: the scores hold no such axis, only {len(scores.values)} others; "
            "score this model again."
        )
    values = np.asarray(scores.values[axis.name], dtype=np.float64)
    if values.shape != (axis.size,):
        raise ScoresError(
            f"{axis.name}: scores have the shape {values.shape}, needed ({axis.size},); "
            "score this model again."
        )
    for what, wrong in (("not finite", ~np.isfinite(values)), ("negative", values < 0)):
        if wrong.any():
            raise ScoresError(
                f"{axis.name}: {int(wrong.sum())} of {axis.size} scores are {what}, the first for "
                f"unit {int(wrong.argmax())}; score again, with data whose loss is finite."
            )
    return values


def _best(
    spaces: Iterable[Space],
    scores: Mapping[str, np.ndarray],
    budgets: Sequence[Budget],
    *,
    search: str,
    fill: bool,
) -> tuple[Space, list[int], float]:
    """The space whose plan has the smallest predicted loss, with that plan and its loss.

    Args:
        spaces: With more and more layers gone; the last one reaches every budget by itself.
        scores: ``(size,)`` per axis name.
        budgets: Simultaneous limits.
        search: A name in `STRATEGIES`.
        fill: As of `find_plans`.

    Raises:
        BudgetError: No space has a plan that meets all budgets.
    """
    best: tuple[Space, list[int], float] | None = None
    refusal: BudgetError | None = None
    worse = 0
    for space in spaces:
        lowest = space.lowest()
        if any(budget.limit < lowest[budget.cost] for budget in budgets):
            continue
        try:
            picks, loss = _solve(space, budgets, search=search, fill=fill)
        except BudgetError as error:
            refusal = error
            continue
        loss += sum(float(scores[axis.name][0]) for axis in space.gone if axis.is_layer)
        if best is None or loss < best[2]:
            best, worse = (space, picks, loss), 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    if best is None:
        raise refusal or BudgetError("budgets: no plan was found that meets all of them.")
    return best


def _solve(
    space: Space, budgets: Sequence[Budget], *, search: str, fill: bool
) -> tuple[list[int], float]:
    """Option per block of the plan, and its predicted loss as the space scales it."""
    if space.coupling is None:
        problem = make_problem(space, budgets)
    else:
        problem = make_coupled_problem(space, space.coupling, budgets)
    picks: np.ndarray = np.zeros(len(problem.score), dtype=np.int64)
    # Relative, because a cost that is not an integer sums up differently in another order.
    if not np.all(problem.costs_of(picks) <= problem.room * (1 + 1e-12)):
        solution = STRATEGIES[search](problem, fill=fill)
        if solution is None:
            asked = " and ".join(f"{budget.cost}={100 * budget.ratio:.4g}%" for budget in budgets)
            raise BudgetError(
                f"budgets {asked}: each can be reached, but no plan was found that meets all of "
                f"them (search {search!r}); raise one of them."
            )
        picks = solution.picks
    return picks.tolist(), problem.score_of(picks)
