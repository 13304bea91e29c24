"""What came of a prune, as one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .._redaction import without_secrets
from ..report import Summary, final_metric, headline


def outcome_json(summary: Summary, folder: str | None, warnings: Sequence[str]) -> str:
    """The object as text; a number that is not finite is null.

    Args:
        summary: What was done.
        folder: Where the model is; None: nothing was written.
        warnings: All that were given.
    """
    metric = final_metric(summary.metrics)
    answer = {
        "folder": folder and without_secrets(folder),
        "headline": headline(summary),
        "layout": summary.layout,
        "kept": {cost.name: cost.kept_ratio for cost in summary.costs},
        "budget": {
            cost.name: {"limit": cost.limit, "ratio": cost.limit / cost.before}
            for cost in summary.costs
            if cost.limit is not None
        },
        "costs": {
            cost.name: {"before": cost.before, "after": cost.after} for cost in summary.costs
        },
        "metric": metric and dict(zip(("name", "before", "after"), metric, strict=True)),
        "metrics": summary.metrics,
        "speedup": summary.latencies[0].speedup if summary.latencies else None,
        "latency": [{**asdict(found), "speedup": found.speedup} for found in summary.latencies],
        "warnings": list(warnings),
    }
    return json.dumps(_finite(answer), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same without infinities, which are no JSON."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
