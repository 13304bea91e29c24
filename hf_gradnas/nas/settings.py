"""Settings of the search of mode ``gradnas``: their defaults, and what they cannot be."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import DataError, GradNASWarning, PlanError
from ..types import is_integer
from .arguments import first_element

REDUCTIONS = ("max", "sum")
DEFAULTS: Mapping[str, Any] = {
    "checkpoint": None,
    "verbose": True,
    "forward_loop": None,
    "data_loader": None,
    "collect_func": None,
    "max_iter_data_loader": 128,
    "score_func": None,
    "loss_func": None,
    "deployment": None,
    "num_iters": None,
    "reduce": "max",
    "average_scores": False,
    "score_convergence_tol": None,
    "score_convergence_patience": 5,
    "score_convergence_min_updates": 10,
}
"""``deployment`` and ``num_iters`` change nothing; they are here so that old calls work."""


def sanitize(
    config: Mapping[str, Any], defaults: Mapping[str, Any], score_func: Callable[..., float]
) -> dict[str, Any]:
    """A complete copy of the settings (see `GradientBinarySearcher.sanitize_search_config`)."""
    if not isinstance(config, Mapping):
        raise PlanError(
            f"config: found {config!r:.60}, needed a dict with data_loader and loss_func, or None."
        )
    unknown = sorted(map(str, config.keys() - defaults.keys()))
    if {"score", "method"} & config.keys():
        raise PlanError(
            "config: score is no setting of the search, whose score is gradnas, with masks at the "
            "reference's places; for another one use GradNASPruner(model, score=…)."
        )
    if unknown:
        raise PlanError(
            f"config: {', '.join(unknown)} is no setting of the search; known are "
            f"{', '.join(defaults)}."
        )
    if config.get("score_func") is not None:
        warnings.warn(
            "config: score_func is not used by gradnas, whose score comes from gradients; "
            "leave it out.",
            GradNASWarning,
            stacklevel=3,
        )
    full = {**defaults, **config, "score_func": score_func}
    full["collect_func"] = full["collect_func"] or first_element
    _check_data(full)
    _check_numbers(full)
    return full


def _check_data(config: Mapping[str, Any]) -> None:
    if config["forward_loop"] is not None:
        raise DataError(
            "config: forward_loop cannot be used by gradnas, which needs every batch's loss; give "
            "data_loader, collect_func and loss_func."
        )
    for name, example in (
        ("data_loader", "an iterable of batches"),
        ("loss_func", "lambda output, batch: output.loss"),
    ):
        if config[name] is None:
            raise DataError(f"config: {name} is missing, needed for gradnas; give {example}.")
    if not isinstance(config["data_loader"], Iterable):
        raise DataError(
            f"config: data_loader is a {type(config['data_loader']).__name__}, needed an iterable "
            "of batches; give for example a torch.utils.data.DataLoader."
        )
    for name in ("loss_func", "collect_func"):
        if not callable(config[name]):
            raise PlanError(
                f"config: {name} is a {type(config[name]).__name__}, needed a function; give for "
                "example lambda output, batch: output.loss as loss_func."
            )


def _check_numbers(config: Mapping[str, Any]) -> None:
    if config["reduce"] not in REDUCTIONS:
        raise PlanError(f"config: reduce={config['reduce']!r}; choose one of {REDUCTIONS}.")
    limit = config["max_iter_data_loader"]
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise PlanError(
            f"config: max_iter_data_loader={limit!r}; give a number of batches of at least 1, or "
            "None for all."
        )
    if config["checkpoint"] is not None and not isinstance(config["checkpoint"], str | os.PathLike):
        raise PlanError(
            f"config: checkpoint={config['checkpoint']!r}; give the path of a file, or None."
        )
    tolerance = config["score_convergence_tol"]
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0 < tolerance < math.inf):
        raise PlanError(
            f"config: score_convergence_tol={tolerance!r}; give a relative change above 0, such as "
            "0.01, or None to read all batches."
        )
    for name in ("score_convergence_patience", "score_convergence_min_updates"):
        if not is_integer(config[name]) or config[name] < 0:
            raise PlanError(f"config: {name}={config[name]!r}; give a whole number of batches.")
    if not isinstance(config["average_scores"], bool):
        raise PlanError(
            f"config: average_scores={config['average_scores']!r:.60}; give True or False."
        )
