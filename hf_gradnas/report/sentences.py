"""How names, figures and outcomes are written: safely in Markdown and Python, and in sentences.

Says what measured figures are worth, and what a plan or a repair says of itself. Takes metrics as
mappings, as ``gradnas.json`` holds them. No text ends what it is in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .._redaction import visible
from ..config.limits import format_share
from ..types import COSTS, Plan, Structure

UNMEASURED = "Nothing was measured when the model was pruned."

_SPECIAL = re.compile(r"([\\`*\[\]<>])")
_TICKS = re.compile("`+")


def plain(text: object) -> str:
    """A text in one line of Markdown, none of which is read as markup."""
    return _SPECIAL.sub(r"\\\1", in_one_line(text))


def in_one_line(text: object) -> str:
    """A text with every run of white space as one space."""
    return " ".join(str(text).split())


def code(text: object) -> str:
    """A text as code within a line."""
    line = in_one_line(text)
    ticks = "`" * (_longest(line) + 1)
    gap = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{gap}{line}{gap}{ticks}"


def fenced(language: str, text: str) -> str:
    """A text as a block of code, whatever fences there are in it."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def python_string(text: object) -> str:
    """A text as a literal of Python, and of JSON, between double quotes."""
    text = str(text)
    return json.dumps(text, ensure_ascii=visible(text) != text)


def _longest(text: str) -> int:
    return max((len(run) for run in _TICKS.findall(text)), default=0)


# --- what figures are worth -----------------------------------------------------------------------


SHARES = ("accuracy", "agreement")
"""Metrics that are a share of the examples."""
MOST_LOSS, MOST_SHARE, MOST_RATIO = 0.4, 0.05, 0.2
"""More is much: nats of loss (a perplexity times 1.5), accuracy, and the ratio of another loss.

Measured without recovery on a BERT for SST-2, 400 examples: 70 % of the FLOPs cost .003 of the
accuracy, 50 % .015, 40 % .053, 20 % all of it; on a Llama for Python: 70 % cost 0.33 nats, 60 %
0.85, 50 % 2.4.
"""
ERRORS = 2.0
"""A share that fell by fewer standard errors of its difference may have fallen by chance."""
NATS_PER_ERROR = 5.0
"""Loss that one example may add which is newly wrong: few of them make a mean of few examples."""


def sampling_error(share: float, examples: float) -> float:
    """Standard error of a share that was measured on so many examples.

    Two more, one of them right, keep it above 0 where all are right or wrong.
    """
    smoothed = (share * examples + 1) / (examples + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (examples + 2))


def with_errors(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics with the sampling error of every share after it."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        found[name] = value
        if name in SHARES and metrics.get("examples"):
            found[f"± of {name}"] = sampling_error(value, metrics["examples"])
    return found


def what_was_lost(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """What got worse by more than the limits above, as half a sentence; "" where nothing did."""
    if "loss" not in before or "loss" not in after:
        return ""
    on = f"on {before['examples']:,} examples" if "examples" in before else "where it was measured"
    chance = 0.0
    for name in SHARES:
        if name in before and name in after:
            chance = ERRORS * _error_of_fall(name, before, after)
            most = max(MOST_SHARE, chance)
            if before[name] - after[name] > most:
                return (
                    f"{name} fell from {before[name]:.3f} to {after[name]:.3f} {on}, by more than "
                    f"{most:.2g}"
                )
    grew = after["loss"] - before["loss"]
    in_nats = any(name in before for name in (*SHARES, "perplexity"))
    most = max(MOST_LOSS, NATS_PER_ERROR * chance)
    if in_nats and grew > most:
        more = ""
        if "perplexity" in before and "perplexity" in after:
            more = f" (perplexity {before['perplexity']:.4g} to {after['perplexity']:.4g})"
        return (
            f"the loss grew from {before['loss']:.3f} to {after['loss']:.3f}{more} {on}, by more "
            f"than {most:.2g} nats"
        )
    if not in_nats and grew > MOST_RATIO * abs(before["loss"]):
        return (
            f"the loss grew from {before['loss']:.4g} to {after['loss']:.4g} {on}, by more than "
            f"{MOST_RATIO:.0%}"
        )
    return ""


def _error_of_fall(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Standard error of the difference of two shares; an upper bound, as the examples are the same.

    What the whole model agrees with itself in is no sample. Without a number of examples: 0.
    """
    states = (after,) if name == "agreement" else (before, after)
    errors = [sampling_error(m[name], m["examples"]) for m in states if m.get("examples")]
    return math.hypot(*errors)


# --- what the other layout would take -------------------------------------------------------------


def say_stock(instead: Mapping[str, float]) -> str:
    """What `planning.stock_instead` found, as a sentence; "" where it found nothing."""
    if not instead:
        return ""
    if "scores" not in instead:
        return "Layout stock, which loads anywhere, cannot reach this budget."
    kept = " and ".join(
        f"{format_share(share, digits=1)} of the {COSTS.get(name, name)}"
        for name, share in instead.items()
        if name != "scores"
    )
    return (
        f"With --layout stock, which loads anywhere, {kept} would be left at this budget, and what "
        f"is cut would score {instead['scores']:.2f} times as much."
    )


# --- what a plan predicts, in a sentence ----------------------------------------------------------


def slower(speedup: float) -> str:
    """What to say after a speed-up that is none, at the two digits that are shown."""
    return "" if round(speedup, 2) >= 1 else " (slower)"


def say_speedup(speedup: float) -> str:
    """How many times as fast; said plainly where it is slower."""
    return f"{speedup:.2f} ×{slower(speedup)}"


def say_prediction(increase: float, unit: str, before: float | None, *, score: str) -> str:
    """The predicted loss increase with its unit, the loss it adds to, and its worth.

    Args:
        increase: In `unit`, or a sum of scores where that is "".
        unit: Such as ``"nats per token"``.
        before: Loss of the whole model while scoring, in `unit`.
        score: Name of the score.
    """
    if not unit:
        return (
            f"Sum of the scores of what is pruned: {increase:.4g} ({score or 'unknown'} scores, "
            "which rank plans and are no loss)."
        )
    beside = (
        "" if before is None else f", beside {before:.4g} of the whole model on the data scored"
    )
    if score == "taylor":
        return (
            f"Predicted change of the loss: {increase:.4g} {unit} at most{beside} (first order, "
            "signs left out, every unit as if it went alone; it ranks plans and is no forecast)."
        )
    return (
        f"Predicted loss increase: {increase:.4g} {unit}{beside} (second order, every unit as if "
        "it went alone; it ranks plans and is no forecast: measured, it is often several times as "
        "large)."
    )


# --- what a repair did, in a sentence -------------------------------------------------------------


def say_repair(found: Mapping[str, Any]) -> str:
    """How many layers have new weights, and how far the predictions came back.

    Args:
        found: What ``gradnas.json`` keeps of a repair.
    """
    sites = found.get("sites", ())
    if not sites:
        return "Not repaired: no layer reads what is pruned."
    solved = sum(not site["reason"] for site in sites)
    data = f"by least squares on {found['examples']:,} examples"
    before, after = found.get("kl_before"), found.get("kl_after")
    known = before is not None and after is not None
    if found.get("is_accepted"):
        fell = f" fell from {before:.4g} to {after:.4g}" if known else " fell"
        return (
            f"Repaired {solved} of {len(sites)} layers {data}, without training: the KL divergence "
            f"from the original's predictions{fell} nats per label, on held-out batches."
        )
    did_not = f" ({before:.4g} before, {after:.4g} with new weights)" if known else ""
    return (
        f"Not repaired: new weights {data} did not lower the KL divergence from the original's "
        f"predictions{did_not}, so the weights are as they were."
    )


def say_swap(structure: Structure, planned: Plan, swapped: Plan) -> str:
    """How many neurons stay that the scores alone would not have kept.

    Args:
        structure: Of the whole model.
        planned: As it was found by the scores.
        swapped: The same with other neurons.
    """
    names = [axis.name for axis in structure.axes if axis.is_columns]
    pruned = [name for name in names if len(planned.kept[name]) < planned.sizes[name]]
    total = sum(len(planned.kept[name]) for name in pruned)
    came = sum(len(set(swapped.kept[name]) - set(planned.kept[name])) for name in pruned)
    return (
        f"Swapped {came:,} of {total:,} neurons that stay for ones that least squares mends worse."
    )


def say_skipped(sizes: Sequence[int]) -> str:
    """Batch sizes that were not timed, and why; empty where there are none."""
    if not sizes:
        return ""
    several = "s" if len(sizes) > 1 else ""
    listed = ", ".join(map(str, sizes))
    return (
        f"Batch size{several} {listed} not timed, which would have taken more than a tenth of the "
        "time of the run."
    )
