"""Repair: bring a pruned model back towards the model that it was, by algebra or by training.

Names are imported when they are first used, as the Trainer takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distillation import DistillationTrainer
    from .objective import Distillation
    from .recovery import Recovery, recover
    from .repairs import Repair, Site

__all__ = ["Distillation", "DistillationTrainer", "Recovery", "Repair", "Site", "recover"]

_HOME = {
    "Distillation": "objective",
    "DistillationTrainer": "distillation",
    "Recovery": "recovery",
    "Repair": "repairs",
    "Site": "repairs",
    "recover": "recovery",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
