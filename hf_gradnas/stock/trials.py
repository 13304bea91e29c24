"""Trials of config values: which values to change together, and what the class then builds.

Knows configs, classes and tensor shapes; models are built on the meta device, without weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.utils import logging

from ..types import Axis, Kind
from .values import HEAD_DIM, candidates, dotted, real_key, stored

Shapes = Mapping[str, tuple[int, ...]]
Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Trial:
    """Config values that may set the width of some axes.

    Attributes:
        sizes: Units per kind now.
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
        written = {key: counts[kind] for kind, key in self.keys.items()}
        repeated = {key: counts[kind] for key, kind in self.copies.items()}
        return {**written, **repeated, **self.constants}

    def combinations(self) -> list[dict[str, int]]:
        """All counts below the sizes, those likeliest to be accepted first."""
        heads = self.sizes[Kind.HEADS]
        groups = self.sizes.get(Kind.KV_GROUPS)
        if groups is None:
            found = [{"heads": count} for count in range(1, heads)]
            return sorted(found, key=lambda c: (heads % c["heads"], abs(2 * c["heads"] - heads)))
        kept = range(1, groups + 1) if Kind.KV_GROUPS in self.keys else (groups,)
        found = [
            {"heads": group * inside, "kv_groups": group}
            for group in kept
            for inside in range(1, heads // groups + 1)
            if (group, inside) != (groups, heads // groups)
        ]
        return sorted(
            found,
            key=lambda c: (
                heads % c["heads"] != 0,
                c["kv_groups"] == groups,
                abs(2 * c["heads"] - heads),
            ),
        )


def head_trials(path: str, config: PreTrainedConfig, axes: Mapping[str, Axis]) -> Iterator[Trial]:
    """Trials for heads: with their own keys and values, or in KV groups."""
    groups = candidates(config, Kind.KV_GROUPS)
    for name, heads in candidates(config, Kind.HEADS).items():
        if heads is None:
            continue
        keys = {"heads": dotted(path, name)}
        repeats = {dotted(path, key): "heads" for key, value in groups.items() if value == heads}
        plain = [Trial({"heads": heads}, keys, repeats)]
        if repeats:
            plain.append(Trial({"heads": heads}, keys))
        grouped = [
            Trial({"heads": heads, "kv_groups": count}, {**keys, "kv_groups": dotted(path, key)})
            for key, count in groups.items()
            if count is not None
        ]
        parents = {axis.size for axis in axes.values() if axis.kind == Kind.KV_GROUPS}
        grouped += [Trial({"heads": heads, "kv_groups": size}, keys) for size in sorted(parents)]
        for trial in (*plain, *grouped):
            yield trial
            yield from _explicit_head_dim(trial, path, config, axes)


def _explicit_head_dim(
    trial: Trial, path: str, config: PreTrainedConfig, axes: Mapping[str, Axis]
) -> Iterator[Trial]:
    """The trial with the head size written out, where the config would derive it."""
    key = real_key(config, HEAD_DIM)
    if stored(config).get(key) is not None:
        return
    heads = trial.sizes["heads"]
    widths = {a.width for a in axes.values() if a.kind == Kind.HEADS and a.size == heads}
    for width in sorted(widths):
        yield replace(trial, constants={dotted(path, key): width})


def neuron_trials(path: str, config: PreTrainedConfig) -> Iterator[Trial]:
    """Trials for FFNs, without a size where the config leaves it to a default (GPT-2)."""
    for name, size in candidates(config, Kind.NEURONS).items():
        sizes = {} if size is None else {"neurons": size}
        yield Trial(sizes, {"neurons": dotted(path, name)})


def channel_trials(
    path: str, config: PreTrainedConfig, axes: Mapping[str, Axis]
) -> Iterator[Trial]:
    """Trials for channels: every number, also in a list, that equals the size of an axis.

    After the single numbers two equal ones together, one of them in a list: a ResNet's stem and its
    first stage are one residual stream. An axis whose units hold several channels has no number.
    """
    sizes = {a.size for a in axes.values() if a.kind == Kind.CHANNELS and a.width == 1}
    found = candidates(config, Kind.CHANNELS)
    keys = {dotted(path, key): size for key, size in found.items() if size in sizes}
    for key, size in keys.items():
        yield Trial({"channels": size or 0}, {"channels": key})
    for first, second in combinations(keys, 2):
        if keys[first] == keys[second] and "0" in (first[-1], second[-1]):
            trial = Trial({"channels": keys[first] or 0}, {"channels": first})
            yield replace(trial, copies={second: "channels"})


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
    with silence(), torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
        model = model_class(type(config).from_dict(config.to_dict()))
    return shapes_of(model)


def expected_shapes(
    base: Shapes, axes: Iterable[Axis], counts: Counts
) -> dict[str, tuple[int, ...]]:
    """Shapes when each axis keeps ``counts[kind]`` units.

    Slices of one tensor add up (fused projections); one that several axes list counts once (T5's
    shared position bias).
    """
    lost = {(part, axis.size - counts[axis.kind]) for axis in axes for part in axis.slices}
    shapes = {name: list(shape) for name, shape in base.items()}
    for part, units in lost:
        shapes[part.tensor][part.dim] -= part.width * units
    return {name: tuple(shape) for name, shape in shapes.items()}


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Shapes of all parameters and buffers, tied ones under each of their names."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: tuple(tensor.shape) for name, tensor in named}


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
