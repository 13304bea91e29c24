"""How the pruned share grows over a training run, and what each stage's budget is.

Knows step numbers and budgets; knows nothing of models and trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..types import Budget


def _cubic(progress: float) -> float:
    """Share of the final sparsity, ``1 - (1 - p)³`` (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)."""
    return 1 - (1 - progress) ** 3


def _linear(progress: float) -> float:
    return progress


SCHEDULES: dict[str, Callable[[float], float]] = {"cubic": _cubic, "linear": _linear}


@dataclass(frozen=True, slots=True)
class Stage:
    """One rise of the sparsity.

    Attributes:
        begin: Step after which units of this stage start to fade.
        step: Step after which they are gone.
        share: What is pruned then, as a share of what is pruned in the end.
    """

    begin: int
    step: int
    share: float

    def fade(self, step: int) -> float:
        """Factor that takes a weight from its value after the step before to that after `step`.

        The product over all steps of the stage goes down from 1 to 0 linearly.
        """
        return (self.step - step) / (self.step - step + 1)


def make_stages(
    max_steps: int, *, schedule: str, start_ratio: float, end_ratio: float, count: int
) -> tuple[Stage, ...]:
    """Stages at even distances between two points of a run; the last one has share 1.

    A run with fewer steps than stages has fewer stages; there is always one.
    """
    start, end = start_ratio * max_steps, end_ratio * max_steps
    shares: dict[int, float] = {}
    for number in range(1, count + 1):
        step = max(1, round(start + (end - start) * number / count))
        shares[step] = SCHEDULES[schedule](number / count)
    begins = [min(round(start), min(shares) - 1), *shares]
    steps = zip(begins, shares.items(), strict=False)
    return tuple(Stage(begin, step, share) for begin, (step, share) in steps)


def budget_at(budgets: Sequence[Budget], share: float) -> dict[str, float]:
    """Limit per cost when that share of what is to go in the end is gone."""
    return {b.cost: b.total - share * (b.total - b.limit) for b in budgets}
