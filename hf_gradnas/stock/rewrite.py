"""Write a plan's widths into a config: pure functions over the config, no weights.

Knows upstream's words for per-layer widths (``per_layer_config``), which say what a layer has but
build nothing by themselves; the record under ``config.gradnas`` does that (see
`hf_gradnas.surgery.modeling_gradnas`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from inspect import getattr_static
from typing import Any

from transformers import DynamicCache, PreTrainedConfig, StaticCache

from ..errors import PlanError
from ..surgery.rows import gone_layers
from ..types import KINDS, Axis, Kind, Plan, StockGroup, StockSpace, Structure
from .layers import places_left, trim_config
from .trials import config_value, silence
from .values import (
    AxisKey,
    real_key,
    scopes,
    set_value,
    stored,
    sub_config,
)

Overrides = dict[int, dict[str, int]]

GLOBAL_ACCESS = "allow_global_per_layer_attribute_access"
REMOVED = (0, 1)
"""Widths to write for a removed sub-layer, the first that upstream can read."""


def write_stock(
    config: PreTrainedConfig, plan: Plan, structure: Structure, space: StockSpace
) -> None:
    """Set the plan's uniform widths on `config` in place.

    Args:
        config: Config of the model that `structure` and `space` were found on.
        plan: A plan whose axes keep equally many units wherever they share a config value.
        structure: The model's axes.
        space: What its class can express.

    Raises:
        PlanError: The class cannot express the plan; nothing was written.
    """
    structure, counts = _standing(plan, structure)
    values: dict[str, int] = {}
    layers = str(Kind.LAYERS)
    for group in space.groups:
        if layers in group.keys or not _members(group, structure):
            continue
        values.update(_values(group, _uniform_counts(group, counts, structure)))
    for name, reason in space.refused.items():
        if name not in counts:
            continue
        size = structure[name].size
        if counts[name] != size:
            raise PlanError(
                f"{name}: the plan keeps {counts[name]} of {size} units, but the stock class "
                f"cannot express that ({reason}); make the plan with layout='per_layer'."
            )
    for key, value in values.items():
        set_value(config, key, value)
    for group in space.groups:
        if layers in group.keys:
            key = group.keys[layers]
            number = stored(sub_config(config, key.rpartition(".")[0]))[key.rpartition(".")[2]]
            trim_config(config, key, places_left(group, counts, number))


def write_per_layer(
    config: PreTrainedConfig,
    plan: Plan,
    structure: Structure,
    keys: Mapping[str, AxisKey],
    *,
    space: StockSpace,
) -> None:
    """Write the plan's widths into `config` in place, layer by layer, in upstream's words.

    Each layer's counts go into ``per_layer_config`` under the class's own names. The global value
    becomes the maximum over layers where the class still builds with it and with the same head
    size (then every tensor it builds is at least as large as the cut model's), and stays what it
    was otherwise. The head size is written out where upstream would derive it from a layer's head
    count. What the vocabulary cannot say is left out: the two stacks of an encoder–decoder,
    cross-attentions, two different counts for one value of one layer.

    Args:
        config: Config of the model that the others were found on.
        plan: Kept units of any axis; an axis that it does not name stays whole.
        structure: The model's axes.
        keys: What `locate_axes` returned.
        space: What `find_stock_space` returned.
    """
    structure, counts = _standing(plan, structure)
    for group in space.groups:
        if str(Kind.LAYERS) in group.keys or not _members(group, structure):
            continue  # a layer that is gone is still in its place, and hands its input on
        for key, value in _global_values(group, counts, structure).items():
            set_value(config, key, value)
    native = native_layers(config)
    for path in sorted({key.config for key in keys.values()}):
        scope = sub_config(config, path)
        overrides = _differing(_overrides(path, structure, counts, keys), scope)
        if overrides:
            _write_head_dim(scope, path, structure, keys)
            _write_overrides(config, scope, overrides, is_native=path in native)


def _standing(plan: Plan, structure: Structure) -> tuple[Structure, dict[str, int]]:
    """The structure without what is in layers that are gone, and how many units its axes keep."""
    gone = gone_layers(structure.axes, plan.kept)
    axes = tuple(axis for axis in structure.axes if axis.within not in gone)
    kept = plan.counts()
    return replace(structure, axes=axes), {a.name: kept.get(a.name, a.size) for a in axes}


def _members(group: StockGroup, structure: Structure) -> dict[str, list[Axis]]:
    """Axes of a group by kind."""
    members: dict[str, list[Axis]] = defaultdict(list)
    for axis in structure.axes:
        if axis.name in group.axes:
            members[axis.kind.value].append(axis)
    return dict(members)


def _uniform_counts(
    group: StockGroup, counts: Mapping[str, int], structure: Structure
) -> dict[str, int]:
    """The one count per kind that all axes of a group keep.

    Raises:
        PlanError: They differ, or the class does not accept them.
    """
    found: dict[str, int] = {}
    for kind, axes in _members(group, structure).items():
        first = axes[0]
        found[kind] = counts[first.name]
        for axis in axes:
            if counts[axis.name] != found[kind]:
                raise PlanError(
                    f"{axis.name}: keeps {counts[axis.name]} {kind}, but {first.name} keeps "
                    f"{found[kind]} and the stock class has one number for both; make the plan "
                    "with layout='stock', or apply it with layout='per_layer'."
                )
    if not _accepts(group, found):
        told = ", ".join(f"{count} {kind}" for kind, count in found.items())
        raise PlanError(
            f"{group.axes[0]}: the plan keeps {told}, but the stock class accepts "
            f"{_told(group)}; make the plan with layout='stock', or choose layout='per_layer'."
        )
    return found


def _accepts(group: StockGroup, counts: Mapping[str, int]) -> bool:
    if group.allowed is None:
        return all(count > 0 for count in counts.values())
    return dict(counts) in [dict(allowed) for allowed in group.allowed]


def _told(group: StockGroup) -> str:
    if group.allowed is None:
        return "at least 1"
    return " or ".join(
        "/".join(f"{count} {kind}" for kind, count in allowed.items()) for allowed in group.allowed
    )


def _values(group: StockGroup, counts: Mapping[str, int]) -> dict[str, int]:
    """Config values that set the group's widths."""
    values = {key: config_value(kind, counts) for kind, key in group.keys.items()}
    values.update({key: counts[kind] for key, kind in group.copies.items()})
    return {**values, **group.constants}


def _global_values(
    group: StockGroup, counts: Mapping[str, int], structure: Structure
) -> dict[str, int]:
    """Values of the largest layer, or none when the class would not build with them."""
    largest = {
        kind: max(1, *(counts[axis.name] for axis in axes))
        for kind, axes in _members(group, structure).items()
    }
    for kind, axes in _members(group, structure).items():  # the largest width, in the most experts
        outer = str(KINDS[Kind(kind)].parent)
        if KINDS[Kind(kind)].counts_each and outer in largest:
            largest[kind] = largest[outer] * max(1, *(_written(axis, counts) for axis in axes))
    return _values(group, largest) if _accepts(group, largest) else {}


def _overrides(
    path: str, structure: Structure, counts: Mapping[str, int], keys: Mapping[str, AxisKey]
) -> Overrides:
    """Counts per layer and value of one (sub-)config; what contradicts itself is left out."""
    said: dict[tuple[int, str], set[int]] = defaultdict(set)
    for axis in structure.axes:
        key = keys.get(axis.name)
        crossing = axis.removal is not None and axis.removal.cross
        if key is None or key.config != path or crossing:
            continue
        for layer in key.layers:
            for name in (key.key, *key.copies):
                said[layer, name].add(_written(axis, counts))
    overrides: Overrides = defaultdict(dict)
    for (layer, name), values in said.items():
        if len(values) == 1:
            overrides[layer][name] = min(values)
    return overrides


def _written(axis: Axis, counts: Mapping[str, int]) -> int:
    """What a config writes for an axis: its units, or those in one unit of its parent."""
    if axis.parent is not None and KINDS[axis.kind].counts_each:
        return counts[axis.name] // max(counts[axis.parent], 1)
    return counts[axis.name]


def _differing(overrides: Overrides, scope: PreTrainedConfig) -> Overrides:
    """The overrides that say more than the global values do, or take an earlier one back."""
    values, before = stored(scope), _written_before(scope)
    differing = {
        layer: {
            name: count
            for name, count in entries.items()
            if count != values[name] or name in before.get(layer, {})
        }
        for layer, entries in overrides.items()
    }
    return {layer: entries for layer, entries in differing.items() if entries}


def _written_before(scope: PreTrainedConfig) -> Overrides:
    """Per-layer values that the config holds already (upstream's own, or of an earlier cut)."""
    written: Mapping[str, Any] = scope.to_dict().get("per_layer_config") or {}
    return {int(layer): dict(entries) for layer, entries in written.items()}


def native_layers(config: PreTrainedConfig) -> dict[str, Overrides]:
    """Values per layer that a config and those in it held before any cut; "" is the config."""
    record = stored(config).get("gradnas")
    if record is not None:
        return dict(record.get("native", {}))
    held = {path: _written_before(scope) for path, scope in scopes(config)}
    return {path: layers for path, layers in held.items() if layers}


def _merge(before: Overrides, overrides: Overrides) -> Overrides:
    return {
        layer: {**before.get(layer, {}), **overrides.get(layer, {})}
        for layer in sorted({*before, *overrides})
    }


def _write_head_dim(
    scope: PreTrainedConfig, path: str, structure: Structure, keys: Mapping[str, AxisKey]
) -> None:
    """Write the head size out, which upstream would take from ``hidden_size / heads`` per layer."""
    widths: dict[str, set[int]] = {}
    for axis in structure.axes:
        key = KINDS[axis.kind].width_key
        if key and axis.name in keys and keys[axis.name].config == path:
            widths.setdefault(real_key(scope, key), set()).add(_head_width(scope, axis))
    for key, found in widths.items():
        is_computed = isinstance(getattr_static(type(scope), key, None), property)
        if not is_computed and stored(scope).get(key) is None and len(found) == 1:
            setattr(scope, key, found.pop())


def _head_width(scope: PreTrainedConfig, axis: Axis) -> int:
    """Width of one head of an axis, whose units may be several that go together."""
    values = stored(scope)
    hidden, heads = (
        values.get(real_key(scope, name)) for name in ("hidden_size", "num_attention_heads")
    )
    if not (isinstance(hidden, int) and isinstance(heads, int)):
        return axis.width
    derived = hidden // heads
    return derived if heads > axis.size and axis.width % max(derived, 1) == 0 else axis.width


def _write_overrides(
    config: PreTrainedConfig, scope: PreTrainedConfig, overrides: Overrides, *, is_native: bool
) -> None:
    """Write overrides, with the first number for removed sub-layers that upstream can read.

    What the config held for a layer before, a None among it, stays as it was. Where layers had
    sizes of their own by their type, these stay alike, or nothing is written.
    """
    failing, by_type = _unreadable(config), is_native and _has_even_types(scope)
    before, is_allowed = _written_before(scope), GLOBAL_ACCESS in stored(scope)
    # Third parties read global values, and a stock class still fails loudly on shapes.
    setattr(scope, GLOBAL_ACCESS, True)
    for removed in REMOVED:
        written = {
            layer: {name: count or removed for name, count in entries.items()}
            for layer, entries in overrides.items()
        }
        scope.per_layer_config = _merge(before, written)
        if _unreadable(config) <= failing and (not by_type or _has_even_types(scope)):
            return
    scope.per_layer_config = before or None
    if not is_allowed:
        del vars(scope)[GLOBAL_ACCESS]


def _unreadable(config: PreTrainedConfig) -> set[str]:
    """Names of upstream's readers that fail on `config`."""
    failing = set()
    with silence():
        for name, read in READERS.items():
            try:
                read(type(config).from_dict(config.to_dict()))
            except Exception:  # config classes refuse in their own ways
                failing.add(name)
    return failing


def _has_even_types(scope: PreTrainedConfig) -> bool:
    """Whether all layers of a type have the same sizes, as classes may ask of them (Gemma 4)."""
    try:
        for kind in dict.fromkeys(stored(scope).get("layer_types") or ()):
            scope.per_layer_config[kind]
    except ValueError:
        return False
    return True


def _read_head_shapes(config: PreTrainedConfig) -> None:
    """What generation asks of each layer (``get_head_shapes``, from 5.2x on)."""
    for layer in config.get_text_config(decoder=True).per_layer_config:
        if getattr(layer, "head_dim", None) is None:
            divmod(layer.hidden_size, layer.num_attention_heads)


READERS = {
    "validate_architecture": lambda config: config.validate_architecture(),
    "head shapes": _read_head_shapes,
    "dynamic cache": lambda config: DynamicCache(config=config),
    "static cache": lambda config: StaticCache(config=config, max_cache_len=1),
}
