"""Strategy `binary`: the reference (NVIDIA ModelOpt's ``gradnas``).

Every block takes its cheapest option whose largest pruned score is at most a threshold, and the
smallest threshold that meets the budgets is found by bisection. Two differences: the bisection runs
over the thresholds that exist instead of to an absolute tolerance, so that the units of the scores
do not matter; and units that the threshold prunes but the budgets could keep stay.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .fill import fill_up
from .problem import Problem, Solution


def search_binary(problem: Problem) -> Solution | None:
    """Options at the smallest threshold that meets all budgets; None if no threshold does."""
    thresholds = np.unique(problem.worst[np.isfinite(problem.score)])
    low, high = 0, thresholds.size - 1
    if not problem.fits(problem.cheapest(thresholds[high])):
        return None
    while low < high:
        middle = (low + high) // 2
        if problem.fits(problem.cheapest(thresholds[middle])):
            high = middle
        else:
            low = middle + 1
    within = problem.worst <= thresholds[high]
    permitted = replace(problem, score=np.where(within, problem.score, np.inf))
    picks = fill_up(permitted, problem.cheapest(thresholds[high]))
    return Solution(picks, problem.score_of(picks))
