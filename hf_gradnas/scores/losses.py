"""The loss as a sum over examples: with labels of the data, or drawn from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..batches.batch import Batch, run_model
from ..errors import DataError
from ..running.copies import sent
from .normaliser import (
    IGNORED,
    TOKEN_COUNTS,
    count_labels,
    find_normaliser,
    is_likelihood,
    is_token_labels,
    loss_of,
    no_labels,
    own_loss,
)
from .rows import token_lengths


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
        drawn = [np.random.default_rng([self.seed, number]) for number in numbers]
        # An example's rows follow one another: codebooks have one each.
        each, rest = divmod(len(prediction.valid), batch.examples)
        if rest:
            raise DataError(
                f"Batch {batch.index}: found {len(prediction.valid)} rows of predictions for "
                f"{batch.examples} examples, needed as many for each; give labels and score with "
                'labels="data".'
            )
        streams = [stream for stream in drawn for _ in range(each)]
        logits = at_least_float32(prediction.logits)
        return prediction.distribution(logits, prediction.valid, streams), count


def at_least_float32(tensor: Tensor) -> Tensor:
    """Same values, without half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- labels drawn from what the model itself predicts ---------------------------------------------


# From logits (examples, positions, values), which positions count (on the CPU) and one random
# stream per example to minus the log-likelihood of the drawn labels, summed.
Distribution = Callable[[Tensor, Tensor, Sequence[np.random.Generator]], Tensor]

# Outputs that hold class logits, in the order in which they are looked for.
LOGITS = ("logits", "prediction_logits")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model predicts: ``(examples, positions, values)``, where, and how it is distributed.

    Attributes:
        logits: Logits of classes, or means.
        valid: ``(examples, positions)`` on the CPU; False for padding.
        distribution: What the labels are drawn from.
    """

    logits: Tensor
    valid: Tensor
    distribution: Distribution


def categorical(logits: Tensor, valid: Tensor, streams: Sequence[np.random.Generator]) -> Tensor:
    """One class per position."""
    targets = torch.full(valid.shape, IGNORED, device=logits.device)
    counts = valid.sum(1).tolist()
    drawn = np.concatenate([own.random(n) for own, n in zip(streams, counts, strict=True)])
    every_place = sent(valid.nonzero()[:, 1], logits.device).split(counts)
    every_draw = sent(torch.from_numpy(drawn), logits.device, logits.dtype).split(counts)
    for row, (places, draws) in enumerate(zip(every_place, every_draw, strict=True)):
        below = logits[row].detach().index_select(0, places).softmax(-1).cumsum(-1)
        classes = torch.searchsorted(below, (draws * below[:, -1])[:, None], right=True)
        targets[row, places] = classes.squeeze(1).clamp(max=logits.shape[-1] - 1)
    return functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def bernoulli(logits: Tensor, valid: Tensor, streams: Sequence[np.random.Generator]) -> Tensor:
    """One yes or no per position and value."""
    draws = _scattered(logits, valid, [stream.random for stream in streams])
    targets = (draws < logits.detach().sigmoid()).to(logits)
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return _at(losses, valid).sum()


def gaussian(logits: Tensor, valid: Tensor, streams: Sequence[np.random.Generator]) -> Tensor:
    """One real number of unit variance per position and value."""
    noise = _scattered(logits, valid, [stream.standard_normal for stream in streams])
    targets = logits.detach() + noise
    return 0.5 * _at(logits - targets, valid).square().sum()


def _at(values: Tensor, valid: Tensor) -> Tensor:
    """Values ``(valid positions, values)``; `valid` is on the CPU, and knows how many there are."""
    places = valid.flatten().nonzero()[:, 0]
    return values.flatten(0, 1).index_select(0, sent(places, values.device))


def _scattered(logits: Tensor, valid: Tensor, draws: Sequence[Callable[..., Any]]) -> Tensor:
    """Random numbers in the shape of `logits`, drawn for the valid positions of each example."""
    numbers = torch.zeros(logits.shape, dtype=logits.dtype)
    for row, draw in enumerate(draws):
        drawn = draw((int(valid[row].sum()), logits.shape[-1]))
        numbers[row, valid[row]] = torch.from_numpy(drawn).to(logits.dtype)
    return sent(numbers, logits.device)


def inputs_to_sample(model: PreTrainedModel, batch: Batch) -> tuple[dict[str, Any], Tensor | None]:
    """Inputs without labels, and which positions of the output are real ``(examples, seq)``.

    A decoder reads the labels shifted right, as in training, or else the text of the encoder.

    Raises:
        DataError: There is neither.
    """
    inputs = batch.inputs()
    if not model.config.is_encoder_decoder:
        return inputs, _mask(inputs.get("attention_mask"))
    if inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        return inputs, _mask(inputs.get("decoder_attention_mask"))
    text, mask = batch.columns.get("labels"), None
    if isinstance(text, Tensor) and is_token_labels(text):
        mask = text != IGNORED
    else:
        text, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    start = model.config.to_dict().get("decoder_start_token_id")
    if text is None and start is None:
        return inputs, None  # it decodes no tokens: a time series
    if text is None or start is None:
        raise DataError(
            f"Batch {batch.index}: the decoder of {type(model).__name__} has nothing to read "
            f"(columns: {', '.join(sorted(inputs))}; decoder_start_token_id: {start}); add "
            "decoder_input_ids, or labels to start from."
        )
    shifted = text.roll(1, dims=1)
    shifted[:, 0] = start
    padding = model.config.pad_token_id
    inputs["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, padding or 0)
    return inputs, _mask(mask)


def _mask(mask: Any) -> Tensor | None:
    return mask.cpu() != 0 if isinstance(mask, Tensor) else None


def predict(outputs: Any, model: PreTrainedModel, mask: Tensor | None) -> Prediction:
    """Read a model's prediction from its outputs.

    Args:
        outputs: What the forward returned.
        model: Its config tells several yes/no answers and regressions from classes.
        mask: Real positions ``(examples, seq)``; None: all.

    Raises:
        DataError: The outputs hold no real-valued tensor.
    """
    named = dict(outputs) if isinstance(outputs, Mapping) else dict(enumerate(outputs))
    if "start_logits" in named:
        spans = torch.stack((named["start_logits"], named["end_logits"]), 1)
        return _span(spans, mask)
    for name in LOGITS:
        if name in named:
            return _classes(named[name], model, mask)
    for key, value in named.items():
        if key != "loss" and isinstance(value, Tensor) and value.is_floating_point():
            return _positions(value, mask, gaussian)
    raise DataError(
        f"{type(model).__name__} returned {sorted(map(str, named))}, none of which is a prediction "
        'to sample labels from; give labels and score with labels="data".'
    )


def _span(spans: Tensor, mask: Tensor | None) -> Prediction:
    """Start and end ``(examples, 2, seq)``, never in the padding."""
    if mask is not None:
        padding = sent(~mask[:, None], spans.device)
        spans = spans.masked_fill(padding, torch.finfo(spans.dtype).min)
    return _positions(spans, None, categorical)


def _classes(logits: Tensor, model: PreTrainedModel, mask: Tensor | None) -> Prediction:
    config = model.config
    if logits.dim() == 2:  # noqa: PLR2004 - (examples, classes)
        if mask is not None and logits.shape == mask.shape and logits.shape[1] != config.num_labels:
            return _positions(logits[..., None], mask, bernoulli)  # one yes or no per token
        if config.problem_type == "multi_label_classification":
            return _positions(logits, mask, bernoulli)
        if config.problem_type == "regression":
            return _positions(logits, mask, gaussian)
    is_classes = logits.shape[-1] > 1 and logits.dim() <= 3  # noqa: PLR2004 - (…, seq, classes)
    return _positions(logits, mask, categorical if is_classes else gaussian)


def _positions(values: Tensor, mask: Tensor | None, distribution: Distribution) -> Prediction:
    """Bring values to ``(examples, positions, values)``."""
    values = values.flatten(1)[:, None] if values.dim() != 3 else values  # noqa: PLR2004
    if mask is None or mask.shape != values.shape[:2]:
        mask = torch.ones(values.shape[:2], dtype=torch.bool)
    return Prediction(values, mask, distribution)
