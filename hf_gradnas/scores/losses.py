"""The loss as a sum over examples: with the labels of the data, or with sampled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..batches.batch import Batch
from ..batches.inputs import run_model
from .normaliser import (
    TOKEN_COUNTS,
    count_labels,
    find_normaliser,
    is_likelihood,
    loss_of,
    no_labels,
    own_loss,
)
from .rows import token_lengths
from .sampling import inputs_to_sample, predict


class Objective(Protocol):
    """From a batch and the running number of its first example to loss sum and label count."""

    model: nn.Module
    normaliser: str
    is_likelihood: bool

    @property
    def is_per_token(self) -> bool:
        """Whether there is one label per token."""

    def prepare(self, batch: Batch) -> None:
        """Find the normaliser on a first batch."""

    def __call__(self, batch: Batch, first: int) -> tuple[Tensor | None, int]:
        """Sum of the examples' losses, None where there is no label, and the count of labels."""


class DataLoss:
    """Sum of the examples' losses with the labels of the data, or as the model has one without.

    Args:
        model: The model.
        normaliser: As the attribute.
        by_batch: Whether only whole batches' losses are used.

    Attributes:
        normaliser: Name of the count that the model divides by; found on the first batch if empty.
        is_likelihood: Whether the latest batch's loss is a negative log-likelihood, in nats.
    """

    def __init__(self, model: nn.Module, normaliser: str, *, by_batch: bool = False) -> None:
        self.model = model
        self._by_batch = by_batch
        self.normaliser = normaliser
        self.is_likelihood = True
        self._has_own: bool | None = None  # a loss without labels; None: not known yet

    @property
    def is_per_token(self) -> bool:
        """Whether there is one label per token; False before the normaliser is known."""
        return self.normaliser in TOKEN_COUNTS

    def prepare(self, batch: Batch) -> None:
        """Find the normaliser, unless it is known.

        Raises:
            DataError: The batch has no labels, or the model returns no loss.
        """
        if not batch.labels:
            if self._has_own is None:
                self._has_own = own_loss(self.model, batch)
            if not self._has_own:
                raise no_labels(self.model, batch)
        self.is_likelihood = is_likelihood(batch)
        if not self.normaliser:
            self.normaliser = find_normaliser(self.model, batch, by_batch=self._by_batch)

    def __call__(self, batch: Batch, first: int) -> tuple[Tensor | None, int]:
        """Loss sum of a batch and the count of its labels.

        Raises:
            DataError: The batch has no labels, or the model returns no loss.
        """
        self.prepare(batch)
        count = count_labels(self.normaliser, batch)
        if not count:
            return None, 0
        loss = loss_of(run_model(self.model, batch.index, batch.columns), batch)
        return at_least_float32(loss) * count, count


class SampledLoss:
    """Sum of the examples' losses with labels drawn from the model's own predictions.

    Each example draws from its own random stream, so that nothing depends on the batch size.

    Args:
        model: The model.
        seed: Of the streams.
        number: From the place of an example among the batches to its number, which decides its
            stream; None: they are the same.

    Attributes:
        is_per_token: Whether the latest batch had one label per token; True before the first one.
    """

    normaliser = "sampled_labels"
    is_likelihood = True

    def __init__(
        self, model: nn.Module, seed: int, number: Callable[[int], int] | None = None
    ) -> None:
        self.model = model
        self.seed = seed
        self._number = number
        self.is_per_token = True

    def prepare(self, batch: Batch) -> None:
        """Nothing: the drawn labels are counted."""

    def __call__(self, batch: Batch, first: int) -> tuple[Tensor | None, int]:
        """Loss sum of a batch and the number of labels drawn.

        Raises:
            DataError: A decoder has nothing to read, or the model predicts nothing.
        """
        inputs, mask = inputs_to_sample(self.model, batch)
        outputs = run_model(self.model, batch.index, inputs)
        prediction = predict(outputs, self.model, mask)
        self.is_per_token = prediction.valid.shape[1] in token_lengths(inputs)
        count = int(prediction.valid.sum())
        if not count:
            return None, 0
        places = range(first, first + batch.examples)
        numbers = places if self._number is None else map(self._number, places)
        streams = [np.random.default_rng([self.seed, number]) for number in numbers]
        logits = at_least_float32(prediction.logits)
        return prediction.distribution(logits, prediction.valid, streams), count


def at_least_float32(tensor: Tensor) -> Tensor:
    """Same values, without half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
