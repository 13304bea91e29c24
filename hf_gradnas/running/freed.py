"""What was used for a while, given back to the system.

Knows C libraries; nothing of what the memory was used for.
"""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Give what is free back to the system, between two steps.

    glibc keeps blocks of up to 32 MiB that were freed for later; half of a model of 130 million
    parameters, measured after its scores. Elsewhere nothing is done but to collect what is unused.
    """
    gc.collect()
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # not musl's
            library.malloc_trim(0)
