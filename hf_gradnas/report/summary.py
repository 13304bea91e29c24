"""The summary: one record of what was cut, and what it cost and was worth before and after.

Tables, pictures and the model card are made from it, and it is written as ``summary.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..types import CostModel, Plan, Refusal, Structure

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class AxisWidth:
    """How many units one axis has and keeps."""

    name: str
    module: str
    kind: str
    size: int
    kept: int

    @property
    def kept_ratio(self) -> float:
        """Kept units as a fraction of all."""
        return self.kept / self.size


@dataclass(frozen=True, slots=True)
class CostChange:
    """One cost before and after the cut, in its own unit, and its limit if it has a budget."""

    name: str
    before: float
    after: float
    limit: float | None = None

    @property
    def kept_ratio(self) -> float:
        """Cost after the cut as a fraction of the cost before."""
        return self.after / self.before


@dataclass(frozen=True, slots=True)
class Latency:
    """Median milliseconds of a forward before and after the cut, at one batch size."""

    batch_size: int
    before_ms: float
    after_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster the cut model is."""
        return self.before_ms / self.after_ms


@dataclass(frozen=True)
class Summary:
    """What was done to a model.

    Attributes:
        name: What the result is called: the name of its folder.
        model: Class of the model.
        base_model: Name of the original, if it has one.
        layout: ``"stock"`` or ``"per_layer"``.
        score: Name of the score.
        search: Name of the search.
        loss_increase: Predicted, in `loss_unit`; without one the sum of the pruned scores.
        loss_unit: Such as ``"nats per token"``; "" where the scores are no loss.
        loss_before: Loss of the whole model while scoring, in `loss_unit`.
        axes: In the model's order.
        costs: Before and after, with the budgets.
        refusals: What was seen but not pruned.
        metrics: Measured values by state of the model (``before``, ``after``, ``recovered``).
        latencies: Measured latencies.
        machine: What they were measured on, in words.
        in_turn: Whether the two models were measured in turn; else one after the other, and what
            else the machine did is in the ratio too.
        calibration: What was scored on: ``dataset``, ``examples``, ``labels``.
        evaluation: What was measured on: ``dataset``, ``examples``, ``held_out`` from what is
            scored, ``scored_too``, ``labels``; empty where nothing was, or it is not known.
        repair: What `Repair.record` says of the new weights it was cut with; empty without any.
        recovery: What the cut model was trained on; empty if it was not.
        recipe: Options of the command; empty where it was not used.
        command: The command; "" where it was not used.
        versions: Versions by package.
    """

    name: str
    model: str
    base_model: str | None
    layout: str
    score: str
    search: str
    loss_increase: float
    axes: tuple[AxisWidth, ...]
    costs: tuple[CostChange, ...]
    refusals: tuple[Refusal, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    latencies: tuple[Latency, ...] = ()
    machine: str = ""
    in_turn: bool = True
    calibration: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    loss_unit: str = ""
    loss_before: float | None = None
    repair: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of axes, in the order in which they come."""
        return tuple(dict.fromkeys(axis.kind for axis in self.axes))

    def of_kind(self, kind: str) -> tuple[AxisWidth, ...]:
        """Axes of one kind, in the model's order."""
        return tuple(axis for axis in self.axes if axis.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary, with the ratios."""
        data = asdict(self)
        for name, items, ratio in (
            ("axes", self.axes, "kept_ratio"),
            ("costs", self.costs, "kept_ratio"),
            ("latencies", self.latencies, "speedup"),
        ):
            for entry, item in zip(data[name], items, strict=True):
                entry[ratio] = getattr(item, ratio)
        return {"format_version": FORMAT_VERSION, **data}


def summarise(
    plan: Plan,
    structure: Structure,
    *,
    costs: Mapping[str, CostModel],
    document: Mapping[str, Any],
    name: str,
    model: str,
    base_model: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> Summary:
    """Gather what is known of a pruned model.

    Args:
        plan: What was cut.
        structure: What could be.
        costs: Closed forms, for costs that the plan does not state.
        document: Content of ``gradnas.json``: ``totals``, and where there are any ``metrics``,
            ``latency``, ``calibration``, ``repair``, ``recovery``, ``recipe``, ``command`` and
            ``scores``.
        name: What the result is called.
        model: Class of the model.
        base_model: Name of the original.
        versions: Versions by package.
    """
    measured = document.get("latency", {})
    return Summary(
        name=name,
        model=model,
        base_model=base_model,
        layout=plan.layout,
        score=plan.score,
        search=plan.search,
        loss_increase=plan.loss_increase,
        loss_unit=plan.loss_unit,
        loss_before=plan.loss_before,
        axes=tuple(
            AxisWidth(a.name, a.module, str(a.kind), a.size, len(plan.kept[a.name]))
            for a in structure.axes
        ),
        costs=tuple(_changes(plan, costs, document["totals"])),
        refusals=structure.refusals,
        metrics=document.get("metrics", {}),
        latencies=tuple(Latency(**entry) for entry in measured.get("batches", ())),
        machine=measured.get("machine", ""),
        in_turn=measured.get("in_turn", True),
        calibration=document.get("calibration") or _scored_on(document.get("scores", {})),
        evaluation=document.get("evaluation", {}),
        repair=document.get("repair", {}),
        recovery=document.get("recovery", {}),
        recipe=document.get("recipe", {}),
        command=document.get("command", ""),
        versions=versions or {},
    )


def _changes(
    plan: Plan, costs: Mapping[str, CostModel], totals: Mapping[str, float]
) -> Iterable[CostChange]:
    limits = {budget.cost: budget.limit for budget in plan.budgets}
    for name, before in totals.items():
        after = plan.costs[name] if name in plan.costs else costs[name].of(plan.counts())
        yield CostChange(name, before, after, limits.get(name))


def _scored_on(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the scores say about their data."""
    return {name: metadata[name] for name in ("examples", "labels") if name in metadata}
