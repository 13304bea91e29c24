"""The widest floating-point type of a device: float64, where there is it.

Sums and counts are taken in it. Knows devices; knows nothing of what is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; MPS does not, nor do some of Intel's (XPU)."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def widest(device: torch.device) -> torch.dtype:
    """The type of a device in which sums lose least."""
    return torch.float64 if has_float64(device) else torch.float32


def wide(values: Tensor) -> Tensor:
    """Same values in float64; as they are where the device has none."""
    return values.double() if has_float64(values.device) else values
