"""The predicted loss increase of a plan in nats, where scores are a share of a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..types import Plan, Scores

OF_TOKENS = ("labels_after_shift", "labels")
"""Normalisers by which a loss is a mean over tokens (`scores.normaliser`)."""
LOSS_FACTORS: Mapping[str, float] = {"fisher": 0.5, "taylor": 1.0}
"""What a sum of scores is multiplied by to be a change of the loss sum."""


def with_prediction(plan: Plan, scores: Scores) -> Plan:
    """The plan with its sum of pruned scores in nats per label, where the scores say so much.

    Scores of older files do not tell the loss that was scored; the sum then stays what it is.
    """
    metadata = scores.metadata
    loss, labels = _number(metadata, "loss_sum"), _number(metadata, "labels_scored")
    if plan.score not in LOSS_FACTORS or not labels > 0 or not math.isfinite(loss):
        return plan
    increase = LOSS_FACTORS[plan.score] * plan.loss_increase / labels
    unit = f"nats per {_label(metadata, labels)}"
    return replace(plan, loss_increase=increase, loss_unit=unit, loss_before=loss / labels)


def _label(metadata: Mapping[str, str], labels: float) -> str:
    """What one label is given to."""
    if metadata.get("normaliser") in OF_TOKENS:
        return "token"
    return "example" if labels == _number(metadata, "examples") else "label"


def _number(metadata: Mapping[str, str], name: str) -> float:
    """A number of the metadata; NaN where it is missing or is none."""
    try:
        return float(metadata[name])
    except (KeyError, ValueError):
        return math.nan
