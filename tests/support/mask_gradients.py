"""Gradients of experts and of neurons in them: what is recorded, and what masks would get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
import zoo
from torch import Tensor, nn

from hf_gradnas.masks import mask_leaves
from hf_gradnas.running.states import frozen
from hf_gradnas.scores.gradients import GradientRecorder
from hf_gradnas.types import Axis

STEP = 1e-5


def recorded(
    model: nn.Module, inputs: Mapping[str, Tensor], axes: Sequence[Axis]
) -> dict[str, Tensor]:
    """Gradients ``(examples, units)`` of one batch by axis, in float64."""
    recorder = GradientRecorder(model, axes)
    with frozen(model), recorder.attached(), zoo.float64_throughout():
        recorder.start(zoo.BATCH)
        model(**inputs).loss.backward()
        return recorder.gradients()


def check_gradients(
    model: nn.Module, inputs: Mapping[str, Tensor], axes: Sequence[Axis], rtol: float
) -> None:
    """Compare with those of masks, and that of the largest unit with finite differences."""
    gradients = recorded(model, inputs, axes)
    with mask_leaves(model, axes) as leaves, zoo.float64_throughout():
        loss = model(**inputs).loss
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for (name, leaf), gradient in zip(leaves.items(), expected, strict=True):
            error = (gradients[name].sum(0) - gradient).abs().max()
            assert error <= rtol * gradient.abs().max(), name
            unit = int(gradient.abs().argmax())
            values = []
            with torch.no_grad():
                for step in (STEP, -STEP):
                    leaf[unit] += step
                    values.append(float(model(**inputs).loss))
                    leaf[unit] -= step
            slope = (values[0] - values[1]) / (2 * STEP)
            assert slope == pytest.approx(float(gradient[unit]), rel=1e-3)
