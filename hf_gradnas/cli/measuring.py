"""Measures a model before and after the cut, and warns where it lost much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..batches.batch import to_device
from ..config.budgets import milder
from ..data.examples import make_loader
from ..data.labels import IGNORED
from ..data.tasks import Head
from ..report.quality import what_was_lost
from ..types import Budget
from .evaluate import Metrics, Progress, evaluate
from .show import Screen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.held_out import Evaluation
    from ..data.loading import Source

Batches = Iterable[Mapping[str, Any]]


def evaluation_batches(
    evaluation: Evaluation, source: Source, model: PreTrainedModel, *, batch_size: int
) -> Batches:
    """Labelled batches to measure on, with the labels that `model` itself predicts where asked."""
    loader = make_loader(evaluation.examples, source, model, batch_size=batch_size)
    return own_labels(model, loader) if evaluation.by_model else loader


def own_labels(model: PreTrainedModel, batches: Batches) -> list[dict[str, Any]]:
    """The batches with the model's predictions as labels; its ``training`` flag is restored."""
    labelled = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                logits = model(**to_device(inputs, model)).logits
                labels = _predicted(logits, inputs.get("attention_mask"), model)
                labelled.append({**inputs, "labels": labels.cpu()})
    finally:
        model.train(was_training)
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
    screen: Screen,
    what: str,
) -> Metrics | None:
    """Loss and metric of a model; None where there is nothing to measure on."""
    if batches is None or evaluation is None:
        return None
    with screen.progress(what) as report:
        return metrics_of(model, batches, evaluation, head, progress=report)


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
    screen: Screen,
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
        screen.warn(f"{lost}; {train} ({epochs}), or choose a milder budget ({other}).")
