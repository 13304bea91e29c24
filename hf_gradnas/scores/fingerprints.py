"""Fingerprints: which model scores belong to, and whether they fit its axes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple

import numpy as np
from torch import nn

from ..batches.batch import tensor_bytes
from ..errors import ScoresError
from ..running.offloading import Weights
from ..running.processes import Processes
from ..types import Axis, Scores, Tap, present_scores
from .methods import METHODS

SAMPLED_VALUES = 1024  # per parameter: cheap for 7B, and no training step leaves them all alone


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and evenly strided values of every parameter."""
    state, weights = hashlib.sha256(), Weights(model)
    for name in weights.once():
        tensor = weights[name]
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        stride = max(1, -(-tensor.numel() // SAMPLED_VALUES))
        state.update(tensor_bytes(tensor.flatten()[::stride]))
    return state.hexdigest()


def axes_fingerprint(axes: Iterable[Axis]) -> str:
    """SHA-256 over what scores depend on: names, sizes and places of the axes."""
    places = [[axis.name, axis.size, *_place(axis)] for axis in axes]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()


def _place(axis: Axis) -> list[object]:
    """Where the units of an axis are, in the words of the first format of scores.

    It named the first module and its values per unit, and the taps where they say more than that
    the units are a module's whole input, in order.
    """
    module, width = axis.taps[0].module, axis.width
    is_whole_input = axis.taps == (Tap(module, "input", -1, width, 0, width),)
    return [module, width, *([] if is_whole_input else map(astuple, axis.taps))]


def check_same_everywhere(model: str, settings: Mapping[str, object], processes: Processes) -> None:
    """Check that all processes score the same, given the fingerprint of the model.

    Raises:
        ScoresError: A process holds other weights, or was given other settings.
    """
    found = processes.gather_objects({"weights": model, **settings})
    for index, other in enumerate(found):
        wrong = [name for name, value in found[0].items() if other[name] != value]
        if wrong:
            raise ScoresError(
                f"Scores: process {index} has other {' and '.join(wrong)} than process 0, so that "
                "their sum means nothing; load the same checkpoint on all processes, seed what is "
                "initialised anew (accelerate.utils.set_seed), and give the same arguments."
            )


def check_scores(scores: Scores, model: nn.Module, axes: Sequence[Axis]) -> Scores:
    """Check that scores are complete, of this very model, and fit its axes.

    Returns:
        The scores by the present names of the axes.

    Raises:
        ScoresError: They are not, or do not.
    """
    if scores.metadata.get("complete") != "true":
        raise ScoresError(
            f"Scores: scoring broke off after {scores.metadata.get('examples', 'no')} examples; "
            "run it again with the same file, and it goes on from there."
        )
    found, needed = scores.metadata.get("model_fingerprint", ""), model_fingerprint(model)
    if found != needed:
        raise ScoresError(
            f"Scores: they belong to another model (fingerprint {found[:12]}…, this "
            f"{type(model).__name__} has {needed[:12]}…); score this model, in the dtype that it "
            "is pruned in."
        )
    for method in (scores.metadata.get("method", "fisher"), *scores.also):
        if method not in METHODS:
            raise ScoresError(
                f"Scores: their method is {method!r:.40}, known are {', '.join(METHODS)}; score "
                "the model again."
            )
    if scores.format_version == 1:  # of version 0.1
        scores = present_scores(scores, axes)
    check_values(scores, axes)
    return scores


def check_values(scores: Scores, axes: Sequence[Axis]) -> None:
    """Check that scores hold one finite real number per unit of every axis, for every method.

    Raises:
        ScoresError: They do not.
    """
    held = (scores.values, *scores.also.values())
    for axis, values in ((axis, found.get(axis.name)) for found in held for axis in axes):
        if not isinstance(values, np.ndarray) or values.shape != (axis.size,):
            found = str(values.shape) if isinstance(values, np.ndarray) else type(values).__name__
            shape = "none" if values is None else found
            raise ScoresError(
                f"{axis.name}: the scores hold {shape} for this axis, needed ({axis.size},); "
                "score the model again."
            )
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            found = "numbers that are not finite" if values.dtype.kind == "f" else str(values.dtype)
            raise ScoresError(
                f"{axis.name}: the scores hold {found}, needed finite floating-point numbers; "
                "score the model again."
            )


def joint_digest(digests: Sequence[str]) -> str:
    """One digest for those of all processes; that of a single process as it is."""
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    )
