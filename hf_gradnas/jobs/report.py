"""What a run tells while it runs; a screen is one who listens. Knows no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..types import CostModel, Plan, Structure
    from .measuring import Metrics

Progress = Callable[[int, "int | None"], None]


class Report:
    """Listens to a run and says nothing; override what is to be heard."""

    def line(self, text: str = "") -> None:
        """A sentence about what was done."""

    def warn(self, text: str) -> None:
        """A sentence about what makes the result worse than it need be."""

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A step that takes a while; what is yielded is called with units done and their number."""
        yield lambda done, total: None

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """The time in which the Hub's client sends files, with progress bars of its own."""
        yield

    def settings(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Every option that matters: its flag, its value, and where that comes from."""

    def structure(self, structure: Structure, layout: str, reason: str) -> None:
        """What can be pruned, what was refused, and the layout with its reason."""

    def plan(self, plan: Plan, structure: Structure) -> None:
        """Which units stay."""

    def costs(
        self, plan: Plan, totals: Mapping[str, float], costs: Mapping[str, CostModel]
    ) -> None:
        """Each cost before and after."""

    def metrics(self, columns: Mapping[str, Metrics], measured_on: str) -> None:
        """Loss and metric by state of the model, and what they were measured on."""

    def latency(self, latency: Mapping[str, Any]) -> None:
        """Median time of a forward before and after, as `costs.latency.Timing.end` gives it."""
