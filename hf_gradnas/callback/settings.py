"""What a user asks the callback for, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..batches.steps import is_none_or_positive
from ..config.budgets import parse_budgets
from ..config.defaults import AUTO, CANDIDATES, DEFAULT_SCORE
from ..config.rules import parse_rules
from ..errors import PlanError
from ..repair.repairs import CHOICES as REPAIRS
from ..scores import METHODS
from ..scores.methods import GRADIENT_METHODS
from ..search.solver import STRATEGIES
from ..stock.space import LAYOUTS
from ..types import is_integer
from .schedule import SCHEDULES

WHENS = ("end", "begin", "gradual")
SOURCES = ("private", "training")
MASKS = ("soft", "hard")
LABELS = ("data", "model")
DISCOVERED = 512  # examples among which the longest is looked for, where all are scored in training


@dataclass(frozen=True, slots=True)
class Settings:
    """Arguments of `GradNASCallback` that JSON can hold; see there."""

    budget: Mapping[str, Any]
    when: str = "end"
    score: str = DEFAULT_SCORE
    search: str = "lagrangian"
    layout: str = "auto"
    rules: Mapping[str, Any] | None = None
    num_examples: int | None = 512
    labels: str = "data"
    schedule: str = "cubic"
    start_ratio: float = 0.1
    end_ratio: float = 0.7
    stages: int = 10
    mask: str = "soft"
    scores_from: str = "private"
    repair: str = "auto"
    output_dir: str | None = None

    def __post_init__(self) -> None:
        _check("when", self.when, WHENS)
        _check("score", self.score, (AUTO, *METHODS))
        _check("search", self.search, STRATEGIES)
        _check("layout", self.layout, LAYOUTS)
        _check("labels", self.labels, LABELS)
        _check("schedule", self.schedule, SCHEDULES)
        _check("mask", self.mask, MASKS)
        _check("scores_from", self.scores_from, SOURCES)
        _check("repair", self.repair, REPAIRS)
        parse_rules(self.rules)
        parse_budgets(self.budget, {"flops": math.inf, "params": math.inf})
        if not is_none_or_positive(self.num_examples):
            raise PlanError(
                f"num_examples={self.num_examples}: needed is 1 or more, or None for all of the "
                "data."
            )
        ratios = (self.start_ratio, self.end_ratio)
        are_numbers = all(type(r) in (int, float) for r in ratios)
        if not are_numbers or not 0 <= self.start_ratio < self.end_ratio <= 1:
            raise PlanError(
                f"start_ratio={self.start_ratio}, end_ratio={self.end_ratio}: needed are shares of "
                "the training's steps with 0 <= start_ratio < end_ratio <= 1."
            )
        if not is_integer(self.stages) or self.stages < 1:
            raise PlanError(f"stages={self.stages}: needed is 1 or more.")
        if self.scores_from == "training":
            self._check_training()

    def _check_training(self) -> None:
        if self.when == "begin":
            raise PlanError(
                "scores_from='training' with when='begin': there is no training before the "
                "beginning; use scores_from='private', or another when."
            )
        if self.score not in (AUTO, *GRADIENT_METHODS) or self.labels != "data":
            raise PlanError(
                f"scores_from='training' with score={self.score!r}, labels={self.labels!r}: the "
                "training's passes have gradients of the data's labels, which give "
                f"{', '.join(GRADIENT_METHODS)}; choose one, or scores_from='private'."
            )

    @property
    def riding_score(self) -> str:
        """The score of the training's own passes, of which no rows are held out to choose on."""
        return CANDIDATES[0] if self.score == AUTO else self.score

    @property
    def needs_labels(self) -> bool:
        """Whether scores come from the gradients of a loss with the data's labels."""
        return self.score in (AUTO, *GRADIENT_METHODS) and self.labels == "data"

    @property
    def sample_size(self) -> int | None:
        """Examples that are read besides the training, at most; None: all of the data."""
        is_read_once = self.scores_from == "private"
        return self.num_examples or (None if is_read_once else DISCOVERED)

    def to_dict(self) -> dict[str, Any]:
        """Arguments that make these settings again, ready for JSON."""
        rules = {
            glob: None if rule is None else rule.model_dump()
            for glob, rule in parse_rules(self.rules).items()
        }
        return {**asdict(self), "rules": None if self.rules is None else rules}


def _check(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise PlanError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")
