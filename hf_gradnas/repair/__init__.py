"""Repair: bring a pruned model back towards the model that it was, by algebra or by training.

Names are imported when they are first used, as the Trainer takes seconds to import.
"""

from typing import TYPE_CHECKING

from .._lazy import getter

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

__getattr__ = getter(__name__, _HOME)
