"""Fewer layers in the words of a stock config: which values count them, and all that goes along.

Knows configs and classes, which are built on the meta device; reads no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ..errors import described
from ..surgery.rows import below
from ..types import Axis, Kind, StockGroup
from .trials import built
from .values import candidates, dotted, real_key, scopes, stored, sub_config

INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_index")
"""Attributes by which a module knows its place among the layers."""
FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
"""Config values that set the first so many layers apart."""
LAST = ("num_kv_shared_layers",)
"""Config values that set the last so many layers apart."""
PLACES = ("mlp_only_layers", "dense_layers", "full_attn_idxs", "cross_attention_layers")
"""Config values that list the places of layers."""


def layer_groups(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, axes: Sequence[Axis]
) -> tuple[list[StockGroup], dict[str, str]]:
    """Lists of layers whose number a config value sets, and the reason for every other layer.

    The class is built with some layers less: it has to have the tensors, and the plain attributes,
    of the layers that stay.

    Args:
        model_class: The class.
        config: The model's config.
        axes: Axes of layers.
    """
    groups: list[StockGroup] = []
    refused: dict[str, str] = {}
    for path in dict.fromkeys(_list_of(axis) for axis in axes):
        members = [axis for axis in axes if _list_of(axis) == path]
        key, reason = _key_of(model_class, config, path, members)
        if reason:
            refused |= {axis.name: reason for axis in members}
        else:
            names = tuple(axis.name for axis in members)
            groups.append(StockGroup(names, {str(Kind.LAYERS): key}))
    return groups, refused


def trim_config(config: PreTrainedConfig, key: str, stay: Sequence[int]) -> None:
    """Set a config to fewer layers in place.

    Args:
        config: The model's config.
        key: Dotted key of the number of layers.
        stay: Places of the layers that stay, sorted.
    """
    path, _, name = key.rpartition(".")
    scope = sub_config(config, path)
    values, count = stored(scope), stored(scope)[name]
    changed: dict[str, Any] = {name: len(stay)}
    for other, value in values.items():
        if _is_per_layer(value, count) and not other.startswith("_"):
            changed[other] = type(value)(value[place] for place in stay)
        elif other in PLACES and isinstance(value, list | tuple):
            changed[other] = type(value)(new for new, old in enumerate(stay) if old in value)
        elif other in FIRST and type(value) is int:
            changed[other] = sum(place < value for place in stay)
        elif other in LAST and type(value) is int:
            changed[other] = sum(place >= count - value for place in stay)
    for other, value in changed.items():
        setattr(scope, other, value)


def _is_per_layer(value: Any, count: int) -> bool:
    """Whether a value has an entry for each layer; fractions are ranges."""
    is_list = isinstance(value, list | tuple) and len(value) == count
    return is_list and not any(isinstance(entry, float) for entry in value)


def drop_layers(model: nn.Module, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> None:
    """Take the layers that are gone out of their lists, and count the others anew.

    Args:
        model: The cut model.
        axes: Its axes before the cut.
        kept: Kept units per axis name.
    """
    gone = [axis for axis in axes if axis.is_layer and not kept.get(axis.name, (0,))]
    for path in dict.fromkeys(map(_list_of, gone)):
        layers = model.get_submodule(path)
        lost = {place_of(axis) for axis in gone if _list_of(axis) == path}
        stay = [place for place in range(len(list(layers.children()))) if place not in lost]
        modules = [layers.get_submodule(str(place)) for place in stay]
        layers._modules.clear()
        for new, (old, module) in enumerate(zip(stay, modules, strict=True)):
            layers.add_module(str(new), module)
            for part, name in _numbered(module, old):
                setattr(part, name, new)


def place_of(layer: Axis) -> int:
    """Place of a layer in its list."""
    return int(layer.module.rpartition(".")[2])


def places_left(group: StockGroup, kept: Mapping[str, int], count: int) -> list[int]:
    """Places of the layers of a list that stay.

    Args:
        group: The layers that may go.
        kept: Kept units per axis name.
        count: All layers of the list.
    """
    gone = {
        int(name.rpartition(":")[0].rpartition(".")[2]) for name in group.axes if not kept[name]
    }
    return [place for place in range(count) if place not in gone]


def _list_of(layer: Axis) -> str:
    return layer.module.rpartition(".")[0]


def _numbered(module: nn.Module, place: int) -> Iterator[tuple[nn.Module, str]]:
    for part in module.modules():
        for name in INDICES:
            value = vars(part).get(name)
            if type(value) is int and value == place:
                yield part, name


# --- is it so? ------------------------------------------------------------------------------------


def _key_of(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    path: str,
    members: Sequence[Axis],
) -> tuple[str, str]:
    """The dotted key of the number of layers of a list, or why there is none."""
    reasons: list[str] = []
    try:
        whole = built(model_class, config)
        count = len(list(whole.get_submodule(path).children()))
    except Exception as error:  # any class may refuse in its own way
        return "", f"{model_class.__name__} cannot be built from its config: {described(error)}"
    for scope_path, scope in scopes(config):
        for name, value in candidates(scope, Kind.LAYERS).items():
            key = dotted(scope_path, real_key(scope, name))
            if value != count:
                continue
            wrong = _misfit(model_class, config, key, path, whole, members, count)
            if not wrong:
                return key, ""
            reasons.append(wrong)
    nothing = f"{type(config).__name__} has no value that sets the number of layers of {path}"
    return "", next(iter(reasons), nothing)


def _misfit(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    key: str,
    path: str,
    whole: PreTrainedModel,
    members: Sequence[Axis],
    count: int,
) -> str:
    """How models with fewer layers differ from the whole one without these; "" if they do not."""
    places = [place_of(axis) for axis in members]
    for gone in (places[-1:], places[1::2], places[:1]):
        stay = [place for place in range(count) if place not in gone]
        fewer = copy.deepcopy(config)
        try:
            trim_config(fewer, key, stay)
            small = built(model_class, fewer)
        except Exception as error:  # as above
            return f"{model_class.__name__} refuses {key}={len(stay)}: {described(error)}"
        wrong = _difference(_signature(whole), _signature(small), path, stay)
        if wrong:
            return f"with {key}={len(stay)}, {model_class.__name__} builds other {wrong}"
        if _has_cache(whole, config) and not _has_cache(small, fewer):
            return f"with {key}={len(stay)}, Transformers makes a cache of too few layers"
    return ""


def _has_cache(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether a cache that is made from a config has a place for every module that wants one."""
    try:
        decoder = model.get_decoder() if config.is_encoder_decoder else model
        places = [vars(m).get(name) for m in decoder.modules() for name in INDICES]
        most = max((place for place in places if type(place) is int), default=-1)
        return most < len(DynamicCache(config=config).layers)
    except Exception:  # classes refuse in their own ways
        return False


def _signature(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shapes and plain attributes of every module, by path."""
    found = {}
    for path, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        shapes = {n: tuple(x.shape) for n, x in tensors.items() if x is not None}
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str | None) and not name.startswith("_")
        }
        found[path] = {"": type(module).__name__, **plain, **shapes}
    return found


def _difference(
    whole: Mapping[str, dict[str, Any]],
    small: Mapping[str, dict[str, Any]],
    path: str,
    stay: Sequence[int],
) -> str:
    """The first module inside or outside of a list that is not what it was, in words."""
    numbers = {old: new for new, old in enumerate(stay)}
    wanted: dict[str, dict[str, Any]] = {}
    for name, values in whole.items():
        if not name.startswith(f"{path}."):
            wanted[name] = values
            continue
        place, _, rest = below(name, path).partition(".")
        old = int(place)
        if old in numbers:
            moved = ".".join(part for part in (path, str(numbers[old]), rest) if part)
            renumbered = {n: numbers[old] for n in INDICES if values.get(n) == old}
            wanted[moved] = {**values, **renumbered}
    for name in {**wanted, **small}:
        has, wants = small.get(name), wanted.get(name)
        if has is None or wants is None:
            return name
        for attribute in {**has, **wants}:
            found = has.get(attribute)
            if found != wants.get(attribute) and found != len(stay):  # a number of layers
                return f"{name}.{attribute}"
    return ""
