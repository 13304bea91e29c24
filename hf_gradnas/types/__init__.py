"""Frozen data that the verbs of hf_gradnas take and return.

Knows names, indices and numbers; knows neither torch nor transformers. Tensors are named by their
full path in the model, as in ``state_dict()``. What needs NumPy is imported when it is first used,
so that the command line can refuse a slip without it.
"""

from typing import TYPE_CHECKING

from .._lazy import getter
from .basis import Basis
from .costs import (
    BYTES,
    COSTS,
    LATENCY,
    MEASURED,
    USUAL,
    Budget,
    CostModel,
    Curve,
    Product,
    Rate,
    Shared,
)
from .cuts import Copied, Cut
from .documents import REPAIR_MARK, metadata_of, parse_json, read_object
from .frontiers import MASKED, REPAIRED, STATES, Frontier, Point, is_frontier
from .kinds import KINDS, PARENTS, Kind, KindRow, Mask
from .latency_tables import LatencyTable, Phase, Timed, is_timed, table_fingerprint
from .places import MEMBER, Pattern, Role, Slice, Tap
from .plan_checks import check_indices, check_values, is_integer
from .prunable import Prunable
from .structure import (
    Adaptation,
    Attribute,
    Axis,
    Refusal,
    Removal,
    StockGroup,
    StockSpace,
    Structure,
)

if TYPE_CHECKING:
    from .former_names import present_plan, present_scores
    from .plans import Plan, Scores
    from .units import Units

__all__ = [
    "BYTES",
    "COSTS",
    "KINDS",
    "LATENCY",
    "MASKED",
    "MEASURED",
    "MEMBER",
    "PARENTS",
    "REPAIRED",
    "REPAIR_MARK",
    "STATES",
    "USUAL",
    "Adaptation",
    "Attribute",
    "Axis",
    "Basis",
    "Budget",
    "Copied",
    "CostModel",
    "Curve",
    "Cut",
    "Frontier",
    "Kind",
    "KindRow",
    "LatencyTable",
    "Mask",
    "Pattern",
    "Phase",
    "Plan",
    "Point",
    "Product",
    "Prunable",
    "Rate",
    "Refusal",
    "Removal",
    "Role",
    "Scores",
    "Shared",
    "Slice",
    "StockGroup",
    "StockSpace",
    "Structure",
    "Tap",
    "Timed",
    "Units",
    "check_indices",
    "check_values",
    "is_frontier",
    "is_integer",
    "is_timed",
    "metadata_of",
    "parse_json",
    "present_plan",
    "present_scores",
    "read_object",
    "table_fingerprint",
]

__getattr__ = getter(
    __name__,
    {
        "Plan": "plans",
        "Scores": "plans",
        "Units": "units",
        "present_plan": "former_names",
        "present_scores": "former_names",
    },
)
