"""Prove that cutting equals masking, before anything is cut; what cannot be proved is refused."""

from .channels import find_channels, prove_channels
from .models import find_structure
from .modules import masked_against_cut, proved, trial_plans

__all__ = [
    "find_channels",
    "find_structure",
    "masked_against_cut",
    "prove_channels",
    "proved",
    "trial_plans",
]
