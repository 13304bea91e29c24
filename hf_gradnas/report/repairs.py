"""What a repair did, and the swap of neurons before it, each in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import Plan, Structure


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
