"""Measures loss and accuracy or perplexity of a model on labelled batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data.labels import IGNORED
from ..data.tasks import Head
from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int | None], None]
_PERPLEXITY = (Head.CAUSAL, Head.MASKED, Head.SEQ2SEQ)


@dataclass(frozen=True)
class Metrics:
    """Measured quality.

    Attributes:
        examples: Number of examples.
        loss: Mean over labels: one per example, or one per token that is not ignored.
        accuracy: Share of labels guessed right; None where there is no right or wrong.
        perplexity: ``exp(loss)`` of a language model, else None.
        agreement: Share of labels guessed right, where these are what the whole model predicts.
    """

    examples: int
    loss: float
    accuracy: float | None = None
    perplexity: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, float]:
        """JSON-ready, without what does not apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    head: Head,
    *,
    total: int | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """Run the model over all batches in eval mode, without gradients.

    Args:
        model: The model; its ``training`` flag is restored.
        batches: Dicts for ``model(**batch)`` with labels.
        head: Decides the metric.
        total: Number of examples, for `progress`.
        progress: Called with examples done and `total`.

    Raises:
        DataError: There is no label, or the loss is not finite; the message names the batch.
    """
    sums = _Sums()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for index, batch in enumerate(batches):
                _add_batch(sums, model, batch, head, index)
                if progress is not None:
                    progress(sums.examples, total)
    finally:
        model.train(was_training)
    if not sums.labels:
        raise DataError("evaluation: found no label to predict; give more or longer examples.")
    loss = sums.loss / sums.labels
    return Metrics(
        examples=sums.examples,
        loss=loss,
        accuracy=sums.right / sums.guesses if sums.guesses else None,
        perplexity=math.exp(min(loss, 700.0)) if head in _PERPLEXITY else None,
    )


@dataclass
class _Sums:
    examples: int = 0
    labels: int = 0
    loss: float = 0.0
    right: int = 0
    guesses: int = 0


def _add_batch(
    sums: _Sums, model: PreTrainedModel, batch: Mapping[str, Any], head: Head, index: int
) -> None:
    batch = {name: value.to(model.device) for name, value in batch.items()}
    outputs = model(**batch)
    size = next(iter(batch.values())).shape[0]
    loss = outputs.loss
    if loss is None or not torch.isfinite(loss):
        raise DataError(
            f"evaluation: the loss of batch {index} is {None if loss is None else loss.item()}, "
            "needed a finite number; check the labels, or use --dtype float32."
        )
    labels = batch.get("labels")
    count = _label_count(labels, head, size)
    sums.examples += size
    sums.labels += count
    sums.loss += float(loss) * count
    if labels is not None and head in (Head.CLASS, Head.TOKENS):
        right, guesses = _guesses(outputs.logits, labels)
        sums.right += right
        sums.guesses += guesses


def _label_count(labels: torch.Tensor | None, head: Head, examples: int) -> int:
    """What the model's mean loss is the mean of."""
    if labels is None or head in (Head.CLASS, Head.SPAN):
        return examples
    if head is Head.CAUSAL:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def _guesses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """Right guesses and guesses; of several labels at once all must be right."""
    if labels.is_floating_point():
        if labels.ndim == 1:
            return 0, 0  # a regression
        right = ((logits > 0) == (labels > 0.5)).all(dim=-1)  # noqa: PLR2004 - 0 or 1
        return int(right.sum()), len(right)
    counted = labels != IGNORED
    return int((logits.argmax(dim=-1) == labels)[counted].sum()), int(counted.sum())
