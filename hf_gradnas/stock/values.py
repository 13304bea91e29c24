"""Values of a config: names that may hold a count, and which axis and layer each speaks of.

Knows configs, and by what names a kind is counted in them (`KINDS`); reads no weights. Whether a
value really sets a width is measured in `hf_gradnas.stock.space`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..types import KINDS, Axis, Kind, StockSpace, Structure

LAYERS = "num_hidden_layers"


@dataclass(frozen=True, slots=True)
class AxisKey:
    """Where a config speaks of an axis.

    Attributes:
        config: Path of the sub-config, empty for the model's own config.
        key: Real name of the value (``n_head``, not its alias ``num_attention_heads``).
        layers: Indices below ``num_hidden_layers`` of the layers that run this module: one, all of
            them for a shared module (ALBERT), none when the config has no such index for it.
        copies: Real names of further values that repeat the count.
    """

    config: str
    key: str
    layers: tuple[int, ...] = ()
    copies: tuple[str, ...] = ()


def real_key(config: PreTrainedConfig, name: str) -> str:
    """Name under which `config` stores the value called `name`."""
    return type(config).attribute_map.get(name, name)


def stored(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The values of `config` by real name.

    Reading them here instead of through attributes keeps configs with per-layer values silent.
    """
    return vars(config)


def dotted(path: str, key: str) -> str:
    """Path of a value inside a config that may be in a sub-config."""
    return f"{path}.{key}" if path else key


def sub_config(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    """The sub-config at a dotted path, or `config` itself for the empty path."""
    for part in filter(None, path.split(".")):
        config = stored(config)[part]
    return config


def set_value(config: PreTrainedConfig, key: str, value: int) -> None:
    """Write the value at a dotted key in place; a list gets a new one with that entry changed."""
    path, _, name = key.rpartition(".")
    if not name.isdigit():
        setattr(sub_config(config, path), name, value)
        return
    path, _, entries = path.rpartition(".")
    owner = sub_config(config, path)
    values = list(stored(owner)[entries])
    values[int(name)] = value
    setattr(owner, entries, type(stored(owner)[entries])(values))


def scopes(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A config and, depth first, its sub-configs, each with its dotted path."""
    yield path, config
    for name in type(config).sub_configs:
        inner = stored(config).get(name)
        if isinstance(inner, PreTrainedConfig):
            yield from scopes(inner, dotted(path, name))


def candidates(config: PreTrainedConfig, kind: Kind) -> dict[str, int | None]:
    """Real names and values that may hold counts of `kind`; None where a default stands in.

    Channels have no names of their own: any number counts, and every entry of a list of numbers
    (``hidden_sizes.1``).
    """
    row = KINDS[kind]
    if row.any_number:
        return _numbers(stored(config))
    found: dict[str, int | None] = {}
    values = stored(config)
    # Whisper has no count of KV groups of its own: there the name is an alias of the heads'.
    nested = [k for k, row in KINDS.items() if row.parent == kind and not row.counts_each]
    taken = {key for other in nested for key in candidates(config, other)}
    for name in row.config_names:
        key = real_key(config, name)
        value = values.get(key, "absent")
        if key in taken:
            continue
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            found[key] = value
    return found


def _numbers(values: Mapping[str, Any]) -> dict[str, int | None]:
    """All positive whole numbers of a config, those in lists by their index."""
    found: dict[str, int | None] = {}
    for name, value in values.items():
        if name.startswith("_"):
            continue
        if type(value) is int and value > 0:
            found[name] = value
        elif isinstance(value, list | tuple) and all(type(entry) is int for entry in value):
            found |= {f"{name}.{index}": entry for index, entry in enumerate(value) if entry > 0}
    return found


def locate_axes(
    model: PreTrainedModel, structure: Structure, space: StockSpace
) -> dict[str, AxisKey]:
    """Find for every axis the config value that counts its units, and the layers it belongs to.

    Unlike `find_stock_space`, this also answers for axes that the stock class cannot express
    (BERT's heads). Axes of which the config has no word are left out, and all channels: they stand
    in stages, which a value per layer cannot count.

    Args:
        model: The model, cut or not; only its modules' names and configs are read.
        structure: Its axes.
        space: What `find_stock_space` measured; its keys win over names.
    """
    measured = {name: group for group in space.groups for name in group.axes}
    modules = dict(model.named_modules())
    located: dict[str, AxisKey] = {}
    for axis in structure.axes:
        if KINDS[axis.kind].any_number:
            continue
        if axis.name in measured and axis.kind in measured[axis.name].keys:
            group = measured[axis.name]
            path, _, key = group.keys[axis.kind].rpartition(".")
            copies = tuple(
                copy.rpartition(".")[2] for copy, kind in group.copies.items() if kind == axis.kind
            )
        else:
            path = _scope_of(model, axis, modules)
            named = _named_key(sub_config(model.config, path), axis)
            if named is None:
                continue
            key, copies = named
        layers = _layers(sub_config(model.config, path), axis, structure, modules)
        located[axis.name] = AxisKey(path, key, layers, copies)
    return located


def _scope_of(model: PreTrainedModel, axis: Axis, modules: Mapping[str, nn.Module]) -> str:
    """Path of the config that the nearest enclosing model was built from."""
    known = list(scopes(model.config))
    for path in _enclosing(axis.module):
        config = vars(modules[path]).get("config") if path in modules else None
        same = [place for place, scope in known if scope is config]
        # Some classes hand their parts a copy of the config (T5's stacks).
        same += [place for place, scope in known if type(scope) is type(config)]
        if same:
            return same[0]
    return ""


def _enclosing(path: str) -> Iterator[str]:
    """A module path and those of the modules around it, innermost first, ending with the root."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield path


def _named_key(config: PreTrainedConfig, axis: Axis) -> tuple[str, tuple[str, ...]] | None:
    """The value that counts the axis's units by name and number, and values that repeat it."""
    values = candidates(config, axis.kind)
    size = next((part.each for part in axis.slices if part.each), axis.size)
    exact = [key for key, value in values.items() if value == size]
    # After a cut the config keeps a maximum; a default (None) may stand for any number.
    loose = [key for key, value in values.items() if value is None or value > size]
    words = set(axis.module.split("."))
    keys = exact or loose
    keys.sort(key=lambda key: key.partition("_")[0] not in words)  # stable: encoder_, decoder_
    if not keys:
        return None
    copies: tuple[str, ...] = ()
    parent = KINDS[axis.kind].parent
    if parent is not None and axis.parent is None and not KINDS[axis.kind].counts_each:
        groups = candidates(config, parent)
        copies = tuple(key for key, value in groups.items() if value == values[keys[0]])
    return keys[0], copies


def _layers(
    config: PreTrainedConfig, axis: Axis, structure: Structure, modules: Mapping[str, nn.Module]
) -> tuple[int, ...]:
    """Layers of the stack counted by ``num_hidden_layers`` that run the axis's module."""
    values = stored(config)
    depth = values.get(real_key(config, LAYERS))
    if not isinstance(depth, int) or values.get("is_encoder_decoder") is True:
        return ()  # two stacks share one count there: an index would be ambiguous
    for path in _enclosing(axis.module):
        outer, _, index = path.rpartition(".")
        stack = modules.get(outer)
        if isinstance(stack, nn.ModuleList) and len(stack) == depth and index.isdigit():
            return (int(index),)
    alone = sum(other.kind == axis.kind for other in structure.axes) == 1
    return tuple(range(depth)) if alone else ()
