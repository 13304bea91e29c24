"""The divergences against formulas written out by hand, in float64."""

import pytest
import torch

from hf_gradnas.repair.divergence import (
    DIVERGENCES,
    attention_divergence,
    bernoulli_divergence,
    categorical_divergence,
    relative_error,
    squared_error,
    weighted_divergence,
)

STUDENT, TEACHER = torch.randn(
    2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)
WEIGHTS = torch.tensor([[1, 0, 0.5, 2], [0, 0, 1, 1], [0.25, 1, 0, 3]], dtype=torch.float64)


def _softmax(logits, temperature):
    powers = (logits / temperature).exp()
    return powers / powers.sum(-1, keepdim=True)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_classes_follow_hinton(temperature):
    p, q = _softmax(TEACHER, temperature), _softmax(STUDENT, temperature)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    found = categorical_divergence(STUDENT, TEACHER, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_at_high_temperature_the_gradient_is_that_of_logit_matching():
    """Hinton et al. 2015, equation 4: (z − v)/N of logits with mean 0, for any high T."""
    student = (STUDENT - STUDENT.mean(-1, keepdim=True)).requires_grad_()
    teacher = TEACHER - TEACHER.mean(-1, keepdim=True)
    categorical_divergence(student, teacher, 1e5).sum().backward()
    expected = (student - teacher).detach() / 5
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-5)


def test_yes_or_no_and_numbers():
    p, q = 1 / (1 + (-TEACHER / 2).exp()), 1 / (1 + (-STUDENT / 2).exp())
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(-1)
    torch.testing.assert_close(bernoulli_divergence(STUDENT, TEACHER, 2.0), expected)
    expected = ((STUDENT - TEACHER) ** 2).sum(-1) / 5
    torch.testing.assert_close(squared_error(STUDENT, TEACHER, 7.0), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES.values())
def test_equal_logits_diverge_by_nothing(divergence):
    student = TEACHER.clone().requires_grad_()
    loss = divergence(student, TEACHER, 3.0).sum()
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_weights_say_what_counts():
    divergence = DIVERGENCES[next(iter(DIVERGENCES))]
    options = {"divergence": divergence, "temperature": 2.0}
    found = weighted_divergence(STUDENT, TEACHER, WEIGHTS, **options)
    expected = (divergence(STUDENT, TEACHER, 2.0) * WEIGHTS).sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    broken = STUDENT.clone()
    broken[WEIGHTS == 0] = torch.nan
    assert weighted_divergence(broken, TEACHER, WEIGHTS, **options) == found


@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_masked_logits_stay_finite(temperature):
    student, teacher = STUDENT.float(), TEACHER.float()
    for logits in (student, teacher):
        logits[..., 3:] = torch.finfo(torch.float32).min
    student.requires_grad_()
    loss = categorical_divergence(student, teacher, temperature).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_half_precision_is_summed_in_single():
    counted = torch.ones(3, 4)
    found = weighted_divergence(
        STUDENT.bfloat16(),
        TEACHER.bfloat16(),
        counted,
        divergence=categorical_divergence,
        temperature=1.0,
    )
    assert found.dtype is torch.float32


def test_hidden_states_are_compared_relative_to_their_length():
    errors = (STUDENT - TEACHER).norm(dim=-1) ** 2 / TEACHER.norm(dim=-1) ** 2
    found = relative_error(STUDENT, TEACHER, WEIGHTS)
    torch.testing.assert_close(found, (errors * WEIGHTS).sum())
    torch.testing.assert_close(relative_error(1e3 * STUDENT, 1e3 * TEACHER, WEIGHTS), found)
    assert relative_error(TEACHER, torch.zeros_like(TEACHER), 0 * WEIGHTS) == 0


def test_attention_is_compared_over_real_keys_as_a_mean_over_heads():
    """KL(ā_t ‖ ā) written out, for a student of two heads and a teacher of three."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, 5, 4, 4, generator=generator, dtype=torch.float64)
    keys = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    drawn = drawn.masked_fill(~keys[:, None, None], -torch.inf).softmax(-1)
    student, teacher = drawn[:, :2].requires_grad_(), drawn[:, 2:]
    weights = torch.tensor([[1, 0.5, 0, 0], [2, 1, 0, 0]], dtype=torch.float64)
    expected = 0.0
    for example, query in weights.nonzero().tolist():
        for key in keys[example].nonzero().flatten().tolist():
            q = sum(student[example, head, query, key] for head in range(2)) / 2
            p = sum(teacher[example, head, query, key] for head in range(3)) / 3
            expected = expected + weights[example, query] * p * (p / q).log()
    found = attention_divergence(student, teacher, weights, keys)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    broken = student.detach().clone()
    broken[:, :, 2:] = torch.nan  # queries of padding
    assert attention_divergence(broken, teacher, weights, keys) == found
    assert attention_divergence(teacher, teacher, weights, keys) == 0


def test_attention_that_a_student_rounds_to_nothing_is_finite():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    student = student[:, None, None].requires_grad_()
    ones = torch.ones(1, 1)
    loss = attention_divergence(student, teacher[:, None, None], ones, torch.ones(1, 2) != 0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
