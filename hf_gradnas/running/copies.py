"""Copies between the host and a device, without waiting where nothing needs to be known.

A blocking copy waits for all that the device has been asked for before. What goes there is copied
from pinned memory, which the device reads by itself; what comes from there comes in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

READS_PINNED = ("cuda", "xpu")
"""Kinds of devices that read pinned memory while the host goes on."""


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, in a type; the host does not wait for it.

    Where it is there already, as loaders of Accelerate leave it, it is not copied.
    """
    wanted = tensor.dtype if dtype is None else dtype
    if tensor.device.type != "cpu" or device.type not in READS_PINNED:
        return tensor.to(device, wanted)
    return tensor.to(wanted).pin_memory().to(device, non_blocking=True)


def on_host(columns: Any) -> Any:
    """Columns with all tensors on the CPU; those of a device come in one copy.

    Args:
        columns: Tensors in mappings, lists and tuples; anything else, such as named tuples, stays
            as it is.
    """
    away = {id(x): x for x in _tensors(columns) if _is_away(x)}
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in away.values():
        by_device.setdefault(x.device, []).append(x)
    brought: dict[int, Tensor] = {}
    for tensors in by_device.values():
        brought |= {id(x): found for x, found in zip(tensors, _brought(tensors), strict=True)}
    return _with(columns, brought) if away else columns


def _is_away(x: Tensor) -> bool:
    is_plain = x.layout == torch.strided and not x.is_nested
    return is_plain and x.device.type not in ("cpu", "meta")


def _brought(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of one device on the CPU."""
    plain = (x.detach().resolve_conj().resolve_neg().contiguous() for x in tensors)
    flat = [x.reshape(-1).view(torch.uint8) for x in plain]
    order = sorted(range(len(tensors)), key=lambda n: -tensors[n].itemsize)  # all aligned
    parts = torch.cat([flat[n] for n in order]).cpu().split([len(flat[n]) for n in order])
    found = dict(zip(order, parts, strict=True))
    return [found[n].view(x.dtype).view(x.shape) for n, x in enumerate(tensors)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping) or type(value) in (list, tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _with(value: Any, brought: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return brought.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: _with(item, brought) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with(item, brought) for item in value)
    return value
