"""Which of several plans is closest to the original, on calibration rows that were not scored.

Knows plans and how to try them; knows nothing of how they were made.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel

from ..batches.steps import HeldOut
from ..running.processes import Processes
from ..types import Plan
from .closeness import divergences

logger = logging.getLogger(__name__)

Masked = Callable[[Plan], AbstractContextManager[None]]


def closest(
    model: PreTrainedModel,
    held_out: HeldOut,
    plans: Sequence[Plan],
    masked: Masked,
    *,
    processes: Processes,
) -> Plan:
    """The plan of the lowest KL divergence KL(original ‖ masked), with those of all plans.

    One forward of the original and one of each plan over the rows that were held out. The first
    plan is taken, without any forward, where there is no other or no row; and, after them, where no
    divergence is finite.

    Args:
        model: The model, not cut.
        held_out: Batches that made none of the scores.
        plans: Of different scores.
        masked: Gives the context in which a plan is tried.
        processes: All that measure.

    Raises:
        DataError: The model predicts nothing.
    """
    if len(plans) == 1:
        return plans[0]
    tried: dict[str, float] = {}
    if held_out.examples:
        variants = [partial(masked, plan) for plan in plans]
        found = divergences(model, held_out.batches, variants, processes=processes)
        pairs = zip(plans, found, strict=True)
        tried = {plan.score: max(kl, 0.0) for plan, kl in pairs if math.isfinite(kl)}
    best = replace(min(plans, key=lambda plan: tried.get(plan.score, math.inf)), tried=tried)
    if processes.is_main:
        logger.log(logging.INFO if tried else logging.WARNING, "%s", say_tried(best))
    return best


def say_tried(plan: Plan) -> str:
    """Which scores were tried for a plan, and how far the model then is from the original."""
    if not plan.tried:
        return (
            f"score='auto': {plan.score} is taken untried, since no rows are held out from scoring "
            "(scores of a file, of the training, or of one batch), or the model predicts nothing "
            "finite on them."
        )
    shown = ", ".join(f"{name} {kl:.4g}" for name, kl in plan.tried.items())
    return (
        f"score='auto': {plan.score} is taken; KL to the original on held-out rows, in nats per "
        f"label: {shown}."
    )
