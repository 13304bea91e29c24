"""The inspect command: what can be pruned, what is refused and why, and how far budgets reach."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .._redaction import without_secrets
from ..config.limits import Rules, check_rules, format_amount, parse_rules, rule_for, say_lowest
from ..config.recipe import Recipe
from ..config.recipe_files import build_recipe
from ..errors import GradNASError, StructureError
from ..jobs.early import check_inspected, model_folder
from ..jobs.idle import Known, check_idle
from ..report.layers import merge_layers
from ..types import USUAL, Axis, Budget, Prunable
from .show import Screen, quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.loading import Source

DONE, NOTHING, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
LAYOUTS = ("per_layer", "stock")
_REFUSALS_SHOWN = 40
_MISSING_SHOWN = 4


@dataclass(frozen=True)
class Inspection:
    """Everything that is known of a model before anything is scored.

    Attributes:
        source: Config, class and task.
        prunable: Its axes, the layout that pruning would choose, and the costs in it.
        rules: What may be pruned, and how far.
        lowest: Lowest reachable value per cost, per layout; without ``stock`` where that class can
            express nothing.
        flops_length: Tokens that FLOPs are counted for; None without tokens.
        notes: What a user should know of the input and the weights.
    """

    source: Source
    prunable: Prunable
    rules: Rules
    lowest: Mapping[str, Mapping[str, float]]
    flops_length: int | None
    notes: tuple[str, ...] = ()

    def unit_cost(self, axis: Axis, cost: str) -> float:
        """What the whole model saves if one unit of `axis` goes, and nothing else.

        What is nested in it is not counted, but for the width that it keeps in the units that stay.
        """
        sizes = {other.name: other.size for other in self.prunable.structure.axes}
        # A stack's first head also makes tables of every layer's own: the cost of the cut, not its.
        model = replace(self.prunable.costs[cost], shared=())
        inside = {
            name: rate.amount / sizes[rate.of] * sizes[name]
            for name, rate in model.rates.items()
            if rate.of == axis.name
        }
        fewer = {**sizes, axis.name: axis.size - 1}
        gained = sum(value * axis.size / max(axis.size - 1, 1) - value for value in inside.values())
        return model.of(sizes) - model.of(fewer) + gained

    def is_kept(self, axis: Axis) -> bool:
        """Whether rules keep an axis as it is."""
        return rule_for(axis, self.rules) is None


def inspect_from_options(
    flags: Mapping[str, Any],
    *,
    no_weights: bool = False,
    as_json: bool = False,
    quiet: bool = False,
) -> int:
    """Run the command with the options that were given; errors become a message and a code.

    Args:
        flags: Options by field name of `Recipe`.
        no_weights: Load none: look at the config alone.
        as_json: Write one JSON object to standard output, and nothing else.
        quiet: No warnings and no progress.

    Returns:
        0 done, 1 nothing in the model can be pruned, 2 bad input, 130 interrupted.
    """
    screen = Screen(results=not as_json, notes=not quiet)
    try:
        recipe = build_recipe(flags)
        check_inspected(recipe, given=frozenset(flags), needs_weights=not no_weights)
        with quiet_libraries(screen):
            if no_weights:
                from .unloaded import inspect_config as inspect
            else:
                inspect = inspect_recipe
            with screen.progress("Looking at the model"):
                found = inspect(recipe, given=frozenset(flags))
    except KeyboardInterrupt:
        screen.error("interrupted; nothing was changed.")
        return INTERRUPTED
    except GradNASError as error:
        screen.error(str(error))
        return NOTHING if isinstance(error, NothingError) else BAD_INPUT
    for note in found.notes:
        screen.warn(note)
    if as_json:
        sys.stdout.write(json.dumps(to_dict(found, recipe), indent=1) + "\n")
    else:
        show(screen, found, recipe)
    return DONE


class NothingError(StructureError):
    """Nothing in the model can be pruned."""


# --- finding --------------------------------------------------------------------------------------


def inspect_recipe(recipe: Recipe, *, given: frozenset[str] = frozenset()) -> Inspection:
    """Load the model of a recipe and look at it.

    Args:
        recipe: Its model, layout, rules and, if it names one, data.
        given: Names of the options that were given.

    Raises:
        RecipeError: The model or an option cannot be used.
        DataError: The data does not fit the model.
        StructureError: Nothing can be pruned, or a glob matches nothing.
        PlanError: Layout ``stock`` was asked for, and the class can express nothing.
    """
    from ..data.loading import load_model

    folder = model_folder(recipe.model)
    if recipe.dataset is not None:
        source, model, missing, batch, length = _with_data(recipe, folder, given)
    else:
        from ..data.random_batch import random_batch

        source, max_length = opened(recipe, given)
        model, missing = load_model(recipe, source, folder)
        batch = random_batch(source, model, max_length=max_length, seed=recipe.seed)
        length = recipe.flops_length or max_length
    notes = []
    if missing:
        shown = ", ".join(missing[:_MISSING_SHOWN]) + (", …" if missing[_MISSING_SHOWN:] else "")
        notes.append(f"the checkpoint has no weights for {shown}; they are random")
    return inspect_model(
        model,
        batch,
        source,
        layout=recipe.layout,
        rules=parse_rules(recipe.rules()),
        flops_length=length if has_tokens(source) else None,
        layers="layers" in recipe.axes,
        notes=tuple(notes),
    )


def opened(recipe: Recipe, given: frozenset[str]) -> tuple[Source, int]:
    """The source of a recipe without data, and its tokens per example."""
    from ..data.loading import open_source, resolve_max_length

    source = open_source(recipe, model_folder(recipe.model), needs_processor=False)
    check_idle(recipe, given, Known(source.task.head, source.input))
    return source, resolve_max_length(recipe, source)


def has_tokens(source: Source) -> bool:
    """Whether FLOPs depend on a number of tokens."""
    return source.input == "text" or bool(source.config.is_encoder_decoder)


def _with_data(
    recipe: Recipe, folder: str, given: frozenset[str]
) -> tuple[Source, PreTrainedModel, list[str], Mapping[str, Any], int | None]:
    """The same with the first examples of a data set in place of random input."""
    from ..data.examples import make_loader
    from ..data.loading import load_model
    from ..data.random_batch import EXAMPLES
    from ..jobs.preparation import prepare

    few = recipe.model_copy(update={"num_examples": EXAMPLES, "eval": False})
    job = prepare(few, folder=folder, given=given)
    model, missing = load_model(job.recipe, job.source, folder)
    loader = make_loader(job.calibration, job.source, model, batch_size=EXAMPLES)
    return job.source, model, missing, next(iter(loader)), job.recipe.flops_length


def inspect_model(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    source: Source,
    *,
    layout: str = "auto",
    rules: Rules | None = None,
    flops_length: int | None = None,
    layers: bool = False,
    notes: tuple[str, ...] = (),
) -> Inspection:
    """Find and prove the axes, decide the layout, and count costs in all layouts.

    The same steps as `GradNASPruner.discover`, which keeps one layout only.

    Raises:
        StructureError: Nothing can be pruned, or a glob matches nothing.
        PlanError: Layout ``stock`` was asked for, and the class can express nothing.
    """
    from ..batches.batch import to_device
    from ..checkpoint.prunable import find_prunable
    from ..running.kernels import warn_of_kernels

    rules = rules or {}
    warn_of_kernels(model)
    try:
        found = find_prunable(
            model,
            to_device(batch, model),
            layout=layout,
            rules=rules,
            flops_length=flops_length,
            layers=layers,
        )
    except StructureError as error:
        raise NothingError(str(error)) from error
    return inspected(model, found, source, rules, flops_length, notes)


def inspected(
    model: PreTrainedModel,
    found: Prunable,
    source: Source,
    rules: Rules,
    flops_length: int | None,
    notes: tuple[str, ...] = (),
) -> Inspection:
    """What was found, with the lowest budgets in all layouts."""
    from ..costs.counting import counted

    check_rules(rules, found.structure)
    others = {
        layout: counted(model, found.structure, found.sample, space=found.space, layout=layout)
        for layout in LAYOUTS
        if layout != found.layout and (layout == "per_layer" or found.space.groups)
    }
    layouts = {**others, found.layout: found}
    lowest = {name: _lowest(layouts[name], rules) for name in LAYOUTS if name in layouts}
    return Inspection(source, found, rules, lowest, flops_length, notes)


def _lowest(prunable: Prunable, rules: Rules) -> dict[str, float]:
    """Lowest value of each cost, as if it were the only one that is limited."""
    from ..search.solver import lowest_costs

    lowest: dict[str, float] = {}
    for name in prunable.costs:
        only = Budget(cost=name, limit=0.0, total=1.0)
        lowest |= lowest_costs(prunable, rules=rules, budgets=[only])
    return lowest


# --- saying ---------------------------------------------------------------------------------------


def show(screen: Screen, found: Inspection, recipe: Recipe) -> None:
    """Tables for people."""
    source, prunable, length = found.source, found.prunable, found.flops_length
    screen.line(f"{source.cls.__name__} ({recipe.model}), input: {_input(recipe, found)}.")
    rows: list[tuple[str, ...]] = []
    for axis in prunable.structure.axes:
        units = [format_amount(found.unit_cost(axis, name)) for name in USUAL]
        state = "excluded" if found.is_kept(axis) else ""
        kind = str(axis.kind)
        rows.append((axis.module, kind, str(axis.size), str(axis.width), *units, state))
    headers = ("module", "axis", "units", "width", *USUAL, "")
    title = "Axes, all proved (width and costs of one unit)"
    screen.table(title, headers, merge_layers(rows), right=3 + len(USUAL))
    refusals = prunable.structure.refusals
    if refusals:
        rows = merge_layers([(r.module, str(r.kind), r.reason) for r in refusals])
        told, hidden = rows[:_REFUSALS_SHOWN], len(rows[_REFUSALS_SHOWN:])
        told += [(f"and {hidden} more (all with --json)", "", "")] if hidden else []
        screen.table("Seen but not pruned", ("module", "kind", "reason"), told)
    whole = Counter(prunable.structure.unpruned.values())
    if whole:
        counts = [(why, str(number)) for why, number in whole.most_common(_REFUSALS_SHOWN)]
        screen.table("Not prunable by design", ("why", "tensors"), counts, right=1)
    screen.line(prunable.layout_reason or f"Layout {prunable.layout}, as asked.")
    if "stock" not in found.lowest:
        screen.line(f"Layout stock is not possible: {_first_reason(found)}.")
    screen.line()
    table = []
    for name, total in prunable.totals.items():
        reached = (found.lowest.get(layout) for layout in LAYOUTS)
        cells = (_amount(lowest[name], total) if lowest else "-" for lowest in reached)
        table.append((name, format_amount(total), *cells))
    names = ("cost", "now", *(f"lowest {layout}" for layout in LAYOUTS))
    screen.table("Costs and lowest budgets", names, table, right=1 + len(LAYOUTS))
    for name, cost in prunable.costs.items():
        held = say_lowest(cost, found.lowest[prunable.layout][name], prunable.totals[name])
        if held:
            what = f"What holds the lowest {name} ({cost.unit}) in {prunable.layout}"
            screen.line(f"{what}: {held[0].lower()}{held[1:]}")
    if length:
        screen.line(f"FLOPs are counted for {length} tokens (--flops-length).")


def to_dict(found: Inspection, recipe: Recipe) -> dict[str, Any]:
    """The same, complete, for machines; ready for JSON."""
    prunable = found.prunable
    axes = [
        {
            "name": axis.name,
            "module": axis.module,
            "kind": str(axis.kind),
            "units": axis.size,
            "width": axis.width,
            "minimum": axis.minimum,
            "parent": axis.parent,
            "proved": True,
            "kept_by_rules": found.is_kept(axis),
            "cost_per_unit": {name: found.unit_cost(axis, name) for name in prunable.costs},
            "not_in_stock": prunable.space.refused.get(axis.name),
        }
        for axis in prunable.structure.axes
    ]
    refusals = [
        {"module": r.module, "kind": str(r.kind), "proved": False, "reason": r.reason}
        for r in prunable.structure.refusals
    ]
    lowest = {
        layout: {
            name: {"amount": amount, "ratio": amount / prunable.totals[name]}
            for name, amount in costs.items()
        }
        for layout, costs in found.lowest.items()
    }
    return {
        "model": without_secrets(recipe.model),
        "class": found.source.cls.__name__,
        "input": _input(recipe, found),
        "flops_length": found.flops_length,
        "layout": {
            "chosen": prunable.layout,
            "reason": prunable.layout_reason,
            "stock_possible": "stock" in found.lowest,
        },
        "totals": dict(prunable.totals),
        "units": {name: cost.unit for name, cost in prunable.costs.items()},
        "not_prunable_by_design": dict(prunable.structure.unpruned),
        "cannot_be_pruned": {name: dict(cost.parts) for name, cost in prunable.costs.items()},
        "lowest": {layout: lowest.get(layout) for layout in LAYOUTS},
        "axes": axes,
        "refused": refusals,
        "notes": list(found.notes),
    }


def _input(recipe: Recipe, found: Inspection) -> str:
    return without_secrets(recipe.dataset or "") or f"random {found.source.input}"


def _amount(lowest: float, total: float) -> str:
    percent = math.ceil(lowest / total * 1e4) / 1e2  # rounded up, so that asking for it succeeds
    return f"{format_amount(lowest)} ({percent:.2f}%)"


def _first_reason(found: Inspection) -> str:
    return next(iter(found.prunable.space.refused.values()), "no axis is left to prune")
