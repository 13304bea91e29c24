"""Trials of config values: which values to change together, and what the class then builds.

Knows configs, classes and tensor shapes; models are built on the meta device, without weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.utils import logging

from ..surgery.rows import Shapes, shapes_of
from ..types import KINDS, PARENTS, Axis, Kind, Slice
from .values import candidates, dotted, real_key, stored

Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Trial:
    """Config values that may set the width of some axes.

    Attributes:
        sizes: Units per kind now; a kind before the one that it is nested in.
        keys: Dotted config key per kind; a kind without one keeps its size.
        copies: Kind per further dotted key.
        constants: Values written along.
    """

    sizes: Counts
    keys: Mapping[str, str]
    copies: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, int] = field(default_factory=dict)

    def values(self, counts: Counts) -> dict[str, int]:
        """Config values for the given counts."""
        written = {key: config_value(kind, counts) for kind, key in self.keys.items()}
        repeated = {key: counts[kind] for key, kind in self.copies.items()}
        return {**written, **repeated, **self.constants}

    def combinations(self) -> list[dict[str, int]]:
        """All counts below the sizes, those likeliest to be accepted first."""
        kind, *parents = self.sizes
        size = self.sizes[kind]
        if not parents:
            found = [{kind: count} for count in range(1, size)]
            return sorted(found, key=lambda c: (size % c[kind], abs(2 * c[kind] - size)))
        (parent,) = parents
        groups = self.sizes[parent]
        kept = range(1, groups + 1) if parent in self.keys else (groups,)
        found = [
            {kind: group * inside, parent: group}
            for group in kept
            for inside in range(1, size // groups + 1)
            if (group, inside) != (groups, size // groups)
        ]
        return sorted(
            found,
            key=lambda c: (size % c[kind] != 0, c[parent] == groups, abs(2 * c[kind] - size)),
        )


def config_value(kind: str, counts: Counts) -> int:
    """What a config writes for a count: all units, or those in one unit of the parent."""
    row = KINDS[Kind(kind)]
    parents = counts.get(str(row.parent)) if row.counts_each and row.parent else None
    return counts[kind] // max(parents, 1) if parents is not None else counts[kind]


def trials_of(path: str, config: PreTrainedConfig, axes: Mapping[str, Axis]) -> Iterator[Trial]:
    """Trials for every kind of unit whose values one (sub-)config may hold, in the order of kinds.

    Args:
        path: Dotted path of the config.
        config: The config.
        axes: Axes that no group has yet, by name; read again for every kind.
    """
    for kind, row in KINDS.items():
        if row.any_number:
            yield from _number_trials(kind, path, config, axes)
        elif row.counts_each and row.parent is not None:
            yield from _plain_trials(kind, path, config)
            yield from _inner_trials(kind, row.parent, path, config, axes)
        elif row.parent is not None:
            yield from _nested_trials(kind, row.parent, path, config, axes)
        elif kind not in PARENTS or any(KINDS[k].counts_each for k in _inside(kind)):
            yield from _plain_trials(kind, path, config)


def _nested_trials(
    kind: Kind, parent: Kind, path: str, config: PreTrainedConfig, axes: Mapping[str, Axis]
) -> Iterator[Trial]:
    """Trials for heads: with their own keys and values, or in KV groups."""
    name, outer = str(kind), str(parent)
    groups = candidates(config, parent)
    for key, size in candidates(config, kind).items():
        if size is None:
            continue
        keys = {name: dotted(path, key)}
        repeats = {dotted(path, other): name for other, value in groups.items() if value == size}
        plain = [Trial({name: size}, keys, repeats)]
        if repeats:
            plain.append(Trial({name: size}, keys))
        grouped = [
            Trial({name: size, outer: count}, {**keys, outer: dotted(path, other)})
            for other, count in groups.items()
            if count is not None
        ]
        parents = {axis.size for axis in axes.values() if axis.kind == parent}
        grouped += [Trial({name: size, outer: count}, keys) for count in sorted(parents)]
        for trial in (*plain, *grouped):
            yield trial
            yield from _explicit_width(trial, kind, path, config, axes)


def _inside(kind: Kind) -> list[Kind]:
    """Kinds that may be nested in a kind."""
    return [other for other, row in KINDS.items() if row.parent == kind]


def _inner_trials(
    kind: Kind, parent: Kind, path: str, config: PreTrainedConfig, axes: Mapping[str, Axis]
) -> Iterator[Trial]:
    """Trials for neurons in experts: with the number of both, or of one of the two."""
    name, outer = str(kind), str(parent)
    found = {axis.name: axis for axis in axes.values()}
    sizes = {
        (axis.size, found[axis.parent].size)
        for axis in axes.values()
        if axis.kind == kind and axis.parent in found
    }
    for size, parents in sorted(sizes, reverse=True):
        whole = {name: size, outer: parents}
        inner = [k for k, v in candidates(config, kind).items() if v == size // parents]
        outers = [k for k, v in candidates(config, parent).items() if v == parents]
        for key, other in product(inner, outers):
            yield Trial(whole, {name: dotted(path, key), outer: dotted(path, other)})
        for key in inner:
            yield Trial(whole, {name: dotted(path, key)})
        for key in outers:
            yield Trial(whole, {outer: dotted(path, key)})


def _explicit_width(
    trial: Trial, kind: Kind, path: str, config: PreTrainedConfig, axes: Mapping[str, Axis]
) -> Iterator[Trial]:
    """The trial with the width of a unit written out, where the config would derive it."""
    if not KINDS[kind].width_key:
        return
    key = real_key(config, KINDS[kind].width_key)
    if stored(config).get(key) is not None:
        return
    size = trial.sizes[kind]
    widths = {a.width for a in axes.values() if a.kind == kind and a.size == size}
    for width in sorted(widths):
        yield replace(trial, constants={dotted(path, key): width})


def _plain_trials(kind: Kind, path: str, config: PreTrainedConfig) -> Iterator[Trial]:
    """Trials for FFNs, without a size where the config leaves it to a default (GPT-2)."""
    name = str(kind)
    for key, size in candidates(config, kind).items():
        sizes = {} if size is None else {name: size}
        yield Trial(sizes, {name: dotted(path, key)})


def _number_trials(
    kind: Kind, path: str, config: PreTrainedConfig, axes: Mapping[str, Axis]
) -> Iterator[Trial]:
    """Trials for channels: every number, also in a list, that equals the size of an axis.

    After the single numbers two equal ones together, one of them in a list: a ResNet's stem and its
    first stage are one residual stream. An axis whose units hold several channels has no number.
    """
    name = str(kind)
    sizes = {a.size for a in axes.values() if a.kind == kind and a.per_unit == 1}
    found = {dotted(path, key): size for key, size in candidates(config, kind).items()}
    keys = {key: size for key, size in found.items() if size is not None and size in sizes}
    for key, size in keys.items():
        yield Trial({name: size}, {name: key})
    for first, second in combinations(keys, 2):
        if keys[first] == keys[second] and "0" in (first[-1], second[-1]):
            yield Trial({name: keys[first]}, {name: first}, copies={second: name})


def probe_counts(size: int) -> list[int]:
    """A few smaller widths of an FFN or of channels, the roundest first."""
    tried = (size // 2, size // 4, size - 64, size - 8, size - 1)
    return list(dict.fromkeys(count for count in tried if 0 < count < size))


def tensor_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    """Shapes of all parameters and buffers of a model, built without memory.

    Args:
        model_class: The class to build.
        config: Its config; a reloaded copy is used, as `from_pretrained` would read it.
    """
    return shapes_of(built(model_class, config))


def built(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """What a class builds from a config, without memory; arguments as of `tensor_shapes`."""
    with silence(), torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
        return model_class(type(config).from_dict(config.to_dict()))


def expected_shapes(
    base: Shapes, axes: Iterable[Axis], counts: Counts
) -> dict[str, tuple[int, ...]]:
    """Shapes when each axis keeps ``counts[kind]`` units.

    Slices of one tensor add up (fused projections); one that several axes list counts once (T5's
    shared position bias).
    """
    lost = {
        (part, (axis.size if not part.each else part.each) - _kept(axis, part, counts))
        for axis in axes
        for part in axis.slices
    }
    shapes = {name: list(shape) for name, shape in base.items()}
    for part, units in lost:
        shapes[part.tensor][part.dim] -= part.width * units
    return {name: tuple(shape) for name, shape in shapes.items()}


def _kept(axis: Axis, part: Slice, counts: Counts) -> int:
    """Units that own rows of a tensor along its dimension: in each matrix, if it is a stack."""
    kind = str(axis.kind)
    return config_value(kind, counts) if part.each else counts[kind]


@contextmanager
def silence() -> Iterator[None]:
    """Keep trial builds, which are expected to fail at times, from warning."""
    verbosity = logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
