"""What a repair did, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
