"""Strategy `binary`: the reference (NVIDIA ModelOpt's ``gradnas``).

The degradation of an axis is the sum of its pruned scores. Every block takes its cheapest option
that degrades none of its axes by more than a threshold, and the smallest threshold that meets the
budgets is found by bisection. Two differences: the bisection runs over the thresholds that exist
instead of to an absolute tolerance, so that the units of the scores do not matter; and units that
the threshold prunes but the budgets could keep stay (not with ``fill=False``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .lagrangian import fill_up
from .space import Problem, Solution


def search_binary(problem: Problem, *, fill: bool = True) -> Solution | None:
    """Options at the smallest threshold that meets all budgets; None if no threshold does.

    Args:
        problem: The problem.
        fill: Keep what still fits beside the threshold's own plan, within the threshold.
    """
    thresholds = np.unique(problem.degradation[np.isfinite(problem.score)])
    low, high = 0, thresholds.size - 1
    if not problem.fits(problem.cheapest(thresholds[high])):
        return None
    while low < high:
        middle = (low + high) // 2
        if problem.fits(problem.cheapest(thresholds[middle])):
            high = middle
        else:
            low = middle + 1
    picks = problem.cheapest(thresholds[high])
    if fill:
        within = problem.degradation <= thresholds[high]
        permitted = replace(problem, score=np.where(within, problem.score, np.inf))
        picks = fill_up(permitted, picks)
    return Solution(picks, problem.score_of(picks))
