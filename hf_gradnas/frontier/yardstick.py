"""What plans are measured with, and how: masks, divergence from the whole model, metrics.

Knows one calibration subset and its plans; which subsets, scores and budgets there are is said in
`measure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PreTrainedModel

from ..batches.batch import digest, read_batches
from ..batches.longest import Batch, reiterable
from ..batches.steps import by_length
from ..errors import DataError
from ..repair.closeness import divergences
from ..repair.repairs import plan_digest
from ..running.processes import Processes
from ..scores import model_fingerprint
from ..types import MASKED, REPAIRED, STATES, Basis, Budget, Plan, Point, Scores, Structure

if TYPE_CHECKING:
    from ..repair.repairs import Repair

Progress = Callable[[int, int | None], None]
Bar = Callable[[str], AbstractContextManager[Progress]]
Evaluate = Callable[[PreTrainedModel], Mapping[str, float]]
Measured = tuple[float | None, Mapping[str, float]]
"""Divergence and metrics of a plan in one state."""
Variant = Callable[[], AbstractContextManager[None]]


class Pruner(Protocol):
    """What a sweep asks of a `GradNASPruner`, which see."""

    model: PreTrainedModel
    layout: str

    @property
    def basis(self) -> Basis: ...  # noqa: D102 - see GradNASPruner
    @property
    def structure(self) -> Structure: ...  # noqa: D102 - see GradNASPruner
    @property
    def totals(self) -> dict[str, float]: ...  # noqa: D102
    def check(self, budget: Mapping[str, Any]) -> tuple[Budget, ...]: ...  # noqa: D102
    def use_scores(self, scores: Scores) -> None: ...  # noqa: D102
    def plan(self, budget: Mapping[str, Any]) -> Plan: ...  # noqa: D102
    def masked(self, plan: Plan, repair: Repair | None = None) -> AbstractContextManager[None]: ...  # noqa: D102


@dataclass(frozen=True)
class Run:
    """What stays the same during a sweep; the fields are those of `measure_frontier`."""

    pruner: Pruner
    repair: Callable[..., Repair | None] | None
    labels: str
    num_examples: int | None
    file: str | Path | None
    bar: Bar
    processes: Processes
    checkpointing: bool | None

    @property
    def states(self) -> tuple[str, ...]:
        """In which states each plan is measured."""
        return STATES if self.repair else (MASKED,)


@dataclass(frozen=True)
class Subset:
    """One calibration subset: its seed, its batches, and their digest where they repair."""

    seed: int
    loader: Iterable[Batch]
    digest: str


def make_subset(run: Run, seed: int, loader: Iterable[Batch]) -> Subset:
    """The subset of a seed, to be read again."""
    loader = reiterable(loader, run.pruner.model, run.num_examples)
    own = _digest_of(loader, run.pruner.model, run.num_examples) if run.repair else ""
    return Subset(seed, loader, own)


def _digest_of(batches: Iterable[Batch], model: PreTrainedModel, limit: int | None) -> str:
    found = ""
    for batch in read_batches(batches, model, limit):
        found = digest(found, batch.columns)
    return found


@dataclass(frozen=True)
class Yardstick:
    """What plans are measured with.

    Attributes:
        batches: For the divergence from the whole model.
        evaluate: For metrics.
        original: Metrics of the whole model.
        digest: Of the model, of the batches and of its metrics on them.
    """

    batches: Iterable[Batch]
    evaluate: Evaluate | None
    original: Mapping[str, float]
    digest: str

    def key(self, plan: Plan, subset: Subset, state: str) -> str:
        """Digest of all that a point depends on."""
        repaired_by = subset.digest if state == REPAIRED else ""
        return digest(self.digest, {state: plan_digest(plan), "by": repaired_by})


def make_yardstick(run: Run, batches: Iterable[Batch], evaluate: Evaluate | None) -> Yardstick:
    """Look at the whole model, which also shows that it can be measured, before any scoring.

    Raises:
        DataError: There is nothing to measure on, or it cannot be measured.
    """
    model = run.pruner.model
    batches = reiterable(batches, model, None)
    with run.bar("Measuring the original") as report, run.processes.joint():
        report(0, None)
        own = _digest_of(batches, model, None)
        divergences(model, [next(iter(batches))], [])
        original = _metrics(evaluate, model, "the whole model")
    own = digest(own, {"model": model_fingerprint(model), "original": original})
    return Yardstick(batches, evaluate, original, own)


def _metrics(evaluate: Evaluate | None, model: PreTrainedModel, what: str) -> dict[str, float]:
    found = {} if evaluate is None else {str(k): float(v) for k, v in evaluate(model).items()}
    for name, value in found.items():
        if not math.isfinite(value):
            raise DataError(
                f"evaluate: {name} of {what} is {value}, needed a finite number; check the labels, "
                "load the model in float32, or give milder budgets."
            )
    return found


def measure_plans(
    run: Run,
    yardstick: Yardstick,
    subset: Subset,
    plans: Sequence[Plan],
    known: dict[str, Measured],
) -> None:
    """Add to `known` what is not known of the plans, in one run over the batches."""
    tries: dict[str, Variant] = {}
    alike: dict[str, str] = {}
    for plan in plans:
        masked, repaired = (yardstick.key(plan, subset, state) for state in STATES)
        if masked not in known:
            tries[masked] = partial(run.pruner.masked, plan)
        if run.repair and repaired not in known:
            loader = by_length(subset.loader, num_examples=run.num_examples)
            with run.bar(f"Repairing ({plan.score}, seed {subset.seed})") as report:
                options = {"num_examples": run.num_examples, "progress": report}
                repair = run.repair(plan, loader, **options)
            if repair is not None and repair.is_accepted:
                tries[repaired] = partial(run.pruner.masked, plan, repair)
            else:
                alike[repaired] = masked
    if tries:
        known.update(_try(run, yardstick, tries, f"{plans[0].score}, seed {subset.seed}"))
    known.update({key: known[other] for key, other in alike.items()})


def _try(
    run: Run,
    yardstick: Yardstick,
    tries: Mapping[str, Variant],
    what: str,
) -> dict[str, Measured]:
    """Run the model in every way, and measure how far it is from the whole one."""
    model = run.pruner.model
    found: dict[str, Measured] = {}
    with run.bar(f"Measuring ({what})") as report, run.processes.joint():
        report(0, len(tries))
        away = divergences(model, yardstick.batches, list(tries.values()))
        for kl, (key, variant) in zip(away, tries.items(), strict=True):
            with variant():
                metrics = _metrics(yardstick.evaluate, model, f"a plan ({what})")
            found[key] = (max(kl, 0.0) if math.isfinite(kl) else None, metrics)
            report(len(found), len(tries))
    return found


def points_of(
    run: Run,
    yardstick: Yardstick,
    subset: Subset,
    plans: Sequence[Plan],
    known: Mapping[str, Measured],
) -> Iterator[Point]:
    """The points of plans that were measured."""
    for plan in plans:
        for state in run.states:
            key = yardstick.key(plan, subset, state)
            yield Point(
                score=plan.score,
                seed=subset.seed,
                budget=plan.budgets[0],
                state=state,
                costs=dict(plan.costs),
                kl=known[key][0],
                metrics=known[key][1],
                loss_increase=plan.loss_increase,
                key=key,
            )
