"""What came of a prune, in one line: what is left, what it is worth and how fast it is.

The last line of the command, and the first of a card and of a report.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..config.limits import format_share
from ..types import COSTS, USUAL
from .sentences import slower
from .summary import Summary

_METRICS = ("accuracy", "agreement", "perplexity", "loss")
_FINAL = ("recovered", "after", "after (masked)")


def headline(summary: Summary) -> str:
    """Such as ``Kept 80.0% of the parameters; perplexity 12.1 → 13.4; 1.22 × as fast …``.

    Costs with a budget come first, then FLOPs and parameters. What was not measured is not said.
    """
    kept = {cost.name: cost.kept_ratio for cost in summary.costs}
    said = [say_kept(kept, [cost.name for cost in summary.costs if cost.limit is not None])]
    metric = final_metric(summary.metrics)
    if metric is not None:
        name, before, after = metric
        said.append(f"{name} {_value(name, before)} → {_value(name, after)}")
    if summary.latencies:
        first = summary.latencies[0]
        fast = f"{first.speedup:.2f} × as fast at batch size {first.batch_size}"
        said.append(fast + slower(first.speedup))
    return "; ".join(said)


def final_metric(metrics: Mapping[str, Mapping[str, float]]) -> tuple[str, float, float] | None:
    """Name of the most telling metric, and its value before the cut and at the end, if measured."""
    before = metrics.get("before", {})
    after = next((metrics[state] for state in _FINAL if state in metrics), {})
    name = next((name for name in _METRICS if name in before and name in after), None)
    return None if name is None else (name, before[name], after[name])


def say_kept(kept: Mapping[str, float], limited: Collection[str]) -> str:
    """Such as ``Kept 50.0% of the FLOPs and 62.1% of the parameters``.

    Args:
        kept: Share of the whole model's, by cost.
        limited: Costs with a budget; of the others, FLOPs and parameters are said.
    """
    told = [name for name in kept if name in limited]
    told += [name for name in kept if name in USUAL and name not in limited]
    shares = [
        f"{format_share(kept[name], digits=1)} of the {COSTS.get(name, name)}" for name in told
    ]
    first = ", ".join(shares[:-1])
    return f"Kept {first} and {shares[-1]}" if first else f"Kept {''.join(shares)}"


def _value(name: str, value: float) -> str:
    return f"{value:.4g}" if name in {"perplexity", "loss"} else f"{value:.3f}"
