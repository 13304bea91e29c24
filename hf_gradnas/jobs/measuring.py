"""Measures a model before and after the cut; warns where it lost much, or knew nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..batches.batch import to_device
from ..config.limits import milder
from ..data.examples import make_loader
from ..data.labels import IGNORED
from ..data.tasks import Head
from ..errors import DataError
from ..report.sentences import what_was_lost
from ..running.offloading import device_of
from ..running.states import evaluating
from ..types import Budget
from .report import Progress, Report

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..data.feeds import Evaluation
    from ..data.loading import Source

Batches = Iterable[Mapping[str, Any]]


def evaluation_batches(
    evaluation: Evaluation, source: Source, model: PreTrainedModel, *, batch_size: int
) -> Batches:
    """Labelled batches to measure on, with the labels that `model` itself predicts where asked."""
    loader = make_loader(evaluation.examples, source, model, batch_size=batch_size)
    return own_labels(model, loader) if evaluation.by_model else loader


def own_labels(model: PreTrainedModel, batches: Batches) -> list[dict[str, Any]]:
    """The batches with the model's predictions as labels; its ``training`` flags are restored."""
    labelled = []
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**to_device(inputs, model)).logits
            labels = _predicted(logits, inputs.get("attention_mask"), model)
            labelled.append({**inputs, "labels": labels.cpu()})
    return labelled


def _predicted(
    logits: torch.Tensor, mask: torch.Tensor | None, model: PreTrainedModel
) -> torch.Tensor:
    if model.config.problem_type == "multi_label_classification":
        return (logits > 0).to(logits.dtype)
    labels = logits.argmax(-1)
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask.to(labels.device) == 0, IGNORED)
    return labels


def measure(
    model: PreTrainedModel,
    batches: Batches | None,
    evaluation: Evaluation | None,
    head: Head,
    report: Report,
    what: str,
) -> Metrics | None:
    """Loss and metric of a model; None where there is nothing to measure on."""
    if batches is None or evaluation is None:
        return None
    with report.progress(what) as progress:
        return metrics_of(model, batches, evaluation, head, progress=progress)


def metrics_of(
    model: PreTrainedModel,
    batches: Batches,
    evaluation: Evaluation,
    head: Head,
    *,
    progress: Progress | None = None,
) -> Metrics:
    """Loss and metric of a model; what it predicted itself is agreement, not accuracy."""
    found = evaluate(model, batches, head, total=len(evaluation.examples), progress=progress)
    if evaluation.by_model:
        return replace(found, accuracy=None, agreement=found.accuracy)
    return found


def warn_of_loss(
    report: Report,
    before: Metrics,
    after: Metrics,
    budgets: Sequence[Budget],
    *,
    recovered: bool = False,
) -> None:
    """Warn where much was lost, and name the ways out."""
    lost = what_was_lost(before.to_dict(), after.to_dict())
    if lost:
        train = "train it longer" if recovered else "train the pruned model"
        other = " ".join(f"--target {b.cost}={milder(b.ratio)}" for b in budgets)
        epochs = "--recover-epochs with more" if recovered else "--recover-epochs 1"
        report.warn(f"{lost}; {train} ({epochs}), or choose a milder budget ({other}).")


# --- loss, and accuracy or perplexity -------------------------------------------------------------


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
        model: The model; its ``training`` flags are restored.
        batches: Dicts for ``model(**batch)`` with labels.
        head: Decides the metric.
        total: Number of examples, for `progress`.
        progress: Called with examples done and `total`.

    Raises:
        DataError: There is no label, or the loss is not finite; the message names the batch.
    """
    sums = _Sums()
    with evaluating(model), torch.inference_mode():
        for index, batch in enumerate(batches):
            _add_batch(sums, model, batch, head, index)
            if progress is not None:
                progress(sums.examples, total)
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
    device = device_of(model)
    batch = {name: value.to(device) for name, value in batch.items()}
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


# --- figures that are worse than guessing ---------------------------------------------------------


# Standard errors below chance, and share above the vocabulary, that are put down to chance.
_ERRORS = 3.0
_SLACK = 1.02


def doubts(metrics: Metrics, head: Head, config: PreTrainedConfig) -> list[str]:
    """Where an unpruned model does worse than one that knows nothing; a warning each.

    Args:
        metrics: Measured on the model before anything was cut.
        head: What is predicted.
        config: Of the model: its number of labels, and the size of its vocabulary.
    """
    found = (_below_chance(metrics, config), _above_vocabulary(metrics, head, config))
    return [text for text in found if text]


def _below_chance(metrics: Metrics, config: PreTrainedConfig) -> str:
    """An accuracy that is lower than guessing's by more than the error of so few examples."""
    several = config.problem_type == "multi_label_classification"  # all must be right at once
    if metrics.accuracy is None or several:
        return ""
    chance = 1 / config.num_labels
    error = math.sqrt(chance * (1 - chance) / metrics.examples)
    if metrics.accuracy >= chance - _ERRORS * error:
        return ""
    return (
        f"the accuracy of the unpruned model is {metrics.accuracy:.1%} on {metrics.examples} "
        f"examples, and guessing among its {config.num_labels} labels gives {chance:.1%}; the "
        "labels of the data are likely in another order than the model's (give --label-map "
        "NAME=NUMBER), or the model or its task is another one. The figures mean little until "
        "that is put right."
    )


def _above_vocabulary(metrics: Metrics, head: Head, config: PreTrainedConfig) -> str:
    """A perplexity that is higher than that of guessing every token alike."""
    if metrics.perplexity is None:
        return ""
    words = config.get_text_config(decoder=head is Head.SEQ2SEQ).vocab_size
    if metrics.perplexity <= words * _SLACK:
        return ""
    return (
        f"the perplexity of the unpruned model is {metrics.perplexity:,.0f} on "
        f"{metrics.examples} examples, and guessing among the {words:,} tokens of its vocabulary "
        f"gives {words:,}; the tokenizer is likely that of another model, the weights were never "
        "trained, or the text is nothing like what they were trained on. The figures mean little "
        "until that is put right."
    )
