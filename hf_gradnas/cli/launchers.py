"""Which of how many processes this one is, by what its launcher says."""

from __future__ import annotations

import os

# What launchers set: torchrun and accelerate, Intel MPI, Open MPI, MVAPICH.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def process_count() -> int:
    """How many processes were launched."""
    return _number(SIZES, 1)


def is_main() -> bool:
    """Whether this process prints."""
    return _number(RANKS, 0) == 0


def _number(names: tuple[str, ...], default: int) -> int:
    """The first of these settings that is a number, as Accelerate reads them."""
    found = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in found if value.isdecimal()), default)
