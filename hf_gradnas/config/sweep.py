"""What a sweep has beside the options of a recipe: budgets, scores and seeds, several of each.

Descriptions of these fields are the only help text, as in `recipe`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import Field, field_validator

from ..errors import RecipeError
from .defaults import AUTO, CANDIDATES
from .recipe import Recipe
from .strict import Settings

SCORES = tuple(n for n in get_args(Recipe.model_fields["score"].annotation) if n != AUTO)
"""Names of the scores that a model can be pruned by; `auto` is a choice between some of them."""
_PANEL = {"panel": "Sweep"}
_SEED = re.compile("[0-9]{1,9}")


def _default_targets() -> dict[str, tuple[str, ...]]:
    return {"flops": ("80%", "70%", "60%", "50%")}


def _default_scores() -> tuple[str, ...]:
    default = str(Recipe.model_fields["score"].default)
    return CANDIDATES if default == AUTO else (default,)


class Sweep(Settings):
    """Options of ``hf-gradnas sweep`` that prune does not have, or has once only."""

    targets: dict[str, tuple[str, ...]] = Field(
        default_factory=_default_targets,
        description="Budgets to try, each on its own: a cost and its limits as for --target of "
        "prune, commas between them (flops=80%,60%,40%). Repeatable, for another cost. Default: "
        "flops=80%,70%,60%,50%.",
        json_schema_extra={**_PANEL, "metavar": "NAME=VALUES"},
    )
    score: tuple[str, ...] = Field(
        default_factory=_default_scores,
        description="Scores to try, commas between them; those of gradients are collected in one "
        f"pass. Of {', '.join(SCORES)}. Default: {', '.join(_default_scores())}.",
        json_schema_extra={**_PANEL, "metavar": "NAMES"},
    )
    seeds: tuple[int, ...] = Field(
        default=(),
        description="Repeat all of it on calibration subsets of --num-examples that are drawn at "
        "random with these seeds (0,1,2); none of them holds what is measured on. Labels and "
        "scores that are drawn are drawn anew. Default: the one subset that prune takes.",
        json_schema_extra={**_PANEL, "metavar": "NUMBERS"},
    )
    save: str | None = Field(
        default=None,
        description="Write the model that is pruned to this one of --targets (flops=60%) to "
        "<output>/pruned, as prune does: by the first score and seed.",
        json_schema_extra={**_PANEL, "metavar": "NAME=VALUE"},
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _read_targets(cls, value: Any) -> Any:
        return read_limits(value)

    @field_validator("score", mode="before")
    @classmethod
    def _read_scores(cls, value: Any) -> Any:
        names = _parts(value)
        for name in names:
            if name not in SCORES:
                raise ValueError(f"{name!r} is no score; known are {', '.join(SCORES)}")
        return _each_once(names)

    @field_validator("seeds", mode="before")
    @classmethod
    def _read_seeds(cls, value: Any) -> Any:
        numbers = _parts(value)
        for number in numbers:
            if not _SEED.fullmatch(number):
                raise ValueError(f"{number!r} is no seed; write whole numbers such as 0,1,2")
        return tuple(int(number) for number in _each_once(numbers))

    def limit_to_save(self) -> dict[str, float | str]:
        """`save` as a target of `Recipe`; empty where nothing is saved.

        Raises:
            RecipeError: It is none of the targets.
        """
        if self.save is None:
            return {}
        name, _, limit = (part.strip() for part in self.save.partition("="))
        if limit not in self.targets.get(name, ()):
            known = [f"{cost}={each}" for cost, limits in self.targets.items() for each in limits]
            raise RecipeError(
                f"--save {self.save}: is none of the budgets that are tried, which are "
                f"{', '.join(known)}; give one of these, or add it to --targets."
            )
        return {name: limit}


def read_limits(value: Any) -> Any:
    """``NAME=VALUE,VALUE`` strings as a mapping from a cost to its limits; a mapping as it is.

    Raises:
        ValueError: One is of another form, or there twice.
    """
    if isinstance(value, Mapping):
        return value
    limits: dict[str, tuple[str, ...]] = {}
    for item in [value] if isinstance(value, str) else value:
        name, _, rest = (part.strip() for part in str(item).partition("="))
        if not name or not rest or "=" in rest:
            raise ValueError(f"{item!r} is not of the form NAME=VALUE,VALUE, e.g. flops=80%,60%")
        limits[name] = _each_once((*limits.get(name, ()), *_parts(rest)))
    return limits


def _parts(value: Any) -> tuple[str, ...]:
    """What is between the commas of one text or several."""
    items: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    texts = [part.strip() for item in items for part in str(item).split(",")]
    if "" in texts:
        raise ValueError("there is nothing between two commas, or after the last one")
    return tuple(texts)


def _each_once(parts: tuple[str, ...]) -> tuple[str, ...]:
    for part in parts:
        if parts.count(part) > 1:
            raise ValueError(f"{part!r} is there twice")
    return parts
