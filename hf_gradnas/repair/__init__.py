"""Repair: bring a cut model back towards the model that it was cut from."""

from .distillation import DistillationTrainer
from .objective import Distillation
from .recovery import Recovery, recover

__all__ = ["Distillation", "DistillationTrainer", "Recovery", "recover"]
