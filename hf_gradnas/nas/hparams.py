"""The search space of a converted model: its hparams, their choices and scores.

An hparam is the reference's word for an axis with the counts that may be chosen for it, from the
rules of `GradNASConfig`. The space belongs to the model and lives as long as it; the model itself
carries no trace of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import OrderError, PlanError
from ..types import KINDS, Axis, Structure
from .config import GradNASConfig
from .gradients import producer_of
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


# --- the space ------------------------------------------------------------------------------------


ATTENTION = "hf.Attention"
MATRIX = 2
TYPES: Mapping[str, type[nn.Module] | tuple[type[nn.Module], ...]] = {
    "nn.Linear": (nn.Linear, Conv1D),
    **{
        f"nn.{kind.__name__}": kind
        for kind in (
            nn.Conv1d,
            nn.Conv2d,
            nn.Conv3d,
            nn.ConvTranspose1d,
            nn.ConvTranspose2d,
            nn.ConvTranspose3d,
            nn.SyncBatchNorm,
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.BatchNorm3d,
            nn.InstanceNorm1d,
            nn.InstanceNorm2d,
            nn.InstanceNorm3d,
            nn.LayerNorm,
            nn.GroupNorm,
        )
    },
}
"""Types of layers by their key in `GradNASConfig`; subclasses count."""


@dataclass
class Hparam:
    """One axis as the reference shows it.

    Attributes:
        name: ``<module path>.<what>``, e.g. ``layer.0.intermediate.dense.out_features``.
        axis: The axis.
        choices: Sizes that may be chosen, ascending; the last is the full size. Channels are
            counted one by one also where a unit holds several.
        active: Chosen size.
        score_tensor: ``(units,)`` scores, descending, once they were measured.
        order: Units in the order of `score_tensor`.
    """

    name: str
    axis: Axis
    choices: tuple[int, ...]
    active: int
    score_tensor: Tensor | None = None
    order: tuple[int, ...] = ()

    @property
    def max(self) -> int:
        """Full size."""
        return self.choices[-1]

    @property
    def width(self) -> int:
        """Channels per unit; 1 for heads and neurons."""
        return self.max // self.axis.size

    @property
    def active_slice(self) -> slice:
        """Part of `score_tensor` that stays."""
        return slice(0, self.active // self.width)

    def degradation(self, choice: int) -> float:
        """Sum of the scores that are pruned at a choice; 0 before scores are measured."""
        if self.score_tensor is None:
            return 0.0
        return float(self.score_tensor[choice // self.width :].double().sum())

    def kept(self) -> tuple[int, ...]:
        """Sorted units that stay."""
        units = self.order or range(self.axis.size)
        return tuple(sorted(units[self.active_slice]))


@dataclass
class SearchSpace:
    """What `convert` notes about a model, and what a search finds out.

    Attributes:
        config: Rules that say what may be chosen.
        structure: The model's axes; None until a search has seen a dummy input.
        probe: Keyword arguments of the forward that the axes were found with; None until then.
        hparams: By name, in running order; those with a single choice included.
        reduce: How degradations of hparams become one: ``"max"`` or ``"sum"``.
        is_exported: Whether the best choice was cut, so that the axes are those of the past.
        algorithm: Class of the search, where the mode that converted has one of its own.
    """

    config: GradNASConfig
    structure: Structure | None = None
    probe: Mapping[str, Any] | None = None
    hparams: dict[str, Hparam] = field(default_factory=dict)
    reduce: str = "max"
    is_exported: bool = False
    algorithm: Callable[[], Any] | None = None

    def counts(self, choices: Mapping[str, int]) -> dict[str, int]:
        """Number of kept units of every axis at some choices; hparams that are not named stay."""
        structure = self.needed_structure()
        counts = {axis.name: axis.size for axis in structure.axes}
        for name, choice in choices.items():
            hparam = self.hparams[name]
            counts[hparam.axis.name] = choice // hparam.width
        for axis in structure.axes:
            if axis.parent is not None:
                groups = structure[axis.parent].size
                if counts[axis.parent] < groups:
                    counts[axis.name] = axis.size // groups * counts[axis.parent]
        return counts

    def needed_structure(self) -> Structure:
        """The model's axes.

        Raises:
            OrderError: They are not known yet.
        """
        if self.structure is None:
            raise OrderError("search space: no axes yet; call search(model, …) first.")
        return self.structure

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Kept units of every axis at the active choices."""
        structure = self.needed_structure()
        kept = {axis.name: tuple(range(axis.size)) for axis in structure.axes}
        kept.update({hparam.axis.name: hparam.kept() for hparam in self.hparams.values()})
        for axis in structure.axes:
            if axis.parent is not None:
                per_group = axis.size // structure[axis.parent].size
                groups = set(kept[axis.parent])
                kept[axis.name] = tuple(h for h in kept[axis.name] if h // per_group in groups)
        return kept


_SPACES: WeakKeyDictionary[nn.Module, SearchSpace] = WeakKeyDictionary()


def open_space(model: nn.Module, config: GradNASConfig) -> SearchSpace:
    """A new, empty space for a model; an earlier one is forgotten."""
    _SPACES[model] = SearchSpace(config)
    return _SPACES[model]


def space_of(model: nn.Module) -> SearchSpace | None:
    """The space of a converted model; None if it was not converted."""
    return _SPACES.get(model)


def close_space(model: nn.Module) -> None:
    """Forget the space of a model."""
    _SPACES.pop(model, None)


def needed_space(model: nn.Module) -> SearchSpace:
    """The space of a converted model.

    Raises:
        OrderError: The model was not converted.
    """
    space = space_of(model)
    if space is None:
        raise OrderError(
            f"{type(model).__name__}: not converted; call convert(model, 'gradnas') first, or "
            "prune(model, …), which does."
        )
    return space


def named_hparams(
    model: nn.Module, configurable: bool | None = None
) -> Iterator[tuple[str, Hparam]]:
    """Names and hparams of a converted model whose axes are known.

    Args:
        model: A converted model; its axes are known once it was searched.
        configurable: True: only those with more than one choice; False: only the others.

    Raises:
        OrderError: The model was not converted.
    """
    for name, hparam in needed_space(model).hparams.items():
        if configurable is None or (len(hparam.choices) > 1) is configurable:
            yield name, hparam


def make_hparams(
    model: nn.Module, structure: Structure, config: GradNASConfig
) -> dict[str, Hparam]:
    """One hparam per axis that the reference would choose a size for.

    Grouped-query attention is chosen in whole KV groups; the heads inside follow. With a single
    group the heads are chosen.

    """
    hparams: dict[str, Hparam] = {}
    parents = {axis.parent for axis in structure.axes}
    for axis in structure.axes:
        if axis.parent is not None and structure[axis.parent].size > 1:
            continue
        if axis.name in parents and axis.size == 1:
            continue
        name = _name_of(model, axis)
        choices = _choices(model, axis, config)
        hparams[name] = Hparam(name, axis, choices, active=choices[-1])
    return hparams


def check_kernels(model: nn.Module, config: GradNASConfig) -> None:
    """Refuse a config that asks for another kernel size than a convolution has.

    Raises:
        PlanError: It does.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            rule = config.rule_for(_key_of(module) or "", path)
            if isinstance(rule, ConvRule):
                check_kernel_size(rule, module.kernel_size, path)


def _name_of(model: nn.Module, axis: Axis) -> str:
    name = KINDS[axis.kind].reference_name
    if name:
        return f"{axis.module}.{name}"
    path = producer_of(axis)
    is_conv = isinstance(model.get_submodule(path), nn.modules.conv._ConvNd)
    return f"{path}.{'out_channels' if is_conv else 'out_features'}"


def _choices(model: nn.Module, axis: Axis, config: GradNASConfig) -> tuple[int, ...]:
    """Sizes that the rules of all touched layers permit; the full size alone if one is off.

    Layers that only read the units (consumers) decide whether the axis may be cut at all; the
    sizes come from the layers that have the units at their output. Where no rule speaks of any of
    these, the axis stays whole.
    """
    permitted: set[int] | None = None
    is_off = False
    for path, key, makes_units in _touched(model, axis):
        choices = axis_choices(axis, key, path, config)
        if choices is None:
            is_off = True
        elif makes_units:
            permitted = set(choices) if permitted is None else permitted & set(choices)
    units = {axis.size} if is_off or permitted is None else permitted | {axis.size}
    return tuple(sorted(axis.per_unit * count for count in units if count >= max(axis.minimum, 1)))


def _touched(model: nn.Module, axis: Axis) -> Iterator[tuple[str, str, bool]]:
    """Path, key in the config, and whether it has the units at its output, of the layers."""
    if KINDS[axis.kind].reference_name:
        yield axis.module, ATTENTION, True
        return
    if axis.taps[0].side in ("input", "inputs") and _are_stacked(model, axis):
        yield producer_of(axis), "nn.Linear", True
    outputs = [tap.module for tap in (*axis.taps, *axis.norms) if tap.side == "output"]
    reading = {part.module for part in axis.readers}
    owners = (part.module for part in axis.slices if not part.holder)
    for path in dict.fromkeys([*outputs, *owners]):
        key = _key_of(model.get_submodule(path))
        if key is not None:
            yield path, key, path in outputs or path not in reading


def _are_stacked(model: nn.Module, axis: Axis) -> bool:
    """Whether weights of several experts, which no layer's type names, make the units."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if any(part.holder for part in axis.makers):
        return True
    return any(part.tensor in named and named[part.tensor].ndim > MATRIX for part in axis.makers)


def _key_of(module: nn.Module) -> str | None:
    """Key of a layer's type in `GradNASConfig`; None for types that it does not name."""
    for key, types in TYPES.items():
        if isinstance(module, types):
            return key
    return None
