"""From a data set to batches for a model: tasks, columns, labels, encoders, media."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import getter

if TYPE_CHECKING:
    from .feeds import calibration_batches

__all__ = ["calibration_batches"]

__getattr__ = getter(__name__, {"calibration_batches": "feeds"})
