"""How close a masked or repaired model's predictions are to those of the model as it is.

Knows batches, forwards and the mean over labels; the formula of a divergence is in `divergence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from .._compat import configs_of
from ..batches.batch import Batch, check_batch, run_model
from ..running.processes import Processes
from ..running.wrappers import called_plainly, evaluating, uncompiled, without_autocast
from ..scores.losses import Prediction, inputs_to_sample, predict
from .divergence import DIVERGENCES, at_least_float32

Variant = Callable[[], AbstractContextManager[Any]]


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Eval mode; no gradients, cache, compiled code or autocast within the block.

    What is made there can be changed and trained on outside, also for a caller in inference mode.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for config in configs_of(model):
            if hasattr(config, "use_cache"):
                stack.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        stack.enter_context(uncompiled())
        stack.enter_context(without_autocast(model))
        for kind in ("cpu", "cuda"):  # of the caller
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(called_plainly(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def divergences(
    model: PreTrainedModel,
    batches: Iterable[Any],
    variants: Sequence[Variant],
    *,
    processes: Processes | None = None,
) -> list[float]:
    """Mean KL divergence KL(original ‖ variant) of each variant over all labels of the batches.

    One forward of the model as it is, and one of each variant. Labels are not read except by a
    decoder.

    Args:
        model: The model.
        batches: Dicts for ``model(**batch)``; where several processes score, this one's share.
        variants: Each gives a context in which the model is run, such as ``masked(…)``.
        processes: All that measure; the mean is over the labels of all of them.

    Returns:
        Nats per predicted label for classes and yes/no answers; the mean squared difference for a
        regression.

    Raises:
        DataError: A batch is none, or the model predicts nothing.
    """
    known = find_labels(type(model))
    sums = np.zeros(len(variants) + 1)
    with running(model):
        for index, columns in enumerate(batches):
            batch = check_batch(index, columns, known)
            wanted = prediction_of(model, batch)
            sums[-1] += int(wanted.valid.sum())
            for number, variant in enumerate(variants):
                with variant():
                    found = prediction_of(model, batch)
                sums[number] += divergence_sum(found, wanted)
    if processes is not None:
        sums = processes.sum(sums)
    *totals, labels = sums
    return [float(total / labels) if labels else math.nan for total in totals]


def prediction_of(model: PreTrainedModel, batch: Batch) -> Prediction:
    """What the model predicts for a batch.

    Raises:
        DataError: The model fails on the batch, or predicts nothing.
    """
    inputs, mask = inputs_to_sample(model, batch)
    return predict(run_model(model, batch.index, inputs), model, mask)


def divergence_sum(found: Prediction, wanted: Prediction) -> float:
    """Sum over the predicted labels of KL(wanted ‖ found), example by example to save memory."""
    divergence = DIVERGENCES[wanted.distribution]
    total = 0.0
    for logits, teacher, valid in zip(found.logits, wanted.logits, wanted.valid, strict=True):
        places = valid.to(logits.device)
        terms = divergence(
            at_least_float32(logits[places]), at_least_float32(teacher[places]), 1.0
        )  # (labels,)
        total += float(terms.double().sum())
    return total
