"""What plans of several budgets, scores and calibration subsets were measured to be worth."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._files import write_text
from ..errors import PlanError
from .costs import Budget
from .documents import parse_json, read_object

MASKED, REPAIRED = "masked", "repaired"
STATES = (MASKED, REPAIRED)
"""How a plan is measured: its units multiplied by 0, or with the repaired weights beside that."""


@dataclass(frozen=True, slots=True)
class Point:
    """One plan, measured.

    Attributes:
        score: Name of the score that the plan was found with.
        seed: Of the calibration subset, and of what is drawn at random.
        budget: What was asked for.
        state: One of `STATES`.
        costs: Achieved cost per cost name.
        kl: Mean KL divergence of its predictions from the whole model's, in nats per predicted
            label (of a regression a mean squared difference); None where it is not finite.
        metrics: What was measured, by name: ``loss``, ``accuracy``, ``perplexity`` …
        loss_increase: Predicted by the plan, see `Plan`.
        key: Digest of the model, the plan and the data that it was measured with.
    """

    score: str
    seed: int
    budget: Budget
    state: str
    costs: Mapping[str, float]
    kl: float | None
    metrics: Mapping[str, float]
    loss_increase: float = 0.0
    key: str = ""

    @property
    def cost_ratio(self) -> float:
        """Achieved cost that the budget limits, as a fraction of the original's."""
        return self.costs[self.budget.cost] / self.budget.total


@dataclass(frozen=True)
class Frontier:
    """Measured points: what is left of a model at each budget, by each score. Pure data.

    Attributes:
        model: Name of the model.
        layout: ``"stock"`` or ``"per_layer"``.
        totals: Cost of the whole model per cost name.
        original: Metrics of the whole model, by name.
        points: In the order in which they were asked for.
        document: What else is known: the command, the data.
    """

    model: str
    layout: str
    totals: Mapping[str, float]
    original: Mapping[str, float] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)

    FORMAT_VERSION = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; of each point also the share that it kept."""
        data = asdict(self)
        data["points"] = [
            {**asdict(point), "cost_ratio": point.cost_ratio} for point in self.points
        ]
        return {"kind": _KIND, "format_version": self.FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: Any) -> Frontier:
        """Inverse of `to_dict`.

        Raises:
            PlanError: The data is no frontier, holds nonsense, or is of another format.
        """
        values = dict(data) if isinstance(data, Mapping) else {}
        kind, version = values.pop("kind", None), values.pop("format_version", None)
        if kind != _KIND or type(version) is not int or version != cls.FORMAT_VERSION:
            raise PlanError(
                f"Frontier: found {kind!r:.40} of the format_version {version!r:.40}, needed "
                f"{_KIND!r} of {cls.FORMAT_VERSION}; give another file, upgrade hf_gradnas, or "
                "sweep again."
            )
        try:
            points = tuple(_point_of(point) for point in values.pop("points"))
            found = cls(**values, points=points)
            _check(found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(
                f"Frontier: not one of hf_gradnas ({type(error).__name__}: {error}); sweep again."
            ) from error
        return found

    def save(self, file: str | Path) -> None:
        """Write it as JSON, whole or not at all; a frontier that is there is replaced.

        Raises:
            PlanError: The file cannot be written, or holds something else; it is as it was.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        try:
            write_text(file, text, replaces=is_frontier)
        except (OSError, ValueError) as error:
            raise PlanError(
                f"Frontier: {file} cannot be written ({error}); what was there is as it was. Give "
                "another file, or free some space."
            ) from error

    @classmethod
    def load(cls, file: str | Path) -> Frontier:
        """Read a frontier written by `save`.

        Raises:
            PlanError: The file is no frontier.
        """
        try:
            data = parse_json(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(
                f"Frontier: {file} cannot be read ({error}); give another file, or sweep again."
            ) from error
        return cls.from_dict(data)


def is_frontier(file: Path) -> bool:
    """Whether a file looks like one of `Frontier.save`, of whatever version."""
    return read_object(file).get("kind") == _KIND


_KIND = "frontier"


def _point_of(data: Mapping[str, Any]) -> Point:
    values = dict(data)
    values.pop("cost_ratio", None)
    return Point(**{**values, "budget": Budget(**values["budget"])})


def _check(found: Frontier) -> None:
    """Check the values that tables and pictures calculate with."""
    dict(found.document)
    numbers = [*found.totals.values(), *found.original.values()]
    for point in found.points:
        if point.state not in STATES:
            raise ValueError(f"the state {point.state!r}, needed one of {', '.join(STATES)}")
        numbers += [point.budget.limit, point.cost_ratio, point.loss_increase]
        numbers += [*point.costs.values(), *point.metrics.values()]
        numbers += [] if point.kl is None else [point.kl]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError("a value that is no finite number")
