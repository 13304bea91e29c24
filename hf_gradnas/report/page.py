"""The report as one page, which any browser shows without a network and without scripts.

Its text is a template of Jinja, which escapes whatever is put into it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._redaction import sayable
from ..config.limits import format_amount, format_share
from ..types import COSTS, Plan
from .headline import headline
from .layers import merge_layers, ranges_of
from .sentences import UNMEASURED, say_prediction, say_repair
from .summary import Summary, latency_rows, metric_rows, plan_rows

if TYPE_CHECKING:
    from jinja2 import Template

PICTURE = "Units of every module from best to worst, and which of them were cut"
_TEMPLATE = "page.html.jinja"
_PLACE = "PICTURE"  # of the picture's bytes, which are no text to be read over
_MOST_LISTED = 200_000


def make_page(summary: Summary, plan: Plan, picture: bytes, *, loading: str) -> str:
    """The page, ready to be written as ``index.html``.

    Args:
        summary: What was done.
        plan: What was cut.
        picture: PNG of it.
        loading: Python lines that load the model.
    """
    headers, metrics = metric_rows(summary)
    text = _template().render(
        summary=summary,
        headline=headline(summary),
        costs=list(_costs(summary)),
        latency=latency_rows(summary),
        metric_headers=headers,
        metrics=metrics,
        unmeasured=UNMEASURED,
        prediction=say_prediction(
            summary.loss_increase, summary.loss_unit, summary.loss_before, score=summary.score
        ),
        repair=say_repair(summary.repair) if summary.repair else "",
        picture=_PLACE,
        alternative=PICTURE,
        plan=merge_layers(plan_rows(summary)),
        refusals=merge_layers([(r.module, str(r.kind), r.reason) for r in summary.refusals]),
        kept=list(_kept(plan)),
        loading=loading,
    )
    before, after = sayable(text).split(f"base64,{_PLACE}", 1)
    return f"{before}base64,{base64.b64encode(picture).decode('ascii')}{after}"


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415

    folder = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined).get_template(
        _TEMPLATE
    )


def _costs(summary: Summary) -> Iterator[dict[str, Any]]:
    for cost in summary.costs:
        limit = None if cost.limit is None else cost.limit / cost.before
        yield {
            "title": COSTS.get(cost.name, cost.name),
            "before": format_amount(cost.before),
            "after": format_amount(cost.after),
            "kept": format_share(cost.kept_ratio, digits=2),
            "share": cost.kept_ratio,
            "limit": limit,
            "budget": "-" if limit is None else f"{format_amount(cost.limit or 0)} ({limit:.1%})",
        }


def _kept(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """Name, number kept, number of all and kept units of every axis."""
    is_short = sum(map(len, plan.kept.values())) <= _MOST_LISTED
    for name, units in plan.kept.items():
        told = ", ".join(ranges_of(units)) or "none" if is_short else "see gradnas.json"
        yield name, f"{len(units):,}", f"{plan.sizes[name]:,}", told
