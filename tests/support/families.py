"""What tests of many families share: structure that is found once, and families that wait."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import zoo

from hf_gradnas.types import Structure
from hf_gradnas.verification import find_structure

CORE = frozenset(
    "bert albert gpt2 gpt_neox llama phi3 t5 vit mixtral dots1 gpt_oss resnet convnextv2".split()
)
"""One of each way to write layers: shared, Conv1D, fused, grouped, routed, convolutions."""


def spread(names: Iterable[str]) -> list[Any]:
    """Parameters of a slow test: families of `CORE` always, the others where `long` ones run."""
    others = pytest.mark.long
    return [name if name in CORE else pytest.param(name, marks=others) for name in names]


@cache
def structure_of(name: str, *, layers: bool = False, **options: Any) -> Structure:
    """What is found in a family's tiny model (`zoo.build`), once in a process: equal models agree.

    Tests of finding and proving find anew.
    """
    model, inputs = zoo.build(name, **options)
    return find_structure(model, inputs, layers=layers)
