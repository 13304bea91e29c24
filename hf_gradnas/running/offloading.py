"""Weights that Accelerate keeps on the CPU or on a disk, and loads for each call of their module.

Between calls such a parameter is on the meta device. Knows Accelerate's hooks; knows nothing of
scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor, nn

from .hooks import add_hook, add_pre_hook
from .wrappers import whole


def loader_of(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that loads the weights of a module for each call; None: they are not offloaded."""
    hook = vars(module).get("_hf_hook")
    hook = vars(hook).get("inner", hook) if isinstance(hook, ModelHook) else hook  # of `lending`
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    found = (h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload)
    return next(found, None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether Accelerate loads some weights of a model when they are needed."""
    return any(loader_of(module) is not None for module in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first weights are while it runs."""
    for module in model.modules():
        like = next((p for p in module._parameters.values() if p is not None), None)
        if like is not None and like.is_floating_point():
            loader = loader_of(module) if like.is_meta else None
            device = like.device if loader is None else loader.execution_device
            return like.device if device is None else torch.device(device)
    return torch.device("cpu")


class Weights(Mapping[str, Tensor]):
    """Parameters of a model by each of their names, whole, each loaded when it is asked for.

    Args:
        model: The model; its weights may be sharded or offloaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._loaders: dict[str, tuple[AlignDevicesHook, str]] = {}
        self._maps: dict[str, Mapping[str, Tensor]] = {}
        self._sources: dict[str, str] = dict(vars(model).get("all_tied_weights_keys") or {})
        for path, module in model.named_modules(remove_duplicate=False):
            loader = loader_of(module)
            prefix = f"{path}." if path else ""
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._places[f"{prefix}{leaf}"] = module, leaf
            if loader is not None:
                self._maps[path] = loader.weights_map
                owned = module.named_parameters(recurse=loader.place_submodules)
                self._loaders |= {f"{prefix}{name}": (loader, name) for name, _ in owned}

    def __getitem__(self, name: str) -> Tensor:
        module, leaf = self._places[name]
        parameter = module._parameters[leaf]
        assert parameter is not None
        if not parameter.is_meta or name not in self._loaders:
            return whole(parameter)
        loader, own = self._loaders[name]
        value: Tensor = loader.weights_map[own]
        return value.detach().to(parameter.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def kept(self, name: str) -> Tensor | None:
        """What is kept under a name, of a buffer too; None: nothing is."""
        for path, leaf in _splits(name):
            found = self._maps.get(path)
            if found is not None and leaf in found:
                value: Tensor = found[leaf]
                return value.detach()
        return None

    def once(self) -> Iterator[str]:
        """The first name of every parameter, as ``named_parameters`` has it before offloading.

        Afterwards, tied parameters are several objects.
        """
        seen: set[object] = set()
        for name, key in self.keys_of().items():
            if key not in seen:
                seen.add(key)
                yield name

    def keys_of(self) -> dict[str, object]:
        """What tells parameters apart, by every name: the same for those that are tied."""
        return {
            name: self._sources.get(name, name)
            if name in self._loaders
            else id(module._parameters[leaf])
            for name, (module, leaf) in self._places.items()
        }


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every path that a name may be in, the innermost first, and the rest of the name."""
    parts = name.split(".")
    for place in range(len(parts) - 1, -1, -1):
        yield ".".join(parts[:place]), ".".join(parts[place:])


# --- a backward that loads again ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Saved:
    """What autograd keeps instead of a loaded weight, or a view of one."""

    loader: AlignDevicesHook
    name: str
    dtype: torch.dtype
    device: torch.device
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def loading_again(model: nn.Module) -> Iterator[None]:
    """Let the backward load offloaded weights again within the block, so that no graph keeps them.

    At any end, weights of a forward that broke off are put back where they were.
    """
    if not is_offloaded(model):
        yield
        return
    running: list[nn.Module] = []
    with ExitStack() as stack:
        stack.callback(unload, model)
        for module in model.modules():
            if loader_of(module) is not None:
                add_pre_hook(stack, module, partial(_enter, running))
                add_hook(stack, module, partial(_leave, running), always_call=True)
        pack = partial(_pack, running)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _unpack))
        yield


def _enter(running: list[nn.Module], module: nn.Module, args: Any) -> None:
    running.append(module)


def _leave(running: list[nn.Module], module: nn.Module, args: Any, output: Any) -> None:
    if running:
        running.pop()


def _pack(running: list[nn.Module], tensor: Tensor) -> Tensor | _Saved:
    storage, offset = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
    for module in reversed(running):
        loader = loader_of(module)
        assert loader is not None
        for name, weight in module.named_parameters(recurse=loader.place_submodules):
            if weight.untyped_storage().data_ptr() != storage or weight.dtype != tensor.dtype:
                continue
            start = int(weight.storage_offset())
            if start <= offset < start + weight.numel():
                like = (tensor.dtype, tensor.device, tensor.size(), tensor.stride())
                return _Saved(loader, name, *like, offset - start)
    return tensor


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    weight: Tensor = saved.loader.weights_map[saved.name].to(saved.device, saved.dtype)
    return weight.detach().as_strided(
        saved.size, saved.stride, weight.storage_offset() + saved.offset
    )


def unload(module: nn.Module) -> None:
    """Put weights back that a call of a module, or of one in it, has loaded and not put back."""
    for part in module.modules():
        loader = loader_of(part)
        if loader is not None and not _is_away(part, loader):
            loader.post_forward(part, None)


@contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """The weights that a module itself holds within the block; loaded if they are not there.

    At its end, those of modules in it are put back too: a call that is not run to its end, such as
    one of checkpointing, leaves them.
    """
    loader = loader_of(module)
    is_loading = loader is not None and _is_away(module, loader)
    if loader is not None and is_loading:
        loader.pre_forward(module)
    try:
        yield
    finally:
        if is_loading:
            unload(module)
        for child in module.children():
            unload(child)


def _is_away(module: nn.Module, loader: AlignDevicesHook) -> bool:
    return any(p.is_meta for p in module.parameters(recurse=loader.place_submodules))
