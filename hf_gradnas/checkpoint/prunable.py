"""Finds everything that a plan for one model is made from, by one verb, before any scoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ..batches.longest import flops_inputs
from ..config.rules import Rules, rule_for
from ..costs.counting import counted
from ..stock.space import find_stock_space, layout_for
from ..types import Prunable, StockSpace, Structure
from ..verification import find_structure
from .rehearsal import rehearsed


def find_prunable(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    layout: str = "auto",
    rules: Rules | None = None,
    flops_length: int | None = None,
) -> Prunable:
    """Find, prove and rehearse the axes, decide the layout, and count the costs.

    Args:
        model: A Transformers model, its weights on one device; it is left as it was.
        batch: Keyword arguments of its forward, on its device.
        layout: ``"auto"``, ``"stock"`` or ``"per_layer"``.
        rules: What must stay; globs that match nothing do nothing.
        flops_length: Tokens of the one sequence that FLOPs are counted for; None: the batch's.

    Raises:
        DataError: The model cannot run the batch.
        PlanError: Layout ``"stock"`` was asked for, and the class can express nothing.
        StructureError: Nothing can be pruned.
    """
    rules = rules or {}

    def decide(structure: Structure) -> tuple[StockSpace, str, str]:
        space = find_stock_space(model, structure)
        allowed = [axis for axis in structure.axes if rule_for(axis.module, rules) is not None]
        return space, *layout_for(space, allowed, requested=layout)

    structure, space, chosen, reason = rehearsed(model, find_structure(model, batch), batch, decide)
    sample = flops_inputs(batch, flops_length, decoder=bool(model.config.is_encoder_decoder))
    return counted(model, structure, sample, space=space, layout=chosen, reason=reason)
