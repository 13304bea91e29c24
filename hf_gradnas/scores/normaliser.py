"""What a model divides its loss by, found numerically.

A batch's loss times its count ``c`` must be the sum of its examples' losses times their counts.
Which count that is (labels after the shift of causal models, labels, examples, or 1 for a loss
that is a sum) is measured on two short variants of one example, not looked up by class.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, GradNASWarning
from .batches import IGNORED, Batch
from .inputs import run_model

Count = Callable[[Tensor], int]


def _labels_after_shift(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


def _labels(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


def _examples(labels: Tensor) -> int:
    return labels.shape[0]


def _sum(labels: Tensor) -> int:
    return 1


# In order of preference, where a model's first batch cannot tell them apart.
TOKEN_COUNTS: dict[str, Count] = {"labels_after_shift": _labels_after_shift, "labels": _labels}
SUM = "sum"
EXAMPLE_COUNTS: dict[str, Count] = {"examples": _examples, SUM: _sum}
COUNTS: dict[str, Count] = {**TOKEN_COUNTS, **EXAMPLE_COUNTS}


def loss_of(outputs: Any, batch: Batch) -> Tensor:
    """Scalar loss that a model returned.

    Raises:
        DataError: There is none.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise DataError(
            f"Batch {batch.index}: the model returned no scalar loss for the columns "
            f"{sorted(batch.columns)} (labels: {', '.join(batch.labels)}); give the labels of its "
            'head, or score with labels="model".'
        )
    return loss.reshape(())


def count_labels(normaliser: str, batch: Batch) -> int:
    """Count ``c`` of a batch: its loss times ``c`` is the sum over its examples.

    Zero where every label is ignored.
    """
    labels = _counted(batch)
    if normaliser in TOKEN_COUNTS and not is_token_labels(labels):
        raise DataError(
            f"Batch {batch.index}: found labels of shape {tuple(labels.shape)} and "
            f"{labels.dtype}, needed one id per token as in the first batch; mend the data set."
        )
    return COUNTS[normaliser](labels)


def is_likelihood(batch: Batch) -> bool:
    """Whether the labels are one class each, so that the loss is their negative log-likelihood.

    Of a regression, or of several labels that share a loss, a squared gradient is no loss.
    """
    return len(batch.labels) == 1 and not _counted(batch).is_floating_point()


def _counted(batch: Batch) -> Tensor:
    """Label tensor that counts."""
    labels: Tensor = batch.columns[_counted_key(batch)]
    return labels


def _counted_key(batch: Batch) -> str:
    """Key of the labels that count: one id per token if there is such, else the first."""
    tensors = [key for key in batch.labels if isinstance(batch.columns[key], Tensor)]
    if not tensors:
        kinds = ", ".join(f"{k} as a {type(batch.columns[k]).__name__}" for k in batch.labels)
        raise DataError(
            f"Batch {batch.index}: found {kinds}, needed a tensor whose rows are the examples, by "
            'which the loss is shared out; give tensors, or score with labels="model".'
        )
    tokens = (key for key in tensors if is_token_labels(batch.columns[key]))
    return next(tokens, tensors[0])


def is_token_labels(labels: Tensor) -> bool:
    """Whether labels hold one id per token ``(examples, seq)``."""
    return labels.dim() == 2 and not labels.is_floating_point()  # noqa: PLR2004 - a matrix


@torch.no_grad()
def find_normaliser(model: nn.Module, batch: Batch) -> str:
    """Name of the count in `COUNTS` that the model divides its loss by.

    Raises:
        DataError: The loss is not finite.

    Warns:
        GradNASWarning: None fits (a loss with a part that is no mean over labels); ``examples``
            is then taken.
    """
    half = next(p for p in model.parameters() if p.is_floating_point()).element_size() <= 2  # noqa: PLR2004
    pair = _pair(model, batch, tries=4 if half else 1)
    losses = [_loss(model, part) for part in (pair, _row(pair, 0), _row(pair, 1))]
    if not math.isfinite(losses[0]):
        raise DataError(
            f"Batch {batch.index}: the loss is {losses[0]} for a single example of it; look for "
            "broken inputs, labels or weights, or load the model in float32 or bfloat16."
        )
    counts = COUNTS if is_token_labels(_counted(pair)) else EXAMPLE_COUNTS
    errors = {name: _error(pair, losses, name) for name in counts if count_labels(name, pair) > 0}
    best = min(errors.values())
    if not best <= (1e-2 if half else 1e-4):
        warnings.warn(
            f"The loss of {type(model).__name__} is no mean and no sum over labels or examples "
            f"(deviations {', '.join(f'{k} {v:.1g}' for k, v in errors.items())}): an example's "
            "loss is taken as the batch's loss times the number of examples, and scores may depend "
            "on the batch size; switch auxiliary losses off in the model's config.",
            GradNASWarning,
            stacklevel=2,
        )
        return "examples"
    return next(name for name, error in errors.items() if error <= best + 1e-5)


def _error(pair: Batch, losses: list[float], normaliser: str) -> float:
    """Relative deviation of ``L·c`` of both examples from the sum of each one's."""
    together, *alone = losses
    total = together * count_labels(normaliser, pair)
    parts = sum(loss * count_labels(normaliser, _row(pair, row)) for row, loss in enumerate(alone))
    error = abs(total - parts) / max(abs(total), abs(parts), 1e-30)
    return float("inf") if math.isnan(error) else error  # NaN: a variant without any label


def _loss(model: nn.Module, part: Batch) -> float:
    return float(loss_of(run_model(model, part.index, part.columns), part))


def _row(batch: Batch, row: int) -> Batch:
    return Batch(batch.index, batch.select([row]), 1, batch.labels)


def _pair(model: nn.Module, batch: Batch, *, tries: int) -> Batch:
    """One example twice, with different numbers of token labels if it has such.

    The first copy keeps the labels of the tokens 0 and 1, the second those of 1, 2 and 3, so that
    every count in `COUNTS` differs. Where both have the same mean loss, all counts fit: of several
    tries the lowest and the highest loss are taken (half precision needs that contrast).
    """
    row = _longest(batch)
    pair = Batch(batch.index, batch.select([row, row]), 2, batch.labels)
    labels = _counted(batch)
    if not is_token_labels(labels) or labels.shape[1] == 1:  # one label each has no variants
        return pair
    key = _counted_key(batch)

    def loss(kept: Tensor) -> float:
        columns = {**batch.select([row]), key: kept[None]}
        return _loss(model, Batch(batch.index, columns, 1, batch.labels))

    starts = [_first_labels(labels, row, shift) for shift in range(tries)]
    few = [_only(start, slice(0, 2)) for start in starts]
    more = [_only(start, slice(1, 4)) for start in starts]
    chosen = (min(few, key=loss), max(more, key=loss)) if tries > 1 else (few[0], more[0])
    return replace(pair, columns={**pair.columns, key: torch.stack(chosen)})


def _first_labels(labels: Tensor, row: int, shift: int) -> Tensor:
    """Labels ``(seq,)`` of a row, its first four filled or replaced by ids that occur."""
    found = labels[row].clone()
    ids = labels[labels != IGNORED].unique()
    ids = ids if len(ids) else labels.new_zeros(1)
    places = torch.arange(min(4, len(found)), device=ids.device)
    others = ids[(7 * places + 3 * shift) % len(ids)]
    is_kept = (found[: len(places)] != IGNORED) & (shift == 0)
    found[: len(places)] = torch.where(is_kept, found[: len(places)], others)
    return found


def _only(labels: Tensor, places: slice) -> Tensor:
    kept = torch.full_like(labels, IGNORED)
    kept[places] = labels[places]
    return kept


def _longest(batch: Batch) -> int:
    """Row of the example with the longest input, or else the most labels."""
    mask = batch.columns.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape[0] == batch.examples:
        return int(mask.flatten(1).sum(1).argmax())
    labels = _counted(batch)
    return int((labels != IGNORED).reshape(batch.examples, -1).sum(1).argmax())
