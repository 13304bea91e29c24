"""The plan command: from a file of scores to a plan or several, without the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.limits import format_amount, format_share
from ..config.plans import Plans
from ..config.recipe import Recipe
from ..config.recipe_files import build_options, build_recipe
from ..errors import GradNASError, PlanError, RecipeError, ScoresError
from ..types import LATENCY, USUAL, Kind
from . import BAD_INPUT, DONE, INTERRUPTED
from .show import Screen, shown_warnings

if TYPE_CHECKING:
    from ..types import LatencyTable, Plan, Prunable, Scores

_LIMIT = re.compile(r"[\w.+%-]+", re.ASCII)


def plan_from_options(file: str, flags: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    """Run the command with the options that were given; errors become a message and a code.

    Args:
        file: Of the scores.
        flags: Options by field name of `Recipe`.
        own: Options by field name of `Plans`.

    Returns:
        0 done, 2 bad input, 130 interrupted.
    """
    screen = Screen()
    try:
        # The field is needed, and no step reads it here.
        recipe = build_recipe({"model": "none", **flags})
        budgets = _budgets(recipe, own, is_one="target" in flags)
        with shown_warnings(screen):
            _plan(screen, file, recipe, budgets, score=flags.get("score"))
    except KeyboardInterrupt:
        screen.error("interrupted; plans that were written are whole.")
        return INTERRUPTED
    except GradNASError as error:
        screen.error(str(error))
        return BAD_INPUT
    return DONE


def _budgets(
    recipe: Recipe, own: Mapping[str, Any], *, is_one: bool
) -> dict[str, Mapping[str, Any]]:
    """Budgets by name of the file within the output; "" where the output is the file."""
    several = build_options(Plans, own).budgets()
    if not several:
        return {"": recipe.target}
    if is_one:
        raise RecipeError(
            "--targets: tries budgets one by one, and --target is one budget; omit one of the two."
        )
    for budget in several.values():
        for cost, limit in budget.items():
            if not _LIMIT.fullmatch(cost + limit):
                raise RecipeError(f"--targets {cost}={limit}: is no limit; write flops=80%,60%.")
    return dict(several)


def _plan(
    screen: Screen,
    file: str,
    recipe: Recipe,
    budgets: Mapping[str, Mapping[str, Any]],
    *,
    score: str | None,
) -> None:
    """Read the scores, make the plans, show and write them."""
    from ..planning import make_plans

    scores = _read(file)
    rules, latency = _rules(recipe, scores), _latency(recipe, budgets)
    more: dict[str, Any] = {"score": score, "search": recipe.search, "layout": recipe.layout}
    with screen.progress("Planning"):
        plans = make_plans(scores, list(budgets.values()), rules=rules, latency=latency, **more)
    output = _output(file, recipe, is_folder="" not in budgets)
    basis = plans[0].basis
    if basis is None:  # of no plan that was made here
        raise PlanError("Plan: has no basis; report it.")
    (prunable,) = basis.prunables.values()
    screen.structure(prunable.structure, prunable.layout, prunable.layout_reason)
    if "" in budgets:
        screen.plan(plans[0], prunable.structure)
        screen.costs(plans[0], prunable.totals, prunable.costs)
        plans[0].save(output)
    else:
        for name, plan in zip(budgets, plans, strict=True):
            plan.save(output / name)
        _show(screen, plans, list(budgets), prunable)
    screen.line(f"Saved: {output}")


def _latency(recipe: Recipe, budgets: Mapping[str, Mapping[str, Any]]) -> LatencyTable | None:
    """The table that is given.

    Raises:
        BudgetError: It cannot be read.
        RecipeError: No budget is in milliseconds.
    """
    from ..types import LatencyTable

    if recipe.latency_table is None:
        return None
    if not any(LATENCY in budget for budget in budgets.values()):
        raise RecipeError(
            f"--latency-table {recipe.latency_table}: has no effect here, as no budget is in "
            "milliseconds; give --target latency_ms=…, or omit it."
        )
    return LatencyTable.load(Path(recipe.latency_table).expanduser())


def _read(file: str) -> Scores:
    """The scores in a file.

    Raises:
        ScoresError: It is not there, or holds none.
    """
    from ..types import Scores

    path = Path(file).expanduser()
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "there is no such file"
        raise ScoresError(f"{file}: {found}; give a file of hf-gradnas score or prune.")
    return Scores.load(path)


def _rules(recipe: Recipe, scores: Scores) -> dict[str, dict[str, int] | None]:
    """Rules of the options; whole layers stay unless they are asked for, as for prune.

    Raises:
        PlanError: They are asked for, and the scores know none.
    """
    rules, asked = recipe.rules(), str(Kind.LAYERS) in recipe.axes
    basis = scores.basis
    knows = basis is not None and any(
        axis.is_layer for prunable in basis.prunables.values() for axis in prunable.axes
    )
    if asked and basis is not None and not knows:
        raise PlanError(
            "--axes layers: the scores know no whole layers; score again with --axes layers."
        )
    return {f"*:{Kind.LAYERS}": None, **rules} if knows and not asked else rules


def _output(file: str, recipe: Recipe, *, is_folder: bool) -> Path:
    """Where the plan goes, or the folder of all of them."""
    stem = file.removesuffix(".safetensors").removesuffix(".scores")
    found = Path(recipe.output or stem + (".plans" if is_folder else ".plan.json")).expanduser()
    if found.is_dir() and not is_folder:
        raise RecipeError(f"--output {found}: is a folder, needed a file; give another name.")
    if found.is_file() and is_folder:
        raise RecipeError(f"--output {found}: is a file, needed a folder for several plans.")
    return found


def _show(screen: Screen, plans: list[Plan], names: list[str], prunable: Prunable) -> None:
    """A line per plan: budget, every cost, predicted loss, file."""
    rows = []
    asked = {budget.cost for plan in plans for budget in plan.budgets}
    costs = [cost for cost in prunable.totals if cost in asked or cost in USUAL]
    for plan, name in zip(plans, names, strict=True):
        limits = ", ".join(
            f"{b.cost} {format_amount(b.limit)} ({b.ratio:.1%})" for b in plan.budgets
        )
        shares = [
            format_share(plan.costs[cost] / prunable.totals[cost], digits=2) for cost in costs
        ]
        rows.append((limits, name, *shares, f"{plan.loss_increase:.4g}"))
    unit = plans[0].loss_unit
    lost = f"loss increase, {unit}" if unit else "sum of pruned scores"
    headers = ("budget", "file", *(f"{cost} kept" for cost in costs), lost)
    screen.table(f"Plans ({prunable.layout})", headers, rows, right=len(costs) + 1)
