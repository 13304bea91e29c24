"""What a pass is asked for: its arguments, checked, and the settings that its scores depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, cast

from ..batches.steps import HELD_OUT_EVERY
from ..config.defaults import GLOBAL_METHODS
from ..errors import ScoresError, check_choice
from ..running.processes import Processes
from ..types import Axis, is_integer
from ..types.plans import POWERS
from .fingerprints import axes_fingerprint
from .methods import GRADIENT_METHODS, METHODS, ROW_METHODS, WEIGHT_METHODS

LABELS = ("data", "model")
MASK_PLACES = {"input": "out_projection_input", "output": "producer_output"}


def check_arguments(seed: object, file: object, progress: object) -> None:
    """Check what would fail only after the first batch was scored."""
    is_seed = is_integer(seed) and cast(int, seed) >= 0
    for name, is_right, found, needed in (
        ("seed", is_seed, seed, "a whole number of 0 or more"),
        ("file", isinstance(file, str | PathLike | None) and file != "", file, "a path or None"),
        ("progress", progress is None or callable(progress), progress, "a function or None"),
    ):
        if not is_right:
            raise ScoresError(f"{name}={found!r:.80}: needed {needed}; give that, or omit it.")


def check_methods(method: str, also: Sequence[str]) -> tuple[str, ...]:
    """All methods of a pass, checked.

    Raises:
        ScoresError: One is unknown, named twice, or needs no pass.
    """
    check_choice("method", method, METHODS, ScoresError)
    if isinstance(also, str) or not isinstance(also, Sequence):
        raise ScoresError(
            f"also={also!r:.80}: needed a list of methods; give also=[…], or omit it."
        )
    if not also:
        return (method,)
    methods = (method, *also)
    for name in methods:
        check_choice("also", name, GRADIENT_METHODS, ScoresError)
    if len(set(methods)) < len(methods):
        raise ScoresError(f"method={method!r}, also={also!r}: found one twice; name each once.")
    return methods


def settings_of(
    axes: Sequence[Axis],
    methods: Sequence[str],
    labels: str,
    num_examples: int | None,
    seed: int,
    processes: Processes,
    *,
    held_out: bool = False,
) -> dict[str, Any]:
    """Everything that scores depend on besides model and data; the seed only where it is used.

    Raises:
        ScoresError: An unknown choice.
    """
    check_choice("labels", labels, LABELS, ScoresError)
    method, *also = methods
    is_global = any(name in GLOBAL_METHODS for name in methods)
    return {
        "accumulation_steps": processes.accumulation_steps if is_global else 1,
        "also": also,
        "axes": axes_fingerprint(axes),
        "held_out_every": HELD_OUT_EVERY if held_out else None,
        "labels": labels,
        "mask_place": _mask_place(axes),
        "method": method,
        "num_examples": num_examples,
        POWERS: _powers(methods),
        "processes": 1 if method in WEIGHT_METHODS else processes.count,
        "seed": seed if labels == "model" or method == "random" else None,
    }


def _powers(methods: Iterable[str]) -> dict[str, list[float]] | None:
    """Between which powers of norms methods choose; None where none does, as in files of 0.1."""
    powers = {name: list(ROW_METHODS[name]) for name in methods if name in ROW_METHODS}
    return {name: found for name, found in powers.items() if len(found) > 1} or None


def _mask_place(axes: Iterable[Axis]) -> str:
    """Where the masks of the axes stand, in the order of `MASK_PLACES`."""
    sides = {tap.side for axis in axes for tap in axis.taps}
    return ",".join(place for side, place in MASK_PLACES.items() if side in sides)
