"""What the unmodified class can express, measured: change a config value, build, compare shapes.

Knows configs, classes and tensor shapes; never touches a weight (models are built on the meta
device). A width counts as expressible when a config value resizes exactly the tensors of its axes,
as their slices say, and no other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from ..surgery.lists import with_stacks
from ..surgery.rows import Shapes, shapes_of
from ..types import KINDS, Axis, Kind, StockGroup, StockSpace, Structure
from .layers import layer_groups
from .trials import (
    Counts,
    Trial,
    expected_shapes,
    probe_counts,
    tensor_shapes,
    trials_of,
)
from .values import scopes, set_value, stored

MULTIPLES = (2, 4, 8, 16, 32, 64, 128, 256)
"""Steps tried for the neurons of a class that does not accept every number."""


class _Rejected(Exception):
    """A config value that the config class, the model class or the comparison refused."""


def find_stock_space(model: PreTrainedModel, structure: Structure) -> StockSpace:
    """Measure which widths the unmodified class can express through its config.

    For each config value that may count the units of an axis, the class is built on the meta
    device with another value: the axes whose tensors shrank exactly as their slices say, while no
    other tensor changed, form a group. Then every smaller count is tried (FFNs: a few).

    Args:
        model: The model as it is, on any device; only names, shapes and the config are read.
        structure: Its axes.

    Returns:
        The groups, and a one-line reason for every axis in none.
    """
    whole = _reason_for_all(model)
    if whole is None:
        try:
            base = with_stacks(tensor_shapes(type(model), model.config), structure.axes)
        except Exception as error:  # any class may refuse in its own way
            whole = f"{type(model).__name__} cannot be rebuilt from its config: {_line(error)}"
    if whole is not None:
        return StockSpace((), {axis.name: whole for axis in structure.axes})
    refused = _differing(structure, base, with_stacks(shapes_of(model), structure.axes))
    layers = [axis for axis in structure.axes if axis.is_layer]
    fitting = [a for a in structure.axes if a.name not in refused and not a.is_layer]
    search = _Search(type(model), model.config, base, {axis.name: axis for axis in fitting})
    search.listed = tuple(axis for axis in structure.axes if any(s.holder for s in axis.slices))
    groups, without = layer_groups(type(model), model.config, layers)
    refused |= without
    for path, config in scopes(model.config):
        groups.extend(search.groups(path, config))
    silent = f"{type(model.config).__name__} has no value that sets the width of this axis"
    for name in search.pending:
        refused[name] = search.reasons.get(name, silent)
    return StockSpace(tuple(groups), refused)


class _Search:
    """State of one `find_stock_space`: what is measured, what is left, and why."""

    def __init__(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        base: Shapes,
        axes: Mapping[str, Axis],
    ) -> None:
        self.model_class = model_class
        self.config = config
        self.base = base
        self.pending = dict(axes)
        self.reasons: dict[str, str] = {}
        self.listed: Sequence[Axis] = ()

    def groups(self, path: str, config: PreTrainedConfig) -> Iterator[StockGroup]:
        """Groups of axes that values of one (sub-)config set."""
        for template in list(trials_of(path, config, self.pending)):
            for trial in self._sized(template):
                concerned = self._concerned(trial)
                if not concerned:
                    continue
                try:
                    group = self._measure(trial, concerned)
                except _Rejected as rejection:
                    for axis in concerned:
                        self.reasons.setdefault(axis.name, str(rejection))
                    continue
                for name in group.axes:
                    del self.pending[name]
                yield group

    def _sized(self, trial: Trial) -> list[Trial]:
        """The trial, or one per size of FFN where a default (None) hides the number."""
        if trial.sizes:
            return [trial]
        (kind,) = trial.keys
        sizes = {axis.size for axis in self.pending.values() if axis.kind == kind}
        return [replace(trial, sizes={kind: size}) for size in sorted(sizes, reverse=True)]

    def _concerned(self, trial: Trial) -> list[Axis]:
        """Axes left whose sizes fit the trial; groups of heads before the heads."""
        found: dict[str, Axis] = {}
        parents = {axis.parent for axis in self.pending.values()}
        for axis in self.pending.values():
            if trial.sizes.get(axis.kind) != axis.size or axis.name in parents:
                continue
            if axis.per_unit > 1:
                continue
            parent, outer = self.pending.get(axis.parent or ""), KINDS[axis.kind].parent
            if (outer in trial.sizes) != (axis.parent is not None):
                continue
            if axis.parent is not None:
                if parent is None or parent.size != trial.sizes[parent.kind]:
                    continue
                found[parent.name] = parent
            found[axis.name] = axis
        return list(found.values())

    def _measure(self, trial: Trial, concerned: list[Axis]) -> StockGroup:
        """The group that the trial's values set, with the counts that the class accepts."""
        kind = _single_kind(trial)
        if kind is not None and len(trial.sizes) > 1:
            probes = _inner_counts(trial)
        elif kind is not None:
            probes = [{kind: count} for count in probe_counts(trial.sizes[kind])]
        else:
            probes = trial.combinations()
        reason = "it has one unit only, which the stock class cannot do without"
        for counts in probes:
            try:
                shapes = self._build(trial, counts)
            except _Rejected as rejection:
                reason = str(rejection)
                continue
            axes = self._responding(shapes, counts, concerned, trial)
            return StockGroup(
                axes=tuple(axis.name for axis in axes),
                keys=trial.keys,
                allowed=self._allowed(trial, axes),
                copies=trial.copies,
                constants=trial.constants,
            )
        raise _Rejected(reason)

    def _build(self, trial: Trial, counts: Counts) -> Shapes:
        config = copy.deepcopy(self.config)
        values = trial.values(counts)
        try:
            for key, value in values.items():
                set_value(config, key, value)
            return with_stacks(tensor_shapes(self.model_class, config), self.listed)
        except Exception as error:  # any class may refuse in its own way
            told = ", ".join(f"{key}={value}" for key, value in values.items())
            raise _Rejected(f"{self.model_class.__name__} refuses {told}: {_line(error)}") from None

    def _responding(
        self, shapes: Shapes, counts: Counts, concerned: list[Axis], trial: Trial
    ) -> list[Axis]:
        """Axes whose tensors all changed; refuses when anything else changed."""
        axes = [
            axis
            for axis in concerned
            if counts[axis.kind] != axis.size and self._changed(axis, shapes)
        ]
        held = {axis.name for axis in axes} | {axis.parent for axis in axes}
        axes = [axis for axis in concerned if axis.name in held]
        keys = " and ".join(trial.keys.values())
        if not axes:
            raise _Rejected(self._nothing(concerned[0], keys))
        wanted = expected_shapes(self.base, axes, counts)
        for tensor in (*wanted, *shapes):
            if shapes.get(tensor) != wanted.get(tensor):
                raise _Rejected(f"{keys} also resizes {tensor}, which is no part of this axis")
        return axes

    def _changed(self, axis: Axis, shapes: Shapes) -> bool:
        return all(
            s.tensor in shapes
            and any(
                shapes[s.tensor][dim] != self.base[s.tensor][dim]
                for dim in ((0, s.dim) if s.each else (s.dim,))
            )
            for s in axis.slices
        )

    def _nothing(self, axis: Axis, keys: str) -> str:
        name = type(self.config).__name__
        if not KINDS[axis.kind].width_key:
            return f"{keys} of {name} does not set the width of this axis"
        return (
            f"{name} derives the head size from the hidden size and the number of heads, so fewer "
            "heads would change it"
        )

    def _accepts(self, trial: Trial, axes: list[Axis], counts: Counts) -> bool:
        try:
            return self._build(trial, counts) == expected_shapes(self.base, axes, counts)
        except _Rejected:
            return False

    def _allowed(self, trial: Trial, axes: list[Axis]) -> tuple[Counts, ...] | None:
        """Counts that the class accepts, ascending, the present one included; None: any."""
        full = dict(trial.sizes)
        kind = _single_kind(trial)
        if kind is not None and len(full) > 1:
            tried = _inner_counts(trial)
            accepted = [counts for counts in tried if self._accepts(trial, axes, counts)]
            if len(accepted) < len(tried):
                return (*accepted, full)
            return None if len(trial.keys) > 1 else (*_inner_counts(trial, every=True), full)
        if kind is not None:
            return self._allowed_counts(trial, axes, kind)
        tried = trial.combinations()
        accepted = [counts for counts in tried if self._accepts(trial, axes, counts)]
        if len(accepted) == len(tried) and len(full) == 1:
            return None
        accepted.append(full)
        return tuple(sorted(accepted, key=lambda counts: [counts[kind] for kind in full]))

    def _allowed_counts(
        self, trial: Trial, axes: list[Axis], kind: str
    ) -> tuple[Counts, ...] | None:
        """The same for neurons or channels, of which a few counts are tried."""
        size = trial.sizes[kind]
        steps = [step for step in (1, *MULTIPLES) if size % step == 0 and step < size]
        for step in steps:
            if all(
                self._accepts(trial, axes, {kind: count})
                for count in {step, size - step, size // step // 2 * step or step}
            ):
                counts = tuple({kind: count} for count in range(step, size + 1, step))
                return None if step == 1 else counts
        good = [c for c in probe_counts(size) if self._accepts(trial, axes, {kind: c})]
        return tuple({kind: count} for count in sorted({*good, size}))


def _inner_counts(trial: Trial, *, every: bool = False) -> list[dict[str, int]]:
    """Smaller counts of neurons in experts, and of the experts, as far as values set them.

    Args:
        trial: Sets one of the two numbers, or both.
        every: All of them, in place of a few.
    """

    def fewer(size: int) -> Sequence[int]:
        return range(1, size) if every else probe_counts(size)

    inner, outer = trial.sizes
    experts = trial.sizes[outer]
    each = trial.sizes[inner] // experts
    widths = [*fewer(each), each] if inner in trial.keys else [each]
    numbers = [*fewer(experts), experts] if outer in trial.keys else [experts]
    return [
        {inner: number * width, outer: number}
        for number in numbers
        for width in widths
        if (number, width) != (experts, each)
    ]


def _single_kind(trial: Trial) -> str | None:
    """The kind of a trial of which only some counts are tried; None where all can be."""
    return next((kind for kind in trial.sizes if not KINDS[Kind(kind)].is_few), None)


def _differing(structure: Structure, base: Shapes, actual: Shapes) -> dict[str, str]:
    """Axes with a tensor that is not the one which the class builds from the config."""
    refused: dict[str, str] = {}
    for axis in structure.axes:
        if axis.adaptation is not None:
            refused[axis.name] = (
                f"{axis.adaptation.module} computes with sizes of all {KINDS[axis.kind].plural}, "
                "which are made outside of it"
            )
            continue
        for part in axis.slices:
            if base.get(part.tensor) != actual.get(part.tensor):
                refused[axis.name] = (
                    f"{part.tensor} is {actual.get(part.tensor)} in the model, but its config "
                    f"builds {base.get(part.tensor)}"
                )
                break
    return refused


def _reason_for_all(model: PreTrainedModel) -> str | None:
    if "gradnas" in stored(model.config):
        return "already pruned per layer"
    if any(config.is_heterogeneous for _, config in scopes(model.config)):
        return "its config already gives layers their own sizes"
    return None


def _line(error: Exception) -> str:
    """First line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
