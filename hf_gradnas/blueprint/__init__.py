"""What a config alone says of a model: its axes, costs and lowest budgets, without its weights.

The model is built on the meta device. Structure is found and proved on a small one of the same
class, with few layers of each kind and few units, and carried over by shapes.
"""

from .find import Blueprint, find_blueprint
from .layers import NeedsWeightsError

__all__ = ["Blueprint", "NeedsWeightsError", "find_blueprint"]
