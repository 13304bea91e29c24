"""The processes that ``accelerate launch`` or ``torchrun`` started the command in.

One started in the plain way stays alone: no process group is made for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..config.recipe import Recipe
from ..errors import RecipeError

if TYPE_CHECKING:
    from ..running.processes import Processes

# What launchers set: torchrun and accelerate, Intel MPI, Open MPI, MVAPICH.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_main() -> bool:
    """Whether this process prints, by what the launcher says."""
    return _number(RANKS, 0) == 0


def _number(names: tuple[str, ...], default: int) -> int:
    """The first of these settings that is a number, as Accelerate reads them."""
    found = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in found if value.isdecimal()), default)


@contextmanager
def launched(recipe: Recipe) -> Iterator[tuple[Recipe, Processes]]:
    """The recipe with the kind of device, and all processes; their group ends with the block.

    Raises:
        RecipeError: ``--device`` names one device for several processes.
    """
    from ..running.processes import Processes

    if _number(SIZES, 1) == 1:
        yield recipe, Processes()
        return
    import torch
    from accelerate import Accelerator

    if recipe.device not in (None, "cpu"):
        raise RecipeError(
            f"--device {recipe.device}: several processes were launched, and each takes a device "
            "of its own; omit --device, or give cpu."
        )
    # Without the flag, Accelerate takes processes on a machine without a GPU for single ones.
    accelerator = Accelerator(cpu=recipe.device == "cpu" or not torch.accelerator.is_available())
    try:
        # Its number stays out of the recipe; Accelerate has made it the process's current one.
        device = accelerator.device.type
        yield recipe.model_copy(update={"device": device}), Processes(accelerator)
    finally:
        accelerator.end_training()
