"""Measure a frontier: plans for many budgets, scores and calibration subsets, tried with masks.

Knows the order of the steps and what is done once; the steps are the pruner's. Nothing is cut. What
is measured on reaches neither scores nor plans nor repairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batches.longest import Batch
from ..config.defaults import DEFAULT_SCORE
from ..errors import BudgetError, PlanError
from ..running.processes import Processes
from ..scores import METHODS, collect_scores
from ..scores.methods import GRADIENT_METHODS
from ..types import Budget, Frontier, Point, Scores
from .yardstick import (
    Bar,
    Evaluate,
    Measured,
    Progress,
    Pruner,
    Run,
    Subset,
    Yardstick,
    make_subset,
    make_yardstick,
    measure_plans,
    points_of,
)

if TYPE_CHECKING:
    from ..repair.repairs import Repair

Limits = str | float | Sequence[str | float]


def measure_frontier(  # noqa: PLR0913 - one call says all of a sweep
    pruner: Pruner,
    loaders: Mapping[int, Iterable[Batch]],
    *,
    budgets: Mapping[str, Limits],
    batches: Iterable[Batch],
    evaluate: Evaluate | None = None,
    score: str | Sequence[str] = DEFAULT_SCORE,
    repair: Callable[..., Repair | None] | None = None,
    labels: str = "data",
    num_examples: int | None = None,
    file: str | Path | None = None,
    document: Mapping[str, Any] | None = None,
    progress: Bar | None = None,
    processes: Processes | None = None,
    checkpointing: bool | None = None,
) -> Frontier:
    """Score each calibration subset once, plan every budget by every score, and measure the plans.

    A plan is measured on `batches` while its pruned units are multiplied by 0, so the model is as
    it was at the end. One forward per batch gives the whole model's predictions for all plans of a
    score; nothing of them is kept. The pruner is left with the scores of the first name and seed.

    Args:
        pruner: A `GradNASPruner` that has discovered its model.
        loaders: Calibration batches per seed; sampled labels and ``random`` are drawn with it.
        budgets: Limits per cost, ``{"flops": ["80%", "60%"]}``; each is a budget of its own.
        batches: What the divergence from the whole model is measured on.
        evaluate: Gives metrics of the model as it is when it is called; None: only the divergence.
        score: Names of scores; those of gradients are collected in one pass.
        repair: Finds the repaired weights of a plan, as `GradNASPruner.repair`; each plan is then
            measured with them too. None: masks only.
        labels: As of `GradNASPruner.score`, and so is `num_examples`.
        num_examples: Of each subset, at most.
        file: JSON file that keeps the points as they are measured; points that are in it for the
            same model, plan and data are not measured again. Scores are kept beside it.
        document: More to keep in the file.
        progress: Called with what is done; gives a context with a function of done and total.
        processes: All that work together; each measures all of `batches`.
        checkpointing: As of `GradNASPruner.score`.

    Raises:
        BudgetError: A budget cannot be read or reached, or is there twice; before any scoring.
        DataError: There is nothing to measure on, or a metric is not finite.
        PlanError: An unknown score, no seed, or a file that holds something else.
    """
    bar, all_ = progress or _no_bar, processes or Processes()
    run = Run(pruner, repair, labels, num_examples, file, bar, all_, checkpointing)
    limits, names = _limits(pruner, budgets), _names(score, loaders)
    earlier = all_.from_main(partial(_earlier, file))
    yardstick = make_yardstick(run, batches, evaluate)
    return _sweep(run, yardstick, loaders, names, limits, earlier, dict(document or {}))


def _sweep(
    run: Run,
    yardstick: Yardstick,
    loaders: Mapping[int, Iterable[Batch]],
    names: Sequence[str],
    limits: Sequence[Mapping[str, Any]],
    earlier: Sequence[Point],
    document: Mapping[str, Any],
) -> Frontier:
    """All points in order, kept as they are measured."""
    pruner = run.pruner
    name = Path(str(pruner.model.name_or_path)).name or type(pruner.model).__name__
    totals, original = dict(pruner.totals), yardstick.original
    made = Frontier(name, pruner.layout, totals, original, document=document)
    known: dict[str, Measured] = {point.key: (point.kl, point.metrics) for point in earlier}
    _keep(run, made, earlier)  # it can be written
    first: Scores | None = None
    for seed, loader in loaders.items():
        subset = make_subset(run, seed, loader)
        for scores in _score(run, subset, names):
            first = first or scores
            pruner.use_scores(scores)
            plans = [pruner.plan(limit) for limit in limits]
            # Repaired weights of one plan at a time are in memory; masks are small.
            for group in [[plan] for plan in plans] if run.repair else [plans]:
                measure_plans(run, yardstick, subset, group, known)
                points = points_of(run, yardstick, subset, group, known)
                made = replace(made, points=(*made.points, *points))
                _keep(run, made, earlier)
    _keep(run, made)
    if first is not None:
        pruner.use_scores(first)
    return made


# --- what is asked for ----------------------------------------------------------------------------


def _limits(pruner: Pruner, budgets: Mapping[str, Limits]) -> list[dict[str, Any]]:
    """Every limit as a budget of its own, checked; of each cost the mildest first.

    Raises:
        BudgetError: One cannot be read or reached, or is there twice.
    """
    if not isinstance(budgets, Mapping) or not any(map(_listed, budgets.values())):
        raise BudgetError(
            f"budgets: found {budgets!r:.80}, needed a mapping from a cost to one limit or more; "
            'write for example {"flops": ["80%", "60%"]}.'
        )
    found: dict[Budget, dict[str, Any]] = {}
    for cost, limits in budgets.items():
        for limit in _listed(limits):
            (budget,) = pruner.check({cost: limit})
            if budget in found:
                raise BudgetError(f"budgets: {cost}={limit} is there twice; give every limit once.")
            found[budget] = {cost: limit}
    costs = list(budgets)
    order = sorted(found, key=lambda budget: (costs.index(budget.cost), -budget.limit))
    return [found[budget] for budget in order]


def _listed(limits: Limits) -> list[Any]:
    return [limits] if isinstance(limits, str | float | int) else list(limits)


def _names(score: str | Sequence[str], loaders: Mapping[int, Iterable[Batch]]) -> list[str]:
    """Names of the scores, after a check that all are known and there is a calibration subset.

    Raises:
        PlanError: One is unknown or there twice, or there is none.
    """
    names = [score] if isinstance(score, str) else list(score)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names or len(set(names)) < len(names):
        what = f"{unknown[0]!r} is not known" if unknown else f"found {names}"
        raise PlanError(f"score: {what}; needed one or more of {', '.join(METHODS)}, each once.")
    if not loaders:
        raise PlanError("loaders: found no seed; give the calibration batches of one or more.")
    return names


@contextmanager
def _no_bar(what: str) -> Iterator[Progress]:
    """Progress that nobody looks at."""
    yield lambda done, total: None


# --- scores ---------------------------------------------------------------------------------------


def _score(run: Run, subset: Subset, names: Sequence[str]) -> list[Scores]:
    """Scores of every name: one pass for all gradients, none for what is read off the weights."""
    model, axes = run.pruner.model, run.pruner.structure.axes
    options: dict[str, Any] = {"seed": subset.seed, "accelerator": run.processes.accelerator}
    gradients = [name for name in names if name in GRADIENT_METHODS]
    found: dict[str, Scores] = {}
    if gradients:
        first, *more = gradients
        with run.bar(f"Scoring (seed {subset.seed})") as report:
            joint = collect_scores(
                model,
                axes,
                subset.loader,
                method=first,
                also=more,
                labels=run.labels,
                num_examples=run.num_examples,
                file=scores_file(run.file, subset.seed),
                progress=report,
                checkpointing=run.checkpointing,
                basis=run.pruner.basis,
                **options,
            )
        found = {name: joint.of(name) for name in gradients}
    for name in names:
        if name not in found:
            found[name] = collect_scores(model, axes, (), method=name, **options)
    return [found[name] for name in names]


def scores_file(file: str | Path | None, seed: int) -> Path | None:
    """Where the scores of a seed are kept, beside the frontier's own file."""
    return None if file is None else Path(file).with_suffix(f".scores-{seed}.safetensors")


# --- keeping --------------------------------------------------------------------------------------


def _earlier(file: str | Path | None) -> tuple[Point, ...]:
    """What an earlier sweep with the same file has measured.

    Raises:
        PlanError: The file holds something else.
    """
    return Frontier.load(file).points if file is not None and Path(file).exists() else ()


def _keep(run: Run, made: Frontier, earlier: Sequence[Point] = ()) -> None:
    """Write what there is, before the end with earlier points that were not reached again yet."""
    if run.file is not None:
        reached = {point.key for point in made.points}
        rest = [point for point in earlier if point.key not in reached]
        so_far = replace(made, points=(*made.points, *rest))
        run.processes.from_main(partial(so_far.save, run.file))
