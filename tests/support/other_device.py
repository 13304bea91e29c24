"""A device of Python: what it computes is the CPU's, and what the host waits for is seen.

Its tensors hold others on the CPU. Tensors of both kinds do not mix, as with a real one, and each
time that the host must wait for the device is noted. Registering it changes the whole process, so
that only scripts of their own import this.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import hf_gradnas
from hf_gradnas.running import copies

backend_registration._setup_privateuseone_for_python_backend("other")
DEVICE = torch.device("other", 0)
aten = torch.ops.aten
READS = frozenset(
    "_local_scalar_dense nonzero is_nonzero equal masked_select _unique2 bincount".split()
)
"""Operations whose result, or its shape, the host has to know."""
PINNED: list[torch.Tensor] = []
"""What was put into pinned memory last."""
COPIES = ("_to_copy", "copy_", "_copy_from")
SOURCES = (str(Path(hf_gradnas.__file__).parent), str(Path(transformers.__file__).parent))


class OnDevice(torch.Tensor):
    """A tensor of the device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        _wait("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


WAITS: list[str] = []
"""What the host waited for, and where."""


class Device(TorchDispatchMode):
    """Makes tensors on the device where they are asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_ours(place: Any) -> bool:
    return place is not None and torch.device(place).type == DEVICE.type


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in given if isinstance(x, OnDevice)]
    name, place = func.__name__.partition(".")[0], kwargs.get("device")
    is_made_here = _is_ours(place) if place is not None else bool(ours)
    if name == "copy_":
        is_made_here = isinstance(args[0], OnDevice)
    _note(func, name, args, kwargs, given, ours, is_made_here)
    own = dict(kwargs) if place is None else {**kwargs, "device": torch.device("cpu")}
    own.pop("pin_memory", None)
    found = func(*tree_map(_inner, args), **tree_map(_inner, own))
    if not is_made_here:
        return found
    if func._schema.is_mutable and ours and name.endswith("_"):
        return args[0]
    return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, found)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _note(
    func: Any, name: str, args: Any, kwargs: Any, given: Any, ours: Any, is_made_here: bool
) -> None:
    """Note what the host waits for; tensors of both places must not meet."""
    others = [x for x in given if not isinstance(x, OnDevice) and x.dim()]
    if name in COPIES:
        is_from_here = isinstance(args[1 if name == "copy_" else 0], OnDevice)
        soon = kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])
        blocks = not soon or args[0] is not (PINNED or [None])[-1]  # other memory is staged
        if is_from_here != is_made_here and (blocks or is_from_here):
            _wait(f"{name} {'from' if is_from_here else 'to'} the device")
    elif ours and others and name not in ("index", "index_put_", "index_put"):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    elif ours and name in READS:
        _wait(name)
    elif ours and name in ("index", "index_put_", "index_put"):
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            _wait(f"{name} by a mask")
        elif not all(isinstance(x, OnDevice) for x in indices):
            _wait(f"{name} by what the host has")
    elif ours and name == "repeat_interleave" and kwargs.get("output_size") is None:
        _wait(name)


def _wait(what: str) -> None:
    *_, last = (f for f in traceback.extract_stack() if f.filename.startswith(SOURCES))
    package = Path(last.filename).relative_to(Path(SOURCES[0]).parent) if _is_own(last) else None
    WAITS.append(f"{package or 'transformers'}: {what} in {last.name}")


def _is_own(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(SOURCES[0])


@torch.library.impl("aten::empty_strided", "privateuseone")
def _empty_strided(size: Any, stride: Any, **options: Any) -> torch.Tensor:
    """As where PyTorch makes tensors past all modes (`torch.tensor`)."""
    return OnDevice(torch.empty_strided(size, stride, dtype=options.get("dtype")))


@torch.library.impl("aten::_copy_from", "privateuseone")
def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> torch.Tensor:
    _inner(target).copy_(_inner(source))
    return target


def put(module: nn.Module) -> None:
    """Put a model's parameters and buffers on the device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                moved = nn.Parameter(OnDevice(value.detach()), value.requires_grad)
                part._parameters[name] = moved
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = OnDevice(value)


@contextmanager
def waits() -> Iterator[list[str]]:
    """What the host waits for within the block; it has pinned memory for the device there."""
    WAITS.clear()
    with (
        patch.object(copies, "READS_PINNED", (DEVICE.type,)),
        patch.object(torch.Tensor, "pin_memory", lambda x: PINNED.append(x) or x),
        Device(),
    ):
        yield WAITS
    PINNED.clear()
