"""Says what was done to a model: a summary, tables, pictures and a model card.

Takes plans, scores and numbers as data; knows no model and writes no file.
"""

from .card import FOLDER, address, report_files
from .headline import final_metric, headline, say_kept
from .layers import merge_layers
from .metadata import Origin, fetch_card, find_origin, is_hub_id
from .sentences import (
    in_one_line,
    python_string,
    say_prediction,
    say_repair,
    say_skipped,
    say_stock,
    say_swap,
)
from .summary import AxisWidth, CostChange, Latency, Summary, summarise

__all__ = [
    "FOLDER",
    "AxisWidth",
    "CostChange",
    "Latency",
    "Origin",
    "Summary",
    "address",
    "fetch_card",
    "final_metric",
    "find_origin",
    "headline",
    "in_one_line",
    "is_hub_id",
    "merge_layers",
    "python_string",
    "report_files",
    "say_kept",
    "say_prediction",
    "say_repair",
    "say_skipped",
    "say_stock",
    "say_swap",
    "summarise",
]
