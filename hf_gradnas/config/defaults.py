"""Names of scores, and the default that command, pruner and callback share."""

from __future__ import annotations

from typing import Final, Literal

Score = Literal[
    "auto", "tempered", "balanced", "fisher", "gradnas", "taylor", "magnitude", "random"
]
AUTO: Final = "auto"
"""The choice of the candidate whose plan is closest to the original on held-out rows."""
CANDIDATES: Final = ("tempered", "fisher")
"""What `AUTO` chooses between."""
DEFAULT_SCORE: Score = "tempered"
"""How units are scored where nothing else is asked for."""
GLOBAL_METHODS: Final = ("gradnas",)
"""Of these, gradients add up over a global batch before the formula is applied."""
MAX_SHARD_SIZE = "50GB"
"""Largest file of weights; as of Transformers' ``save_pretrained``."""
SIZE = r"(?=.*[1-9])\d+(\.\d+)?\s*[KMGTkmgt][Bb]"
"""A text that says a size."""
