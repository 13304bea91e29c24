"""Scores for a run, over all processes: in passes of their own, or from the training's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..pruner import GradNASPruner
from ..running.processes import Processes
from ..scores.fingerprints import model_fingerprint
from ..scores.methods import chosen
from ..structure.sizes import Kept, lost_units
from ..types import Scores
from .riding import TrainingScores


def private_scores(
    pruner: GradNASPruner, batches: Iterable[Mapping[str, Any]], **options: Any
) -> Scores:
    """Score in passes of their own; `options` are arguments of `GradNASPruner.score`."""
    scores = pruner.score(batches, **options)
    return replace(scores, metadata={**scores.metadata, "source": "private"})


def training_scores(pruner: GradNASPruner, riding: TrainingScores, processes: Processes) -> Scores:
    """Scores of the training's own passes so far.

    Raises:
        DataError: There are none, or all are zero.
    """
    window = riding.sums()
    counts = torch.stack([window.examples, window.batches, window.skipped])
    found = processes.sum(torch.cat([window.totals, counts]).double().cpu().numpy())
    if not found[:-3].any():
        raise DataError(
            f"scores_from='training': all scores are zero after {found[-3]:.0f} examples of the "
            f"training ({found[-1]:.0f} batches were skipped: gradients not finite, or not seen); "
            "use scores_from='private'."
        )
    metadata = {
        "method": riding.method,
        "labels": "data",
        "source": "training",
        "normaliser": riding.normaliser,
        "examples": f"{found[-3]:.0f}",
        "batches": f"{found[-2]:.0f}",
        "skipped_batches": f"{found[-1]:.0f}",
        "processes": str(processes.count),
        "complete": "true",
        "model_fingerprint": model_fingerprint(pruner.model),
    }
    sums = found[:-3]
    choice = chosen(riding.method, sums, sum(axis.size for axis in riding.axes))
    held = {} if choice.power is None else {riding.method: sums}
    return Scores(riding.values(choice.scores), metadata | choice.metadata(), sums=held)


def without_lost(scores: Scores, pruner: GradNASPruner, kept: Kept) -> Scores:
    """Scores in which units that are pruned already are worth nothing."""
    lost = {axis.name: lost_units(axis, kept) for axis in pruner.structure.axes}

    def cleared(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        copies = {name: np.array(value) for name, value in values.items()}
        for name, units in lost.items():
            copies[name][units] = 0
        return copies

    also = {method: cleared(values) for method, values in scores.also.items()}
    return replace(scores, values=cleared(scores.values), also=also)
