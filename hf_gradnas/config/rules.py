"""Rules: which axes may be pruned, and how far. Knows globs and numbers, not models."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from pydantic import Field, ValidationError

from ..errors import PlanError, StructureError
from ..types import Structure
from .strict import Settings

_MOST = 2**31 - 1  # no model has more units


class Rule(Settings):
    """Limits on one axis."""

    min: int = Field(
        default=0,
        ge=0,
        le=_MOST,
        strict=True,
        description="Fewest units that stay; 0 may remove them all.",
    )
    multiple: int | None = Field(
        default=None,
        ge=1,
        le=_MOST,
        strict=True,
        description="Kept units are a multiple of this (or all); None: chosen from the cost.",
    )


Rules = Mapping[str, Rule | None]


def parse_rules(rules: Mapping[str, object] | None) -> dict[str, Rule | None]:
    """Check a user's mapping from glob to None (keep) or ``{min, multiple}``, keeping its order.

    Raises:
        PlanError: A value is neither None nor a mapping with the keys of `Rule`.
    """
    if rules is not None and not isinstance(rules, Mapping):
        raise PlanError(
            f"rules: found a {type(rules).__name__}, needed a mapping from a glob over module "
            'paths to None or limits, such as {"*layers.3.mlp*": None}.'
        )
    parsed: dict[str, Rule | None] = {}
    for glob, rule in (rules or {}).items():
        if not isinstance(glob, str):
            raise PlanError(f"rules: found the glob {glob!r}, needed a text over module paths.")
        try:
            parsed[glob] = None if rule is None else Rule.model_validate(rule)
        except ValidationError as error:
            raise PlanError(
                f"rules[{glob!r}]: {error.errors()[0]['msg']} (found {rule!r}); give None to keep "
                "the axis, or a mapping with 'min' and 'multiple'."
            ) from error
    return parsed


def rule_for(module: str, rules: Rules) -> Rule | None:
    """Rule of a module path: the last glob that matches wins; None means keep untouched."""
    found: Rule | None = Rule()
    for glob, rule in rules.items():
        if fnmatchcase(module, glob):
            found = rule
    return found


def check_rules(rules: Rules, structure: Structure) -> None:
    """Check that every glob matches a module with an axis.

    Raises:
        StructureError: One does not.
    """
    for glob in rules:
        if not any(rule_for(a.module, {glob: None}) is None for a in structure.axes):
            raise StructureError(
                f"rules[{glob!r}] matches no axis of this model; axes stand in "
                f"{', '.join(sorted({a.module for a in structure.axes})[:6])}, …. "
                "Give a glob over these module paths."
            )
