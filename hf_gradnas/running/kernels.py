"""Attention kernels that a model runs, and what is known of them.

What can go is proved in float64 with eager attention and sdpa. Other kernels (flash_attention_2,
flex_attention, those of a hub) have no float64, or no backward everywhere, so that users are told.
"""

from __future__ import annotations

import warnings

from torch import nn

from .._compat import configs_of
from ..errors import GradNASWarning, StructureError
from .offloading import device_of

TESTED = ("eager", "sdpa")
FORWARD_ONLY = {"flex_attention": "cpu"}
"""Kernels that PyTorch has no backward of, on a kind of device."""
ADVICE = "load it with attn_implementation='sdpa', or call set_attn_implementation('sdpa')"


def untested_kernels(model: nn.Module) -> list[str]:
    """Names of the attention kernels of a model that are none of `TESTED`."""
    found = (getattr(config, "_attn_implementation", None) for config in configs_of(model))
    return sorted({kernel for kernel in found if kernel and kernel not in TESTED})


def warn_of_kernels(model: nn.Module) -> None:
    """Say which kernels a model is not proved with.

    Warns:
        GradNASWarning: There are such.
    """
    found = untested_kernels(model)
    if found:
        warnings.warn(
            f"Attention runs {' and '.join(found)}: what can go is proved with eager attention and "
            "sdpa, not with that. A model that is cut in memory is compared with the masked one as "
            f"it runs, before it is saved; to run a kernel that is proved, {ADVICE}.",
            GradNASWarning,
            stacklevel=3,
        )


def check_backward(model: nn.Module) -> None:
    """Check that a model's kernels have a backward where it is.

    Raises:
        StructureError: One has none.
    """
    place = device_of(model).type
    for kernel in untested_kernels(model):
        if FORWARD_ONLY.get(kernel) == place:
            raise StructureError(
                f"{type(model).__name__}: attention runs {kernel}, which PyTorch has no gradients "
                f"of on the {place.upper()}, and scores are made of them; {ADVICE}."
            )
