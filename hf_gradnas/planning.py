"""Plans from scores alone: what `GradNASPruner.plan` finds, where no model is loaded.

Scores say what their plans are made from (`types.Basis`). Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .config.limits import check_rules, parse_budgets, parse_rules, rule_for
from .errors import BudgetError, PlanError, ScoresError, check_choice
from .search.prediction import with_prediction
from .search.solver import STRATEGIES, check_budgets, check_scores, find_plans
from .stock.layouts import LAYOUTS, layout_for
from .types import Basis, Budget, LatencyTable, Plan, Prunable, Scores

Limits = Mapping[str, Any]
"""A budget such as ``{"flops": "60%"}``."""


def make_plan(scores: Scores, budget: Limits, **options: Any) -> Plan:
    """Find the best units to keep under one budget; see `make_plans`, whose options it takes."""
    return make_plans(scores, [budget], **options)[0]


def make_plans(
    scores: Scores,
    budgets: Sequence[Limits],
    *,
    score: str | None = None,
    search: str = "lagrangian",
    layout: str = "auto",
    rules: Mapping[str, Any] | None = None,
    latency: LatencyTable | None = None,
) -> list[Plan]:
    """Find the best units to keep under each of several budgets.

    Equal to the plans of a `GradNASPruner` with these options and scores, to the last bit.

    Args:
        scores: Complete ones that have a basis, of `Scores.load`.
        budgets: As of `GradNASPruner.plan`.
        score: One of the methods that the scores hold; None: the first.
        search: ``"lagrangian"`` or ``"binary"``.
        layout: ``"auto"``, ``"stock"`` or ``"per_layer"``.
        rules: As of `GradNASPruner`.
        latency: For budgets of ``latency_ms``, of any machine.

    Returns:
        One plan per budget, each with what it was made from as its `Plan.basis`.

    Raises:
        BudgetError: A budget cannot be read or reached; then there is no plan at all.
        PlanError: An unknown choice, a rule that cannot be read, or a layout that cannot be had.
        ScoresError: Scores that are unfinished, of another method, or without a basis.
        StructureError: A rule's glob matches no axis.
    """
    check_choice("search", search, STRATEGIES)
    limits = parse_rules(rules)
    scores = scores if score is None else scores.of(score)
    basis = basis_of(scores)
    prunable = prunable_for(basis, layout=layout, rules=limits)
    prunable = prunable if latency is None else latency.priced(prunable)
    check_scores(prunable.axes, scores)
    check_rules(limits, prunable.structure)
    asked = [parse_budgets(budget, prunable.totals, prunable.absent) for budget in budgets]
    for each in asked:
        check_budgets(prunable, each, rules=limits, warns=True)
    own = Basis.of([prunable], basis.checkpoint)
    plans = plans_of(prunable, scores, asked, search=search, rules=limits)
    return [replace(plan, basis=own) for plan in plans]


def plans_of(
    prunable: Prunable,
    scores: Scores,
    budgets: Sequence[Sequence[Budget]],
    *,
    search: str,
    rules: Mapping[str, Any],
) -> list[Plan]:
    """The plans of one method's scores, their predictions in nats where the scores say so much."""
    plans = find_plans(prunable, scores, budgets, search=search, rules=rules)
    return [with_prediction(plan, scores) for plan in plans]


def stock_instead(
    prunable: Prunable, scores: Scores, plan: Plan, *, search: str, rules: Mapping[str, Any]
) -> dict[str, float]:
    """What layout ``stock`` would take, at the budgets of a plan for layout ``per_layer``.

    Returns:
        The kept share of each budgeted cost, and under ``scores`` the sum of pruned scores as a
        multiple of the plan's; ``unreachable`` alone where stock cannot reach the budgets.
        Empty where the class can express nothing, and for costs that depend on the layout.
    """
    names = {budget.cost for budget in plan.budgets}
    if plan.layout == "stock" or not prunable.space.groups or names & _OF_LAYOUT:
        return {}
    stock = replace(prunable, layout="stock")
    scores = scores.of(plan.score) if plan.score in scores.also else scores
    try:
        (other,) = plans_of(stock, scores, [plan.budgets], search=search, rules=rules)
    except BudgetError:
        return {"unreachable": 1.0}
    shares = {name: other.costs[name] / prunable.totals[name] for name in sorted(names)}
    return {**shares, "scores": other.loss_increase / (plan.loss_increase or math.inf)}


_OF_LAYOUT = frozenset(["kv_cache", "latency_ms"])


def basis_of(scores: Scores) -> Basis:
    """What plans are made from beside complete scores.

    Raises:
        ScoresError: They are not complete, or do not say.
    """
    if scores.metadata.get("complete") != "true":
        raise ScoresError(
            f"Scores: scoring broke off after {scores.metadata.get('examples', 'no')} examples; "
            "run it again with the same file, and it goes on from there."
        )
    if scores.basis is None:
        raise ScoresError(
            "Scores: they do not say what can be pruned, as those of 0.1 and of training; score "
            "again with hf-gradnas score, or plan with the model (GradNASPruner.use_scores)."
        )
    return scores.basis


def prunable_for(basis: Basis, *, layout: str, rules: Mapping[str, Any]) -> Prunable:
    """What can be pruned in the layout that is asked for, or that ``auto`` decides for.

    Raises:
        PlanError: An unknown layout, one that the class cannot express, or one that was not
            examined.
    """
    check_choice("layout", layout, LAYOUTS)
    first = basis.prunables.get("per_layer") or next(iter(basis.prunables.values()))
    found = basis.prunables.get(layout, first)
    allowed = [axis for axis in found.axes if rule_for(axis, rules) is not None]
    chosen, reason = layout_for(found.space, allowed, requested=layout)
    if chosen not in basis.prunables:
        raise PlanError(
            f"layout {chosen!r}: the scores were made for {', '.join(basis.prunables)} alone; give "
            f"--layout {next(iter(basis.prunables))}, or score again with hf-gradnas score, which "
            "examines both."
        )
    return replace(basis.prunables[chosen], layout_reason=reason)
