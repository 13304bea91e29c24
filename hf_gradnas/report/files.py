"""Every file of a report, as bytes by path: the caller writes them beside the model."""

from __future__ import annotations

import json

from .._redaction import sayable, shareable
from ..types import Plan, Scores
from .card import make_card
from .markdown import plain
from .metadata import CARD, Origin
from .plots import draw_all
from .summary import (
    Summary,
    costs_table,
    kinds_table,
    latency_table,
    metrics_table,
    plan_csv,
    plan_table,
)

FOLDER = "report"


def report_files(
    summary: Summary,
    plan: Plan,
    scores: Scores | None,
    origin: Origin,
    *,
    auto_class: str | None,
    loading: str,
    library: str = "transformers",
    pictures: bool = True,
) -> dict[str, str | bytes]:
    """The card as ``README.md``, and the report in `FOLDER`.

    Args:
        summary: What was done.
        plan: What was cut.
        scores: What it was chosen by; None: not known, so that there is no picture of them.
        origin: The original, and its card.
        auto_class: Name of the auto class that builds the model.
        loading: Python lines that load the model.
        library: Name of the library that they load it with, as the Hub has it.
        pictures: Whether to make more than the card.

    Returns:
        Content by path relative to the model's folder.
    """
    card = make_card(
        summary,
        origin,
        auto_class=auto_class,
        loading=loading,
        library=library,
        pictures=FOLDER if pictures else None,
        has_scores=scores is not None,
    )
    files: dict[str, str | bytes] = {CARD: sayable(str(card))}
    if pictures:
        files[f"{FOLDER}/summary.json"] = json.dumps(shareable(summary.to_dict()), indent=1) + "\n"
        files[f"{FOLDER}/plan.md"] = sayable(_tables(summary))
        files[f"{FOLDER}/plan.csv"] = sayable(plan_csv(summary))
        drawn = draw_all(summary, plan, scores)
        files.update({f"{FOLDER}/{name}": content for name, content in drawn.items()})
    return files


def _tables(summary: Summary) -> str:
    """All tables under each other."""
    parts = [f"# {plain(summary.name)}", "## Costs", costs_table(summary)]
    if summary.latencies:
        parts += [f"## Latency ({plain(summary.machine)})", latency_table(summary)]
    if summary.metrics:
        parts += ["## Metrics", metrics_table(summary)]
    parts += ["## Plan", kinds_table(summary), plan_table(summary)]
    return "\n\n".join(parts) + "\n"
