"""Equal layers of a model: a config with fewer of them, and what holds of one said of all.

Knows models on the meta device and configs; runs nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from ..errors import StructureError, described
from ..stock.trials import silence
from ..stock.values import scopes, stored
from ..surgery.rows import shapes_of
from ..types import Refusal, StockSpace, Structure

FEWEST = 2
"""Layers that stay of a stack at least: the first is often unlike the others."""


class NeedsWeightsError(StructureError):
    """The model can only be examined with its weights."""


class SpansLayersError(StructureError):
    """What holds of some layers says nothing of the others."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of layers of which only the first were kept.

    Attributes:
        path: Its path in the model.
        kept: How many layers were kept.
        like: For every layer of the whole stack, a kept one that is equal to it.
    """

    path: str
    kept: int
    like: tuple[int, ...]

    def member_of(self, path: str) -> int | None:
        """Index of the layer that a path is in; None if it is in none."""
        found = self._pattern(r"(\d+)").match(path)
        return None if found is None else int(found[1])

    def moved(self, text: str, old: int, new: int) -> str:
        """A text with paths in one layer changed to those in another."""
        return self._pattern(str(old)).sub(f"{self.path}.{new}", text)

    def _pattern(self, index: str) -> re.Pattern[str]:
        return re.compile(rf"(?<![\w.]){re.escape(self.path)}\.{index}(?!\d)")


def build_unloaded(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device, in eval mode; it takes no memory.

    Raises:
        NeedsWeightsError: The class cannot be built from it.
    """
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    try:
        with silence(), torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
            model = cls(type(config).from_dict(config.to_dict()))
        model.tie_weights()
    except Exception as error:  # classes refuse in their own ways
        raise NeedsWeightsError(
            f"{cls.__name__}: cannot be built without weights ({described(error)}); omit "
            "--no-weights, so that they are loaded."
        ) from error
    model.config.dtype = dtype
    return model.to(dtype).eval()


# --- fewer layers ---------------------------------------------------------------------------------


def shortened(model: PreTrainedModel) -> tuple[PreTrainedConfig, tuple[Stack, ...]]:
    """A config that builds the first layers of every stack only, so many that all kinds are there.

    Which value counts a stack's layers is measured: the class is built with a smaller one, and
    everything else has to stay as it is.

    Args:
        model: The whole model, unloaded.
    """
    config, short = copy.deepcopy(model.config), model
    stacks: list[Stack] = []
    done: set[str] = set()
    for path, layers in model.named_modules():
        is_inside = any(path.startswith(f"{stack.path}.") for stack in stacks)
        if not isinstance(layers, nn.ModuleList) or is_inside or path in done:
            continue
        like = _alike(layers, _entries(model.config, len(layers)))
        kept = max(FEWEST, max(like, default=0) + 1)
        if kept >= len(layers):
            continue
        for trial in _with_fewer(config, len(layers), kept):
            found = _smaller(type(model), trial, short, kept)
            if found is not None and path in found[1]:
                short, paths = found
                config, done = trial, done | paths
                stacks += [_stack(model, each, kept) for each in sorted(paths)]
                break
    return config, tuple(stacks)


def _stack(model: PreTrainedModel, path: str, kept: int) -> Stack:
    layers = cast(nn.ModuleList, model.get_submodule(path))
    like = _alike(layers, _entries(model.config, len(layers)), before=kept)
    return Stack(path, kept, like)


def _alike(layers: nn.ModuleList, entries: Sequence[Any], before: int = 0) -> tuple[int, ...]:
    """For every layer the first that is equal to it, or the last of those before an index."""
    known: dict[Any, int] = {}
    like = []
    settings = _settings(layers)
    for index, layer in enumerate(layers):
        key = _parts(layer), settings[index], entries[index]
        if key not in known or index < before:
            known[key] = index
        like.append(known[key])
    return tuple(range(before)) + tuple(like[before:])


def _parts(layer: nn.Module) -> Any:
    """Classes and shapes of all modules of a layer."""
    return tuple(
        (
            path,
            type(module),
            tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)),
        )
        for path, module in layer.named_modules()
    )


def _settings(layers: nn.ModuleList) -> list[tuple[Any, ...]]:
    """Plain settings of all modules of each layer, but for those that are the layer's own index."""
    found = [
        {
            (path, name): value
            for path, module in layer.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, bool | int | str)
        }
        for layer in layers
    ]
    keys = set().union(*found)
    indices = {key for key in keys if all(d.get(key) == n for n, d in enumerate(found))}
    return [tuple(sorted((k, str(d[k])) for k in d.keys() - indices)) for d in found]


def _entries(config: PreTrainedConfig, length: int) -> list[tuple[Any, ...]]:
    """What lists of the configs with one entry per layer say of each."""
    lists = [
        value
        for _, scope in scopes(config)
        for value in stored(scope).values()
        if isinstance(value, list | tuple) and len(value) == length
    ]
    return [tuple(str(value[index]) for value in lists) for index in range(length)]


def _with_fewer(config: PreTrainedConfig, length: int, kept: int) -> Iterator[PreTrainedConfig]:
    """Configs with a smaller number in place of one that equals a length, and shorter lists."""
    for place, (_, scope) in enumerate(scopes(config)):
        for name, value in stored(scope).items():
            if type(value) is int and value == length:
                trial = copy.deepcopy(config)
                inner = [other for _, other in scopes(trial)][place]
                setattr(inner, name, kept)
                for key, entries in list(stored(inner).items()):
                    if isinstance(entries, list | tuple) and len(entries) == length:
                        setattr(inner, key, entries[:kept])
                yield trial


def _smaller(
    cls: type[PreTrainedModel], config: PreTrainedConfig, model: PreTrainedModel, kept: int
) -> tuple[PreTrainedModel, set[str]] | None:
    """A model that has fewer layers than `model`, with the paths of its shorter stacks.

    None if the class refuses the config, or anything else is not as it was.
    """
    try:
        short = build_unloaded(cls, config)
    except NeedsWeightsError:
        return None
    lists = {p: m for p, m in short.named_modules() if isinstance(m, nn.ModuleList)}
    paths = {
        path
        for path, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        if path in lists and len(lists[path]) == kept < len(layers)
    }
    wanted = {
        name: shape
        for name, shape in shapes_of(model).items()
        if not any(_is_beyond(name, path, kept) for path in paths)
    }
    return (short, paths) if paths and shapes_of(short) == wanted else None


def _is_beyond(name: str, path: str, kept: int) -> bool:
    index = name.removeprefix(f"{path}.").partition(".")[0]
    return name.startswith(f"{path}.") and index.isdigit() and int(index) >= kept


# --- all layers again -----------------------------------------------------------------------------


def said_of_all(
    structure: Structure, space: StockSpace, stacks: Sequence[Stack]
) -> tuple[Structure, StockSpace]:
    """Structure and stock space of the model with all layers.

    Raises:
        SpansLayersError: Units of an axis are in several layers of a stack.
    """
    for stack in stacks:
        inner = [axis for axis in structure.axes if not axis.is_layer]
        whole = [axis for axis in structure.axes if axis.is_layer]
        axes = [
            axis for part in (inner, whole) for axis in _for_all(part, stack, lambda a: a.module)
        ]
        for axis in inner:
            tensors = (part.tensor for part in axis.slices if part.tensor != axis.tied)
            _check_within(axis.name, axis.module, tensors, stack)
        unpruned = dict(_for_all(list(structure.unpruned.items()), stack, lambda item: item[0]))
        refusals = _for_all(structure.refusals, stack, _place)
        structure = Structure(tuple(axes), tuple(refusals), unpruned)
        places = list(space.refused)
        kept = list(range(len(places)))
        reasons = [space.refused[places[n]] for n in _for_all(kept, stack, places.__getitem__)]
        space = StockSpace(
            tuple(
                replace(group, axes=tuple(_for_all(group.axes, stack, str)))
                for group in space.groups
            ),
            # The reason is one for all layers, and names a tensor of the first.
            dict(zip(_for_all(list(space.refused), stack, str), reasons, strict=True)),
        )
    return structure, space


def _place(refusal: Refusal) -> str:
    return refusal.module


def _check_within(name: str, module: str, tensors: Iterable[str], stack: Stack) -> None:
    own = stack.member_of(module)
    inside = {stack.member_of(tensor) for tensor in tensors} - {None}
    if inside - {own}:
        raise SpansLayersError(
            f"{name}: its units are in several layers of {stack.path}; examine all of them."
        )


def _for_all(items: Sequence[Any], stack: Stack, place: Callable[[Any], str]) -> list[Any]:
    """Items in their order, those of layers that were left out after those of the last kept one."""
    by_layer: dict[int, list[Any]] = {}
    for item in items:
        index = stack.member_of(place(item))
        if index is not None:
            by_layer.setdefault(index, []).append(item)
    more = [
        _changed(item, partial(stack.moved, old=old, new=new))
        for new, old in enumerate(stack.like)
        if new >= stack.kept
        for item in by_layer.get(old, ())
    ]
    last = max(by_layer, default=-1)
    ends = [n for n, item in enumerate(items) if stack.member_of(place(item)) == last]
    end = ends[-1] + 1 if last >= 0 else len(items)
    return [*items[:end], *more, *items[end:]]


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """The same frozen data with every text in it changed."""
    if isinstance(value, str) and not isinstance(value, Enum):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_changed(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        new = {f.name: _changed(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **new)
    if isinstance(value, Mapping):
        return {_changed(k, change): _changed(v, change) for k, v in value.items()}
    return value
