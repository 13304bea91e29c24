"""Frozen data that the verbs of hf_gradnas take and return.

Knows names, indices and numbers; knows neither torch nor transformers. Tensors are named by their
full path in the model, as in ``state_dict()``. What needs NumPy is imported when it is first used,
so that the command line can refuse a slip without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .costs import Budget, CostModel, Product
from .documents import REPAIR_MARK, metadata_of, parse_json, read_object
from .frontiers import MASKED, REPAIRED, STATES, Frontier, Point, is_frontier
from .plan_checks import check_indices, check_values, is_integer
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

if TYPE_CHECKING:
    from .plans import Plan, Scores

__all__ = [
    "MASKED",
    "REPAIRED",
    "REPAIR_MARK",
    "STATES",
    "Attribute",
    "Axis",
    "Budget",
    "CostModel",
    "Frontier",
    "Kind",
    "Plan",
    "Point",
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
    "is_frontier",
    "is_integer",
    "metadata_of",
    "parse_json",
    "read_object",
]


def __getattr__(name: str) -> Any:
    if name not in ("Plan", "Scores"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.plans"), name)
    globals()[name] = value
    return value
