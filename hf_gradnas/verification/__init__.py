"""Prove that cutting equals masking, before anything is cut; what cannot be proved is refused."""

from .models import find_structure, proved
from .proof import prove_channels, trial_plans
from .trial import Trial

__all__ = ["Trial", "find_structure", "prove_channels", "proved", "trial_plans"]
