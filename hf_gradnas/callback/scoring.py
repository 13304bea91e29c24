"""Scores for a run, over all processes: in passes of their own, or from the training's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from ..errors import DataError
from ..pruner import GradNASPruner
from ..scores.fingerprints import model_fingerprint
from ..scores.methods import WEIGHT_METHODS
from ..structure.sizes import Kept, lost_units
from ..types import Scores
from .riding import TrainingScores


def processes() -> tuple[int, int]:
    """Number of this process, and of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def summed(values: Tensor) -> Tensor:
    """Sum over all processes."""
    if processes()[1] > 1:
        distributed.all_reduce(values)
    return values


def from_main(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The main process's batch: costs depend on its length, and plans must be the same."""
    if processes()[1] == 1:
        return batch
    columns = {key: v.cpu() if isinstance(v, Tensor) else v for key, v in batch.items()}
    found = [columns]
    distributed.broadcast_object_list(found)
    return found[0]


def private_scores(
    pruner: GradNASPruner,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_examples: int | None,
    labels: str,
    seed: int,
) -> Scores:
    """Score in passes of their own, each process its share of the batches."""
    _, world = processes()
    share = None if num_examples is None else -(-num_examples // world)
    scores = pruner.score(batches, num_examples=share, labels=labels, seed=seed)
    if world == 1 or pruner.score_method in WEIGHT_METHODS:
        return scores
    device = pruner.model.device
    names = sorted(scores.values)
    parts = [torch.as_tensor(scores.values[name], dtype=torch.float64) for name in names]
    counts = [float(scores.metadata[key]) for key in ("examples", "batches")]
    found = summed(torch.cat([*parts, torch.tensor(counts).double()]).to(device)).cpu().numpy()
    ends = np.cumsum([len(part) for part in parts])
    metadata = {
        **scores.metadata,
        "examples": f"{found[-2]:.0f}",
        "batches": f"{found[-1]:.0f}",
        "processes": str(world),
        "source": "private",
    }
    pairs = zip(names, parts, ends, strict=True)
    return Scores({name: found[end - len(part) : end] for name, part, end in pairs}, metadata)


def training_scores(pruner: GradNASPruner, riding: TrainingScores) -> Scores:
    """Scores of the training's own passes so far.

    Raises:
        DataError: There are none, or all are zero.
    """
    sums = riding.sums()
    counts = torch.stack([sums.examples, sums.batches, sums.skipped])
    found = summed(torch.cat([sums.totals, counts])).double().cpu().numpy()
    if not found[:-3].any():
        raise DataError(
            f"scores_from='training': all scores are zero after {found[-3]:.0f} examples of the "
            f"training ({found[-1]:.0f} batches were skipped, since a gradient was not finite); "
            "use scores_from='private'."
        )
    metadata = {
        "method": pruner.score_method,
        "labels": "data",
        "source": "training",
        "normaliser": riding.normaliser,
        "examples": f"{found[-3]:.0f}",
        "batches": f"{found[-2]:.0f}",
        "skipped_batches": f"{found[-1]:.0f}",
        "processes": str(processes()[1]),
        "complete": "true",
        "model_fingerprint": model_fingerprint(pruner.model),
    }
    return Scores(riding.values(found[:-3]), metadata)


def without_lost(scores: Scores, pruner: GradNASPruner, kept: Kept) -> Scores:
    """Scores in which units that are pruned already are worth nothing."""
    values = {name: np.array(value) for name, value in scores.values.items()}
    for axis in pruner.structure.axes:
        values[axis.name][lost_units(axis, kept)] = 0
    return replace(scores, values=values)
