"""What the plan command has beside the options of a recipe: several budgets at once.

Descriptions of these fields are the only help text, as in `recipe`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from .strict import Settings
from .sweep import read_limits


class Plans(Settings):
    """Options of ``hf-gradnas plan`` that prune does not have."""

    targets: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Budgets in place of --target, each on its own: a cost and its limits, commas "
        "between them (flops=80%,60%,40%). Repeatable, for another cost. Each gets a file in the "
        "folder of --output.",
        json_schema_extra={"panel": "Plan", "metavar": "NAME=VALUES"},
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _read_targets(cls, value: Any) -> Any:
        return read_limits(value)

    @field_validator("targets")
    @classmethod
    def _check_files(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for cost, limits in value.items():
            names = [limit.removesuffix("%") for limit in limits]
            if len(set(names)) < len(names):
                raise ValueError(
                    f"{cost}: a share and an amount of one number, whose plans have one file; give "
                    "them in two runs"
                )
        return value

    def budgets(self) -> dict[str, dict[str, str]]:
        """One budget for each limit, by the name of its file."""
        return {
            f"{cost}-{limit.replace('%', '')}.json": {cost: limit}
            for cost, limits in self.targets.items()
            for limit in limits
        }
