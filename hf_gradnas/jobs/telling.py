"""What a run tells at its end: what was measured, where the model is, and what came of it all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.companions import loader_of
from ..checkpoint.save import loading_snippet
from ..report import summarise
from .measuring import warn_of_loss
from .report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..pruner import GradNASPruner
    from ..types import Plan
    from .measuring import Metrics
    from .preparation import Job


def tell_metrics(report: Report, columns: Mapping[str, Metrics], job: Job, plan: Plan) -> None:
    """Metrics of all states, and a warning where the last one lost much."""
    report.metrics(columns, str(job.evaluation))
    before, recovered = columns["before"], columns.get("recovered")
    after = recovered or columns.get("after") or columns["after (masked)"]
    is_recovered = recovered is not None
    warn_of_loss(report, before, after, plan.budgets, recovered=is_recovered)


def tell_place(report: Report, model: PreTrainedModel, plan: Plan, output: str) -> None:
    """Where the model was saved, and how it is loaded."""
    report.line(f"Saved: {output}")
    report.line("Load it with:")
    loader = loader_of(Path(output))
    for line in loading_snippet(model, plan.layout, output, loader).splitlines():
        report.line(f"    {line}")


def tell_outcome(
    report: Report,
    pruner: GradNASPruner,
    plan: Plan,
    document: Mapping[str, Any],
    output: Path | str | None,
) -> None:
    """What came of a run.

    Args:
        report: Told it.
        pruner: Of the model.
        plan: What was kept.
        document: What was measured, as ``gradnas.json`` keeps it.
        output: Folder of the model; None: nothing was written.
    """
    summary = summarise(
        plan,
        pruner.prunable,
        document={"totals": pruner.totals, **document},
        name="" if output is None else Path(output).name,
        model=type(pruner.model).__name__,
    )
    report.outcome(summary, None if output is None else str(output))
