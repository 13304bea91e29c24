"""Effects of masks on channels, seen in one backward, and when each axis runs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from channel_axes import Case, residual, two_blocks
from torch import nn

from hf_gradnas.structure.trace import Call
from hf_gradnas.verification import effects, prove_channels
from hf_gradnas.verification.effects import TooLarge, first_order_effects, without_effect
from hf_gradnas.verification.trial import FEW_TOKENS, Trial, largest_difference


def trial_of(case: Case) -> tuple[Trial, dict[str, list[int]]]:
    """The trial of a case, and the first half of all units."""
    kept = {axis.name: list(range(axis.size // 2)) for axis in case.axes}
    return Trial(case.model, Call(case.args, {}, ())), kept


@pytest.mark.parametrize("build", [two_blocks, residual])
def test_every_axis_that_has_an_effect_shows_it(build: Any) -> None:
    case = build()
    trial, kept = trial_of(case)
    found = first_order_effects(trial, case.axes, kept)
    assert found.keys() == kept.keys()
    assert min(found.values()) > effects.CLEAR


def test_it_is_the_mean_change_by_random_signs_and_so_at_most_the_largest() -> None:
    """In a net that is linear in its masks first order is all."""
    case = two_blocks()
    case.model[2], axis = nn.Identity(), case.axes[1]
    trial, kept = trial_of(case)
    found = first_order_effects(trial, [axis], kept)[axis.name]
    (whole,), (masked,) = trial.whole(), trial.masked([axis], {axis.name: kept[axis.name]})
    scale = whole.abs().max() / masked.abs().max()
    change = effects._mixture([whole]) - effects._mixture([masked]) / scale
    torch.testing.assert_close(found, float(change.abs()), rtol=1e-9, atol=0)
    assert found <= largest_difference([masked], [whole], [whole])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many axes were masked in each forward."""
    counts: list[int] = []
    plain = Trial.masked

    def masked(self: Trial, axes: Any, *rest: Any, **options: Any) -> Any:
        counts.append(len(axes))
        return plain(self, axes, *rest, **options)

    monkeypatch.setattr(Trial, "masked", masked)
    return counts


def test_axes_of_clear_effect_run_only_all_together(runs: list[int]) -> None:
    case = two_blocks()
    assert prove_channels(case.model, case.axes, case.args, {}) == (case.axes, ())
    assert runs == [2]


def test_an_axis_whose_gradient_is_zero_runs_alone(runs: list[int]) -> None:
    case = two_blocks()
    with torch.no_grad():
        case.model[3].weight.zero_()
    good, refusals = prove_channels(case.model, case.axes, case.args, {})
    assert good == case.axes[1:]
    assert "has no effect" in refusals[0].reason
    assert runs == [1, 1]


def test_all_run_alone_where_the_forward_writes_in_place(runs: list[int]) -> None:
    class Bend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp().add_(1)  # the backward of `exp` needs what it returned

    case = two_blocks()
    case.model[2] = Bend()
    trial, kept = trial_of(case)
    assert first_order_effects(trial, case.axes, kept) == {}
    assert without_effect(trial, case.axes, kept) == {}
    assert runs == [1, 1]


def test_a_backward_that_would_keep_too_much_is_not_run(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "MOST_SAVED", 100)
    case = two_blocks()
    trial, kept = trial_of(case)
    with pytest.raises(TooLarge):
        without_effect(trial, case.axes, kept)
    assert prove_channels(case.model, case.axes, case.args, {}) == (case.axes, ())
    assert runs == [1, 1, 2]


def test_few_tokens_are_one_example() -> None:
    class Words(nn.Embedding):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids)

    call = Call((), {"input_ids": torch.arange(20).view(2, 10) % 10}, ())
    short = Trial(Words(10, 3), call).on_few_tokens()
    assert short.call.kwargs["input_ids"].shape == (1, FEW_TOKENS)


def test_a_forward_that_draws_numbers_is_proved() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.randn_like(x))

    case = two_blocks()
    before = torch.get_rng_state()
    assert prove_channels(Noisy(*case.model), case.axes, case.args, {}) == (case.axes, ())
    assert torch.equal(before, torch.get_rng_state())
