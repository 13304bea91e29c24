"""What is left of a model at every budget: plans of many scores and subsets, measured."""

from .measure import Limits, measure_frontier, scores_file

__all__ = ["Limits", "measure_frontier", "scores_file"]
