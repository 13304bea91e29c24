"""Bytes of keys and values that a model keeps of every token, as a closed form of kept units.

What is kept is seen in a trace, in the calls of the cache. Knows nothing of architectures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..structure.trace import Cached
from ..types import KINDS, PARENTS, Axis, CostModel
from .closed_form import with_layers


@contextmanager
def caching(model: nn.Module) -> Iterator[None]:
    """Run a model that can have a cache with one, whatever its config says."""
    with ExitStack() as stack:
        if isinstance(model, PreTrainedModel):  # not all configs: a copy of an encoder's refuses it
            for config in (model.config, model.config.get_text_config(decoder=True)):
                if hasattr(config, "use_cache"):
                    stack.callback(setattr, config, "use_cache", config.use_cache)
                    config.use_cache = True
        yield


def cache_cost(axes: Sequence[Axis], cached: Sequence[Cached], *, layout: str) -> CostModel:
    """Bytes that a cache grows by for every token; of encoder-decoders one token of each side.

    They are those of the KV groups, or of the heads where each has keys and values of its own. What
    an attention keeps for all its heads together goes with the last of them.

    Args:
        axes: All axes.
        cached: What one forward of the whole model cached.
        layout: In ``"per_layer"`` an attention that lost all its heads keeps the cache's length.
    """
    per_unit, while_kept = {axis.name: 0.0 for axis in axes}, dict[str, float]()
    layers = {axis.name: 0.0 for axis in axes if axis.is_layer}
    owners: dict[str, list[Axis]] = {}
    for axis in axes:
        if _has_keys(axis):
            owners.setdefault(axis.module, []).append(axis)
    for entry in cached:
        place = max((m for m in owners if _is_in(entry.module, m)), key=len, default="")
        there = owners.get(place, [])
        least = entry.least if layout == "per_layer" else 0.0
        owner = next((axis for axis in _outer_first(there) if axis.size == entry.heads), None)
        if owner is not None:
            per_unit[owner.name] += entry.bytes / owner.size
        for axis in there:
            if axis.removal is not None:
                once = 0.0 if owner is not None else entry.bytes
                rest = 0.0 if axis.removal.cross else least
                while_kept[axis.name] = while_kept.get(axis.name, 0.0) + once - rest
        for layer in layers:
            if _is_in(entry.module, layer.rpartition(":")[0]):
                layers[layer] += entry.bytes - least
    variable = sum(per_unit[axis.name] * axis.size for axis in axes) + sum(while_kept.values())
    total = sum(entry.bytes for entry in cached)
    model = CostModel("kv_cache", total - variable, per_unit, while_kept, unit="bytes per token")
    model = with_layers(model, axes, layers)
    parts = {_REST: model.constant} if model.constant > 0 else {}
    return replace(model, parts=parts)


_REST = "attentions that are not pruned, or keep the cache's length,"


def _has_keys(axis: Axis) -> bool:
    return KINDS[axis.kind].attends or (axis.kind in PARENTS and not KINDS[axis.kind].is_routed)


def _outer_first(axes: Sequence[Axis]) -> list[Axis]:
    """KV groups before the heads in them."""
    return sorted(axes, key=lambda axis: axis.parent is not None)


def _is_in(module: str, path: str) -> bool:
    return f"{module}.".startswith(f"{path}.")
