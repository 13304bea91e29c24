"""How far a student's outputs are from its teacher's, position by position.

Knows tensors and formulas; which positions count is decided by the caller, in weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ..scores.losses import Distribution, bernoulli, categorical, gaussian

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
