"""What a sum of pruned scores says of the loss: how much of it, in which unit, beside which loss.

A `fisher` score is twice the second-order Taylor term of the loss summed over the examples, and a
`taylor` score bounds the first-order one; other scores are no loss. Divided by the labels that were
scored, both are nats per label, as the loss that a model returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..costs.closed_form import unsplit_table_params
from ..running.shards import shape_of
from ..types import Axis, Plan, Scores
from .normaliser import TOKEN_COUNTS

LOSS_FACTORS: Mapping[str, float] = {"fisher": 0.5, "taylor": 1.0}
"""What a sum of scores is multiplied by to be a change of the loss sum."""


def settled(plan: Plan, model: nn.Module, axes: Sequence[Axis], scores: Scores) -> Plan:
    """The plan with its loss in nats where it is one, and with the costs after the cut."""
    shapes = {name: shape_of(parameter) for name, parameter in model.named_parameters()}
    costs = dict(plan.costs)
    if plan.layout == "per_layer":
        costs["params"] -= unsplit_table_params(axes, shapes, plan.counts())
    return with_prediction(replace(plan, costs=costs), scores)


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
    if metadata.get("normaliser") in TOKEN_COUNTS:
        return "token"
    return "example" if labels == _number(metadata, "examples") else "label"


def _number(metadata: Mapping[str, str], name: str) -> float:
    """A number of the metadata; NaN where it is missing or is none."""
    try:
        return float(metadata[name])
    except (KeyError, ValueError):
        return math.nan
