"""What a model divides its loss by, found numerically.

A batch's loss times its count ``c`` must be the sum of its examples' losses times their counts.
Which count that is (labels after the shift of causal models, labels, examples, or 1 for a loss
that is a sum) is measured on two short variants of one example, not looked up by class.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import find_labels

from ..batches.batch import IGNORED, Batch, run_model
from ..errors import DataError, GradNASWarning, first_line

_NOTHING = 1e-5  # relative to a loss: no difference, or no loss at all

Count = Callable[[Tensor], int]


def _labels_after_shift(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


def _labels(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


# In order of preference, where a model's first batch cannot tell them apart.
TOKEN_COUNTS: dict[str, Count] = {"labels_after_shift": _labels_after_shift, "labels": _labels}
SUM = "sum"
EXAMPLE_COUNTS = ("examples", SUM)
COUNTS = (*TOKEN_COUNTS, *EXAMPLE_COUNTS)
# Arguments from which a model computes a loss without labels: targets, or what to hide of an input.
TARGETS = (
    "return_loss",
    "future_values",
    "target_values",
    "bool_masked_pos",
    "mask_time_indices",
    "sampled_negative_indices",
)


def own_loss(model: nn.Module, batch: Batch) -> bool:
    """Whether a model computes a loss from a batch without labels, out of its inputs alone."""
    try:
        if _has_loss(model, _row(batch, 0)):
            return True
    except DataError:  # it may need several examples
        pass
    return _has_loss(model, batch)


@torch.no_grad()
def _has_loss(model: nn.Module, batch: Batch) -> bool:
    outputs = run_model(model, batch.index, batch.columns)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    return isinstance(loss, Tensor) and loss.numel() == 1


def no_labels(model: nn.Module, batch: Batch) -> DataError:
    """The error of a batch from which no loss comes."""
    taken = inspect.signature(model.forward).parameters
    names = [*find_labels(type(model)), *(name for name in TARGETS if name in taken)]
    takes = f"what it takes ({', '.join(names)})" if names else "a model with a head"
    if "labels" in names and "label" in batch.columns:
        takes += ", such as the column label under that name"
    return DataError(
        f"Batch {batch.index} has no labels (columns: {', '.join(sorted(batch.columns))}), and "
        f"{type(model).__name__} computes no loss without; give {takes}, or score with "
        'labels="model", which samples them from its own predictions.'
    )


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
    if normaliser in EXAMPLE_COUNTS:
        return 1 if normaliser == SUM else batch.examples
    labels = _counted(batch)
    if labels is None or not is_token_labels(labels):
        found = "none" if labels is None else f"of shape {tuple(labels.shape)} and {labels.dtype}"
        raise DataError(
            f"Batch {batch.index}: found labels {found}, needed one id per token as in the first "
            "batch; mend the data set."
        )
    return TOKEN_COUNTS[normaliser](labels)


def is_likelihood(batch: Batch) -> bool:
    """Whether the labels are one class each, so that the loss is their negative log-likelihood.

    Of a regression, or of several labels that share a loss, a squared gradient is no loss.
    """
    labels = _counted(batch)
    return len(batch.labels) == 1 and labels is not None and not labels.is_floating_point()


def _counted(batch: Batch) -> Tensor | None:
    """Label tensor that counts; None where there are no labels, or other ones than tensors."""
    key = _counted_key(batch)
    return None if key is None else batch.columns[key]


def _counted_key(batch: Batch) -> str | None:
    """Key of the labels that count: one id per token if there is such, else the first tensor."""
    tensors = [key for key in batch.labels if isinstance(batch.columns[key], Tensor)]
    tokens = (key for key in tensors if is_token_labels(batch.columns[key]))
    return next(tokens, next(iter(tensors), None))


def is_token_labels(labels: Any) -> bool:
    """Whether labels hold one id per token ``(examples, seq)``."""
    is_matrix = isinstance(labels, Tensor) and labels.dim() == 2  # noqa: PLR2004
    return is_matrix and not labels.is_floating_point()


@torch.no_grad()
def find_normaliser(model: nn.Module, batch: Batch, *, by_batch: bool = False) -> str:
    """Name of the count in `COUNTS` that the model divides its loss by.

    Args:
        model: The model.
        batch: A first batch.
        by_batch: Whether only whole batches' losses are used, so that any loss will do.

    Raises:
        DataError: The loss is not finite.

    Warns:
        GradNASWarning: None fits (a loss with a part that is no mean over labels, or one that
            compares examples), or the loss is not the same twice; ``examples`` is then taken.
    """
    if by_batch and _counted(batch) is None:
        return "examples"
    short = _shortened(batch)
    if short is not None:
        with suppress(DataError), warnings.catch_warnings():
            warnings.simplefilter("error", GradNASWarning)
            with suppress(GradNASWarning):
                return _found_on(model, short, is_sure=True)
    return _found_on(model, batch)


SHORT = 8
"""Tokens that are enough to tell counts of labels apart."""
TOKENS = ("input_ids", "labels", "decoder_input_ids")


def _shortened(batch: Batch) -> Batch | None:
    """The first tokens of all examples; None where there are no more, or padding is first.

    Where not just one count fits them, as where the last token decides, whole examples are run.
    """
    columns = batch.columns
    tokens = {
        value.shape[:2]
        for name in TOKENS
        if isinstance(value := columns.get(name), Tensor) and value.ndim > 1
        if value.shape[1] > SHORT
    }
    mask = columns.get("attention_mask")
    is_padded = isinstance(mask, Tensor) and not bool(mask.flatten(1)[:, :SHORT].all(1).any())
    if not tokens or is_padded or not batch.labels:
        return None
    cut = {
        name: value[:, :SHORT]
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] in tokens
        else value
        for name, value in columns.items()
    }
    return Batch(batch.index, cut, batch.examples, batch.labels)


@torch.no_grad()
def _found_on(model: nn.Module, batch: Batch, *, is_sure: bool = False) -> str:
    """As `find_normaliser`, on the longest example of a batch as it is.

    Raises:
        DataError: The loss is not finite; or `is_sure`, and several counts fit.
    """
    half = next(p for p in model.parameters() if p.is_floating_point()).element_size() <= 2  # noqa: PLR2004
    pair = _pair(model, batch, tries=4 if half else 1)
    try:
        losses = [_loss(model, part) for part in (pair, _row(pair, 0))]
        labels = _counted(pair)
        is_same = labels is not None and not is_token_labels(labels)  # the same example twice
        losses.append(losses[1] if is_same else _loss(model, _row(pair, 1)))
    except DataError as error:
        if _counted(batch) is not None:
            raise
        _warn_of_batches(
            model, f"cannot be had of single examples ({first_line(error.__cause__ or error)})", ""
        )
        return "examples"
    if not math.isfinite(losses[0]):
        raise DataError(
            f"Batch {batch.index}: the loss is {losses[0]} for a single example of it; look for "
            "broken inputs, labels or weights, or load the model in float32 or bfloat16."
        )
    again = losses[1] if batch.labels else _loss(model, _row(pair, 0))
    if abs(again - losses[1]) > _NOTHING * abs(again):
        _warn_of_draws(model, losses[1], again)
        return "examples"
    counts = COUNTS if is_token_labels(_counted(pair)) else EXAMPLE_COUNTS
    errors = {name: _error(pair, losses, name) for name in counts if count_labels(name, pair) > 0}
    best, limit = min(errors.values()), 1e-2 if half else 1e-4
    if is_sure and sum(error <= limit for error in errors.values()) > 1:
        raise DataError(f"Batch {batch.index}: several counts fit its first tokens; give longer.")
    if not best <= limit:
        found = f" (deviations {', '.join(f'{k} {v:.1g}' for k, v in errors.items())})"
        if max(map(abs, losses[1:])) <= _NOTHING * abs(losses[0]):
            what = "is none of an example alone, as it compares those of a batch"
            _warn_of_batches(model, what + found, "")
        else:
            what = "is no mean and no sum over labels or examples"
            _warn_of_batches(model, what + found, "switch auxiliary losses off, ")
        return "examples"
    return next(name for name, error in errors.items() if error <= best + 1e-5)


def _warn_of_draws(model: nn.Module, first: float, second: float) -> None:
    warnings.warn(
        f"{type(model).__name__} draws random numbers in evaluation (losses of one example: "
        f"{first:.4g}, then {second:.4g}), so that scores differ a little from run to run; give "
        "what it draws in the batch where its forward takes it (noise, bool_masked_pos).",
        GradNASWarning,
        stacklevel=3,
    )


def _warn_of_batches(model: nn.Module, what: str, advice: str) -> None:
    """Say what to do about a loss that is not the mean or sum of those of single examples."""
    warnings.warn(
        f"The loss of {type(model).__name__} {what}: an example's loss is taken as the "
        "batch's loss times the number of examples, and scores may depend on the batch size; "
        f"{advice}take score='gradnas', whose terms are whole batches, with batches of "
        "the training's size, or labels='model'.",
        GradNASWarning,
        stacklevel=3,
    )


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
    labels = _counted(batch)
    if labels is None:  # targets of any kind differ from example to example
        rows = [row, (row + 1) % batch.examples]
        return Batch(batch.index, batch.select(rows), 2, batch.labels)
    pair = Batch(batch.index, batch.select([row, row]), 2, batch.labels)
    if not is_token_labels(labels) or labels.shape[1] == 1:  # one label each has no variants
        return pair
    key = str(_counted_key(batch))

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
    if labels is None:
        return 0
    return int((labels != IGNORED).reshape(batch.examples, -1).sum(1).argmax())
