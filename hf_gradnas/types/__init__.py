"""Frozen data that the verbs of hf_gradnas take and return.

Knows names, indices and numbers; knows neither torch nor transformers. Tensors are named by their
full path in the model, as in ``state_dict()``.
"""

from .costs import Budget, CostModel, Product
from .documents import parse_json
from .plan_checks import check_indices, check_values, is_integer
from .plans import Plan, Scores
from .structure import (
    Attribute,
    Axis,
    Kind,
    Refusal,
    Removal,
    Slice,
    StockGroup,
    StockSpace,
    Structure,
    Tap,
)

__all__ = [
    "Attribute",
    "Axis",
    "Budget",
    "CostModel",
    "Kind",
    "Plan",
    "Product",
    "Refusal",
    "Removal",
    "Scores",
    "Slice",
    "StockGroup",
    "StockSpace",
    "Structure",
    "Tap",
    "check_indices",
    "check_values",
    "is_integer",
    "parse_json",
]
