"""Budgets and rules: what a plan may cost, and which axes may be pruned, how far.

Read once at the border. Knows globs, numbers, and names and totals of costs; knows neither models
nor how costs come about.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from types import MappingProxyType

from pydantic import Field, ValidationError

from ..errors import BudgetError, GradNASWarning, PlanError, StructureError
from ..types import BYTES, KINDS, MEASURED, Axis, Budget, CostModel, Kind, Structure
from .strict import Settings

SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BYTES = {f"{letter}B": 1e3**power for power, letter in enumerate("KMGT", 1)}
_BYTES |= {letter: 1e3**power for power, letter in enumerate("KMGT", 1)}
_BYTES |= {f"{letter}IB": 1024.0**power for power, letter in enumerate("KMGT", 1)}
_PERCENT = 100
_LONGEST = 1024  # bits of the largest float
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(E[+-]?[0-9]+)?")
NEAR_RATIO = 0.1
"""A budget is near the lowest if it leaves less of what can be pruned than this share."""
EXAMPLE = '{"flops": "50%"}'


def parse_budgets(
    budget: Mapping[str, object],
    totals: Mapping[str, float],
    absent: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Budget, ...]:
    """Read a user's budgets, e.g. ``{"flops": "50%", "params": 66e6}``.

    A percentage is the share of the original cost that is kept; a number, or a string such as
    ``"1.2G"`` (K, M, G = B, T), is in the cost's own unit; costs in bytes also take ``"500MB"`` and
    ``"1.5GiB"``.

    Args:
        budget: Limit per cost name.
        totals: Cost of the original model per known cost name.
        absent: Why costs are not among them that other models have.

    Raises:
        BudgetError: `budget` is not a mapping or is empty; a cost is unknown, or this model has
            none of it; a limit is not a number, is a bare fraction, is not positive, or exceeds the
            original cost.
    """
    if not isinstance(budget, Mapping):
        raise BudgetError(
            f"budget: found {budget!r}, needed a mapping from a cost to its limit; "
            f"write for example {EXAMPLE}."
        )
    if not budget:
        raise BudgetError(
            f"budget: found an empty mapping, needed at least one limit; "
            f"write for example {EXAMPLE}."
        )
    for name in budget:
        if name in absent and name not in totals:
            raise BudgetError(
                f"budget {name}: {absent[name]}; limit one of {', '.join(sorted(totals))}."
            )
    return tuple(_parse_one(name, limit, totals) for name, limit in budget.items())


def format_amount(value: float) -> str:
    """Short form of a cost, e.g. ``1.234G``."""
    for suffix in ("T", "G", "M", "K"):
        if abs(value) >= SUFFIXES[suffix]:
            return f"{value / SUFFIXES[suffix]:.4g}{suffix}"
    return f"{value:.4g}"


def format_share(ratio: float, *, digits: int = 0) -> str:
    """A share in percent that is 100 % or 0 % only where it is all or nothing."""
    text = f"{ratio:.{digits}%}"
    least = 10.0 ** -(digits + 2)
    if ratio < 1 and text == f"{1:.{digits}%}":
        return f">{1 - least:.{digits}%}"
    if ratio > 0 and text == f"{0:.{digits}%}":
        return f"<{least:.{digits}%}"
    return text


def milder(ratio: float) -> str:
    """A budget half-way from one to the whole model, in whole percent."""
    return f"{math.ceil(50 * (1 + min(ratio, 1.0)) - 1e-9)}%"


def say_lowest(cost: CostModel, lowest: float, total: float) -> str:
    """What holds the lowest value of a cost, as shares of the whole model's."""
    if not cost.parts:
        return ""
    parts = dict(cost.parts)
    narrowest = lowest - cost.constant
    if narrowest > 0:
        parts["the least of what is pruned"] = narrowest
    (first, amount), *rest = parts.items()
    verb = "holds" if first.startswith("the ") else "hold"  # "the model's head", "embeddings"
    shares = [f"{first} {verb} {format_share(amount / total, digits=1)}"]
    shares += [f"{kind} {format_share(amount / total, digits=1)}" for kind, amount in rest]
    return f"Of the whole, {', '.join(shares)}."


def percent_up(ratio: float) -> str:
    """Percentage rounded up, so that asking for it succeeds."""
    return f"{math.ceil(ratio * 1e4) / 1e2:.2f}"


def warn_near_lowest(lowest: Mapping[str, float], budgets: Sequence[Budget]) -> None:
    """Warn of budgets that leave less than a tenth of what can be pruned.

    Args:
        lowest: Lowest reachable value of each cost.
        budgets: Limits that can be reached.
    """
    for budget in budgets:
        least = lowest[budget.cost]
        room = budget.total - least
        if room > 0 and budget.limit - least < NEAR_RATIO * room:
            warnings.warn(
                f"budget {budget.cost}: {100 * budget.ratio:.4g}% is near the lowest that can be "
                f"reached, {percent_up(least / budget.total)}%: it leaves less than a tenth of "
                "what can be pruned, and quality is likely lost. Train the pruned model after it "
                "(--recover-epochs 1, pruner.recover), or choose a milder budget "
                f"({budget.cost}={milder(budget.ratio)}).",
                GradNASWarning,
                stacklevel=3,
            )


def _parse_one(name: str, limit: object, totals: Mapping[str, float]) -> Budget:
    if isinstance(limit, int) and limit.bit_length() > _LONGEST:  # Python does not even print it
        raise BudgetError(
            f"budget {name}: an integer of {limit.bit_length()} bits is above the original cost; "
            "give a smaller limit or a percentage such as '50%'."
        )
    if name not in totals:
        near = difflib.get_close_matches(str(name).lower(), totals, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise BudgetError(
            f"budget: unknown cost {name!r}, known are {', '.join(sorted(totals))}{hint}"
        )
    total = totals[name]
    amount, is_share = _read(name, limit)
    if is_share:
        if not 0 < amount <= 1:
            raise BudgetError(
                f"budget {name}={limit}: a percentage is the share kept, needed more than 0 % and "
                "at most 100 %; write for example '50%'."
            )
        return Budget(cost=name, limit=total * amount, total=total)
    is_known = math.isfinite(total)  # the total of what is measured later is not
    if amount <= 0:
        raise BudgetError(
            f"budget {name}={limit}: needed a limit above 0"
            + (f"; the original costs {format_amount(total)}." if is_known else ", such as '50%'.")
        )
    is_small = amount <= 1 or amount <= _PERCENT < total / _PERCENT
    if is_small and not (name in MEASURED and (not is_known or total / amount < _PERCENT)):
        share = 100 * amount if amount <= 1 else amount
        raise BudgetError(
            f"budget {name}={limit}: a bare number is an absolute limit and this one is too small "
            f"to be meant; for the share kept write '{share:g}%'."
        )
    if amount > total:
        raise BudgetError(
            f"budget {name}={limit}: above the original cost, which is {format_amount(total)}"
            + (f" ({total:.0f})" if total >= SUFFIXES["K"] else "")
            + "; give a smaller limit or a percentage."
        )
    return Budget(cost=name, limit=amount, total=total)


def _read(name: str, limit: object) -> tuple[float, bool]:
    """The number in `limit`, and whether it is a share of the original (50 % is 0.5)."""
    text = limit.strip().upper() if isinstance(limit, str) else ""
    is_share = text.endswith("%")
    units = _BYTES if name in BYTES else SUFFIXES
    unit = next((unit for unit in units if text.endswith(unit)), "")
    factor = units.get(unit, 1.0)
    digits = (text[:-1] if is_share else text.removesuffix(unit)).strip()
    amount = math.nan
    try:
        if isinstance(limit, str):  # float() also reads other scripts' digits and 1_000
            amount = float(digits) if _NUMBER.fullmatch(digits) else math.nan
            amount = amount / 100 if is_share else amount * factor
        elif not isinstance(limit, bool) and isinstance(limit, Real):
            amount = float(limit)
    except (ValueError, OverflowError):
        pass  # nan is refused below, with the text as the user wrote it
    if not math.isfinite(amount):
        raise BudgetError(
            f"budget {name}={limit!r:.80}: not a finite number; write a percentage such as '50%' "
            "or an absolute limit such as 66e6 or '66M'."
        )
    return amount, is_share


# --- rules ----------------------------------------------------------------------------------------


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


def rule_for(axis: Axis, rules: Rules) -> Rule | None:
    """Rule of an axis; None means keep untouched.

    The last glob wins that matches the path of its module or its name, which ends in its kind
    (``*:experts``).
    """
    found: Rule | None = Rule()
    for glob, rule in rules.items():
        if fnmatchcase(axis.module, glob) or fnmatchcase(axis.name, glob):
            found = rule
    return found


def whole_kinds(kinds: Collection[str]) -> dict[str, None]:
    """Rules that keep all kinds of axes but these whole; KV groups go where heads may."""
    may_go = {*kinds, *(str(KINDS[Kind(kind)].parent) for kind in kinds if kind == Kind.HEADS)}
    found = (kind for kind, row in KINDS.items() if not row.is_asked_for)
    return {f"*:{kind}": None for kind in found if kind not in may_go}


def check_rules(rules: Rules, structure: Structure) -> None:
    """Check that every glob matches an axis, but for those that name a kind alone.

    Raises:
        PlanError: A multiple is of no axis, or larger than all of them.
        StructureError: A glob matches nothing.
    """
    kinds = {f"*:{kind}" for kind in KINDS}
    for glob in rules.keys() - kinds:
        if not any(rule_for(axis, {glob: None}) is None for axis in structure.axes):
            raise StructureError(
                f"rules[{glob!r}] (--exclude) matches no axis of this model; axes are in "
                f"{', '.join(sorted({a.module for a in structure.axes})[:6])}, …. "
                "Give a glob over these module paths."
            )
    for glob, rule in rules.items():
        if rule is not None and rule.multiple is not None:
            _check_multiple(glob, rule.multiple, structure)


def _check_multiple(glob: str, multiple: int, structure: Structure) -> None:
    found = [axis for axis in structure.axes if rule_for(axis, {glob: None}) is None]
    if not found:
        kinds = dict.fromkeys(str(axis.kind) for axis in structure.axes)
        raise PlanError(
            f"rules[{glob!r}]: multiple {multiple} (--multiple) is for what this model does not "
            f"have; it has {', '.join(kinds)}."
        )
    sizes = {axis.name: axis.size for axis in structure.axes}
    most = max(
        axis.size // (sizes[axis.parent] if axis.parent and KINDS[axis.kind].counts_each else 1)
        for axis in found
    )
    if multiple > most:
        raise PlanError(
            f"rules[{glob!r}]: no width is a multiple of {multiple} (--multiple), as there are at "
            f"most {most} units; give {most // 2 or 1} or less."
        )
