"""How far predictions are from those of another model, and which of several plans is closest.

Knows formulas of outputs, position by position; batches, forwards and the mean over labels; and
plans and how to try them, not how they were made. Which positions count is decided by weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import find_labels

from .._compat import configs_of
from ..batches.batch import Batch, check_batch, run_model
from ..batches.steps import HeldOut
from ..running.precision import wide
from ..running.processes import Processes
from ..running.states import evaluating
from ..running.wrappers import called_plainly, uncompiled, without_autocast
from ..scores.losses import (
    Distribution,
    Prediction,
    bernoulli,
    categorical,
    gaussian,
    inputs_to_sample,
    predict,
)
from ..types import Plan

# From logits of student and teacher (positions, values) and the temperature to (positions,).
Divergence = Callable[[Tensor, Tensor, float], Tensor]


def categorical_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(p_teacher ‖ p_student) over one softmax per position (Hinton et al. 2015)."""
    wanted = functional.log_softmax(_tempered(teacher, temperature), dim=-1)
    found = functional.log_softmax(_tempered(student, temperature), dim=-1)
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(-1)


def bernoulli_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(p_teacher ‖ p_student) of one yes or no per value, mean over the values."""
    wanted, found = _tempered(teacher, temperature), _tempered(student, temperature)
    yes = functional.logsigmoid(wanted) - functional.logsigmoid(found)
    no = functional.logsigmoid(-wanted) - functional.logsigmoid(-found)
    share = wanted.sigmoid()
    return temperature**2 * (share * yes + (1 - share) * no).mean(-1)


def squared_error(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Squared difference, mean over the values; a regression has no temperature."""
    return (student - teacher).square().mean(-1)


DIVERGENCES: Mapping[Distribution, Divergence] = {
    categorical: categorical_divergence,
    bernoulli: bernoulli_divergence,
    gaussian: squared_error,
}


def weighted_divergence(
    student: Tensor, teacher: Tensor, weights: Tensor, *, divergence: Divergence, temperature: float
) -> Tensor:
    """Sum over positions of weight times divergence.

    Args:
        student: ``(examples, positions, values)``.
        teacher: The same shape.
        weights: ``(examples, positions)``; positions of weight 0 are not computed at all.
        divergence: One of `DIVERGENCES`.
        temperature: What logits are divided by.
    """
    counted = weights != 0
    found, wanted = at_least_float32(student[counted]), at_least_float32(teacher[counted])
    return (divergence(found, wanted, temperature) * weights[counted].to(found)).sum()


def relative_error(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Sum over positions of weight times ‖h_student − h_teacher‖² / ‖h_teacher‖².

    A plain mean square would see only the few positions whose residual stream is hundreds of times
    longer than the others' (the first token of most decoders).

    Args:
        student: ``(examples, positions, values)``.
        teacher: The same shape.
        weights: ``(examples, positions)``.
    """
    counted = weights != 0
    found, wanted = at_least_float32(student[counted]), at_least_float32(teacher[counted])
    lengths = wanted.square().sum(-1).clamp_min(torch.finfo(wanted.dtype).eps)
    errors = (found - wanted).square().sum(-1) / lengths
    return (errors * weights[counted].to(errors)).sum()


def attention_divergence(student: Tensor, teacher: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Sum over queries of weight times KL(ā_teacher ‖ ā_student) over the keys.

    ā is the mean of the probabilities over the heads, of which there may be different numbers.

    Args:
        student: ``(examples, heads, queries, keys)``.
        teacher: The same but for the heads.
        weights: ``(examples, queries)``; queries of weight 0 are not computed at all.
        keys: Whether a key is real ``(examples, keys)``; others are left out.
    """
    counted = weights != 0
    found, wanted = (at_least_float32(p).mean(1)[counted] for p in (student, teacher))
    is_real = keys[:, None].expand(-1, weights.shape[1], -1)[counted]
    # What the student rounds to 0 costs a lot, but not everything.
    logs = found.clamp_min(torch.finfo(found.dtype).tiny).log()
    terms = torch.xlogy(wanted, wanted) - wanted * logs
    return (terms.where(is_real, 0).sum(-1) * weights[counted].to(terms)).sum()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Same values, without half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    # Masked logits are the lowest number there is; divided by less than 1 they would be -inf.
    return (logits / temperature).clamp_(min=torch.finfo(logits.dtype).min)


# --- means over batches ---------------------------------------------------------------------------


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
        total += float(wide(terms).sum())
    return total


# --- which of several plans is closest ------------------------------------------------------------


logger = logging.getLogger(__name__)

Masked = Callable[[Plan], AbstractContextManager[None]]


def closest(
    model: PreTrainedModel,
    held_out: HeldOut,
    plans: Sequence[Plan],
    masked: Masked,
    *,
    processes: Processes,
) -> Plan:
    """The plan of the lowest KL divergence KL(original ‖ masked), with those of all plans.

    One forward of the original and one of each plan over the rows that were held out. The first
    plan is taken, without any forward, where there is no other or no row; and, after them, where no
    divergence is finite.

    Args:
        model: The model, not cut.
        held_out: Batches that made none of the scores.
        plans: Of different scores.
        masked: Gives the context in which a plan is tried.
        processes: All that measure.

    Raises:
        DataError: The model predicts nothing.
    """
    if len(plans) == 1:
        return plans[0]
    tried: dict[str, float] = {}
    if held_out.examples:
        variants = [partial(masked, plan) for plan in plans]
        found = divergences(model, held_out.batches, variants, processes=processes)
        pairs = zip(plans, found, strict=True)
        tried = {plan.score: max(kl, 0.0) for plan, kl in pairs if math.isfinite(kl)}
    best = replace(min(plans, key=lambda plan: tried.get(plan.score, math.inf)), tried=tried)
    if processes.is_main:
        logger.log(logging.INFO if tried else logging.WARNING, "%s", say_tried(best))
    return best


def say_tried(plan: Plan) -> str:
    """Which scores were tried for a plan, and how far the model then is from the original."""
    if not plan.tried:
        return (
            f"score='auto': {plan.score} is taken untried, since no rows are held out from scoring "
            "(scores of a file, of the training, or of one batch), or the model predicts nothing "
            "finite on them."
        )
    shown = ", ".join(f"{name} {kl:.4g}" for name, kl in plan.tried.items())
    return (
        f"score='auto': {plan.score} is taken; KL to the original on held-out rows, in nats per "
        f"label: {shown}."
    )
