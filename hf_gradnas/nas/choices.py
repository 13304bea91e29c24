"""Choices: the sizes that the search may give an axis, from the rules of `GradNASConfig`.

Knows sizes, rules and axes; not models.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PlanError
from ..types import Axis
from .config import GradNASConfig
from .rules import ConvRule

# Rounding never takes more than a tenth of what was asked for.
LEAST_SHARE = 0.9


def make_divisible(value: float, divisor: int, minimum: int | None = None) -> int:
    """The multiple of `divisor` nearest to `value`, but never under 90 % of it.

    A value in the middle is rounded up. The formula is `_make_divisible` of MobileNetV2's reference
    implementation (tensorflow/models, research/slim/nets/mobilenet).

    Args:
        value: Wanted size.
        divisor: The result is a multiple of this.
        minimum: Smallest result; default: `divisor`.
    """
    nearest = int(value + divisor / 2) // divisor * divisor
    least = divisor if minimum is None else max(divisor, minimum)
    rounded = max(least, nearest)
    return rounded if rounded >= LEAST_SHARE * value else rounded + divisor


def choices_of(size: int, ratios: Sequence[float] | None, divisor: int) -> tuple[int, ...]:
    """Sizes to try, sorted and distinct; the full size is always among them.

    Args:
        size: Full size.
        ratios: Wanted sizes as fractions of the full one; None: every multiple of `divisor`.
        divisor: What the wanted sizes are rounded to a multiple of.
    """
    if ratios is None:
        wanted = set(range(divisor, size + 1, divisor))
    else:
        wanted = {make_divisible(ratio * size, divisor) for ratio in ratios}
    return tuple(sorted({choice for choice in wanted if choice <= size} | {size}))


def axis_choices(
    axis: Axis, type_key: str, name: str, config: GradNASConfig
) -> tuple[int, ...] | None:
    """Numbers of units that an axis may keep, sorted; its full size is always among them.

    Rules speak of channels, features and heads. An axis of channels whose units hold several
    channels (`Axis.per_unit`) takes only the choices that are whole numbers of units; for
    the other kinds a unit is what the rule counts. A choice below `Axis.minimum` is left out.

    Args:
        axis: The axis.
        type_key: Type whose rule holds, e.g. ``"nn.Linear"`` or ``"hf.Attention"``.
        name: Path of the module that the globs of the rule are matched with.
        config: The rules.

    Returns:
        None if the rule is off: the axis then keeps all its units.
    """
    rule = config.rule_for(type_key, name)
    if rule is None:
        return None
    width = axis.per_unit
    sizes = choices_of(axis.size * width, rule.ratios, rule.divisor)
    counts = [size // width for size in sizes if size % width == 0]
    return tuple(count for count in counts if count >= axis.minimum)


def check_kernel_size(rule: ConvRule, kernel_size: tuple[int, ...], name: str) -> None:
    """Refuse a rule that asks for another kernel size than the present one.

    Args:
        rule: Rule of the layer.
        kernel_size: Present kernel size, one number per dimension.
        name: Path of the layer, for the message.

    Raises:
        PlanError: A choice differs from the present kernel size.
    """
    for choice in rule.kernel_size:
        wanted = choice if isinstance(choice, tuple) else (choice,) * len(kernel_size)
        if wanted != kernel_size:
            raise PlanError(
                f"{name}: the rule's kernel_size has the choice {choice!r}, the layer has "
                f"{kernel_size}; kernel sizes are not searched: leave kernel_size empty, or turn "
                f"the layer off with {{{name!r}: None}} as the last glob of its type."
            )
