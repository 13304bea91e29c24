"""What every unit is worth: gradients of masks, collected in one pass over calibration data."""

from .collect import collect_scores
from .fingerprints import check_scores, model_fingerprint
from .methods import METHODS

__all__ = ["METHODS", "check_scores", "collect_scores", "model_fingerprint"]
