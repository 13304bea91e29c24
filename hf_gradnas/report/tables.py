"""The plan, costs, metrics and latencies as tables: Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from ..config.budgets import format_amount, format_share
from .markdown import code, plain
from .quality import with_errors
from .summary import Summary

_STATES = {"before": "before", "after": "after the cut", "recovered": "after recovery"}


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 0) -> str:
    """A Markdown table whose last `right` columns hold numbers."""
    left = len(headers) - right
    lines = [headers, ["---"] * left + ["---:"] * right, *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def plan_table(summary: Summary) -> str:
    """Kept and all units of every axis, and the sums over each kind."""
    rows = [
        (
            code(axis.module),
            axis.kind,
            f"{axis.kept:,}",
            f"{axis.size:,}",
            format_share(axis.kept_ratio),
        )
        for axis in summary.axes
    ]
    return markdown_table(("module", "axis", "kept", "of", "share"), rows, right=3)


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
    rows = [
        (
            f"{found.batch_size}",
            f"{found.before_ms:.1f} ms",
            f"{found.after_ms:.1f} ms",
            say_speedup(found.speedup),
        )
        for found in summary.latencies
    ]
    return markdown_table(("batch size", "before", "after", "speed-up"), rows, right=4)


def metrics_table(summary: Summary) -> str:
    """Measured quality, one column per state of the model."""
    metrics = {state: with_errors(found) for state, found in summary.metrics.items()}
    states = list(metrics)
    names = dict.fromkeys(name for found in metrics.values() for name in found)
    rows = []
    for name in names:
        values = [metrics[state].get(name) for state in states]
        shown = [
            "-" if v is None else f"{v:,}" if name == "examples" else f"{v:.4f}" for v in values
        ]
        rows.append((plain(name), *shown))
    headers = ("metric", *(_STATES.get(state) or plain(state) for state in states))
    return markdown_table(headers, rows, right=len(states))


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


def say_speedup(speedup: float) -> str:
    """How many times as fast; said plainly where it is slower."""
    return f"{speedup:.2f} ×" if speedup >= 1 else f"{speedup:.2f} × (slower)"
