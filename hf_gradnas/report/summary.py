"""The summary: one record of what was cut, and what it cost and was worth before and after.

Tables, pictures and the model card are made from it, and it is written as ``summary.json``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config.limits import format_amount, format_share
from ..types import CostModel, Plan, Prunable, Refusal
from .layers import merge_layers
from .sentences import code, plain, say_speedup, with_errors

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
        skipped: Batch sizes that were not timed, for want of time.
        calibration: What was scored on: ``dataset``, ``examples``, ``labels``.
        evaluation: What was measured on: ``dataset``, ``examples``, ``held_out`` from what is
            scored, ``scored_too``, ``labels``; empty where nothing was, or it is not known.
        instead: What layout ``stock`` would take, as `planning.stock_instead` says it.
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
    skipped: tuple[int, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    loss_unit: str = ""
    loss_before: float | None = None
    repair: Mapping[str, Any] = field(default_factory=dict)
    instead: Mapping[str, float] = field(default_factory=dict)

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
    prunable: Prunable,
    *,
    document: Mapping[str, Any],
    name: str,
    model: str,
    base_model: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> Summary:
    """Gather what is known of a pruned model.

    Args:
        plan: What was cut.
        prunable: What could be, and closed forms for costs that the plan does not state.
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
            for a in prunable.axes
        ),
        costs=tuple(_changes(plan, prunable.costs, document["totals"])),
        refusals=prunable.structure.refusals,
        metrics=document.get("metrics", {}),
        latencies=tuple(Latency(**entry) for entry in measured.get("batches", ())),
        machine=measured.get("machine", ""),
        in_turn=measured.get("in_turn", True),
        skipped=tuple(measured.get("skipped", ())),
        calibration=document.get("calibration") or _scored_on(document.get("scores", {})),
        evaluation=document.get("evaluation", {}),
        repair=document.get("repair", {}),
        instead=document.get("stock_instead", {}),
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


# --- tables, in Markdown and CSV ------------------------------------------------------------------


_STATES = {"before": "before", "after": "after the cut", "recovered": "after recovery"}


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 0) -> str:
    """A Markdown table whose last `right` columns hold numbers."""
    left = len(headers) - right
    lines = [headers, ["---"] * left + ["---:"] * right, *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def plan_table(summary: Summary) -> str:
    """Kept and all units of every axis; equal layers in one row."""
    rows = merge_layers(plan_rows(summary))
    told = [(code(module), *others) for module, *others in rows]
    return markdown_table(("module", "axis", "kept", "of", "share"), told, right=3)


def plan_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Module, kind, kept units, all units and share of every axis."""
    return [
        (
            axis.module,
            axis.kind,
            f"{axis.kept:,}",
            f"{axis.size:,}",
            format_share(axis.kept_ratio),
        )
        for axis in summary.axes
    ]


def kinds_table(summary: Summary) -> str:
    """Kept and all units per kind of axis, and the narrowest and widest of its modules."""
    rows = []
    for kind in summary.kinds:
        axes = summary.of_kind(kind)
        kept, size = sum(axis.kept for axis in axes), sum(axis.size for axis in axes)
        low, high = min(axis.kept for axis in axes), max(axis.kept for axis in axes)
        width = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows.append(
            (kind, f"{len(axes)}", f"{kept:,}", f"{size:,}", format_share(kept / size), width)
        )
    headers = ("axis", "modules", "kept", "of", "share", "kept per module")
    return markdown_table(headers, rows, right=5)


def costs_table(summary: Summary) -> str:
    """Each cost before and after the cut."""
    rows = [
        (
            cost.name,
            format_amount(cost.before),
            format_amount(cost.after),
            format_share(cost.kept_ratio, digits=2),
            "-"
            if cost.limit is None
            else f"{format_amount(cost.limit)} ({cost.limit / cost.before:.1%})",
        )
        for cost in summary.costs
    ]
    return markdown_table(("cost", "before", "after", "kept", "budget"), rows, right=4)


def latency_table(summary: Summary) -> str:
    """Median latency of a forward before and after, per batch size."""
    headers = ("batch size", "before", "after", "speed-up")
    return markdown_table(headers, latency_rows(summary), right=4)


def latency_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Batch size, milliseconds before and after, and how many times as fast."""
    return [
        (
            f"{found.batch_size}",
            f"{found.before_ms:.1f} ms",
            f"{found.after_ms:.1f} ms",
            say_speedup(found.speedup),
        )
        for found in summary.latencies
    ]


def metrics_table(summary: Summary) -> str:
    """Every metric, one column per state of the model."""
    headers, rows = metric_rows(summary)
    told = [(plain(name), *values) for name, *values in rows]
    return markdown_table([plain(header) for header in headers], told, right=len(headers) - 1)


def metric_rows(summary: Summary) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headers, and a row per metric with its value in every state of the model."""
    metrics = {state: with_errors(found) for state, found in summary.metrics.items()}
    names = dict.fromkeys(name for found in metrics.values() for name in found)
    rows = []
    for name in names:
        values = [found.get(name) for found in metrics.values()]
        shown = [
            "-" if v is None else f"{v:,}" if name == "examples" else f"{v:.4f}" for v in values
        ]
        rows.append((name, *shown))
    return ["metric", *(_STATES.get(state, state) for state in metrics)], rows


def repair_table(summary: Summary) -> str:
    """Distance of the predictions from the original's, with the old weights and the new ones."""
    values = (summary.repair.get(name) for name in ("kl_before", "kl_after"))
    shown = ("-" if value is None else f"{value:.4g}" for value in values)
    headers = ("divergence from the original", "cut only", "repaired")
    return markdown_table(headers, [("KL, nats per label", *shown)], right=2)


def plan_csv(summary: Summary) -> str:
    """The plan as CSV, one row per axis."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("axis", "module", "kind", "kept", "size", "kept_ratio"))
    for axis in summary.axes:
        writer.writerow(
            (axis.name, axis.module, axis.kind, axis.kept, axis.size, f"{axis.kept_ratio:.6f}")
        )
    return stream.getvalue()


# --- short names of modules -----------------------------------------------------------------------


LONGEST = 30


def short_names(modules: Sequence[str]) -> list[str]:
    """Module paths without the parts that all of them have, so that they still differ.

    ``bert.encoder.layer.0.attention`` … ``bert.encoder.layer.5.attention`` become ``0`` … ``5``.
    A long name loses its middle.
    """
    if len(modules) <= 1:
        return [_clip(module) for module in modules]
    paths = [module.split(".") for module in modules]
    common = set(paths[0]).intersection(*paths[1:])
    short = [[part for part in path if part.isdigit() or part not in common] for path in paths]
    if not _differ(short, modules):
        short = paths
    for first in (False, True):  # numbers that tell nothing: the last, then the first of each
        fewer = [_without_number(path, first=first) for path in short]
        while _differ(fewer, modules):
            short, fewer = fewer, [_without_number(path, first=first) for path in fewer]
    return [_clip(".".join(path)) for path in short]


def _differ(paths: Sequence[Sequence[str]], modules: Sequence[str]) -> bool:
    """Whether shortened paths are as many as the modules, and none is empty."""
    return all(paths) and len({tuple(path) for path in paths}) == len(set(modules))


def _without_number(path: Sequence[str], *, first: bool) -> list[str]:
    """A path without its last or first number, or nothing where it has none."""
    places = [place for place, part in enumerate(path) if part.isdigit()]
    if not places:
        return []
    place = places[0] if first else places[-1]
    return [*path[:place], *path[place + 1 :]]


def _clip(name: str) -> str:
    if len(name) <= LONGEST:
        return name
    half = (LONGEST - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
