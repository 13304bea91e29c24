"""Gradients of the masks, one per example and unit, as a by-product of one backward.

Knows where units stand and how to sum ``x·∂L/∂x`` over them; knows nothing of losses and scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from ..errors import StructureError
from ..masks import add_pre_hook, check_width, out_projection
from ..types import Axis

# Replays of the operation that made an out-projection's input, from what autograd keeps of it
# anyway. Keeping the input itself as well would cost up to a third of a pass's memory, since
# frozen weights do not ask for it.
Replay = Callable[[Any, Tensor], Any]
# Writes x·∂L/∂x into its second argument, given ∂L/∂x.
Product = Callable[[Tensor, Tensor], None]


def _replay_gelu(node: Any, out: Tensor) -> None:
    torch.ops.aten.gelu.out(node._saved_self, approximate=node._saved_approximate, out=out)


def _replay_silu(node: Any, out: Tensor) -> None:
    torch.ops.aten.silu.out(node._saved_self, out=out)


def _replay_mul(node: Any, out: Tensor) -> None:
    torch.mul(node._saved_self, node._saved_other, out=out)


REPLAYS: dict[str, Replay] = {
    "GeluBackward0": _replay_gelu,
    "SiluBackward0": _replay_silu,
    "MulBackward0": _replay_mul,
}


@dataclass(frozen=True, slots=True)
class _Site:
    """One out-projection: its axes, and the finest unit that divides the units of all of them."""

    module: nn.Module
    axes: tuple[Axis, ...]

    @property
    def width(self) -> int:
        return math.gcd(*(axis.width for axis in self.axes))

    @property
    def units(self) -> int:
        return self.axes[0].size * self.axes[0].width // self.width


class GradientRecorder:
    """Sums ``g[n, i] = Σ_tokens Σ_{d in unit i} x·∂L/∂x`` at the input of every out-projection.

    A module that runs several times in a forward (ALBERT's shared layer) adds up before anything
    is squared. Sums are taken in backward hooks only, so that a forward which gradient
    checkpointing runs again counts once.
    """

    def __init__(self, model: nn.Module, axes: Iterable[Axis]) -> None:
        by_module: dict[nn.Module, list[Axis]] = {}
        for axis in axes:
            by_module.setdefault(out_projection(model, axis), []).append(axis)
        self._sites = [_Site(module, tuple(found)) for module, found in by_module.items()]
        self._sums: dict[nn.Module, Tensor] = {}
        self._inputs: dict[int, Product] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._num_examples = 0
        self._calls = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook into the model within the block."""
        with ExitStack() as stack:
            stack.callback(self._forget)
            for site in self._sites:
                add_pre_hook(stack, site.module, partial(self._watch, site))
            yield

    def start(self, num_examples: int) -> None:
        """Begin a batch of that many examples."""
        self._forget()
        self._num_examples = num_examples

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the batch so far: ``(examples, size)`` per axis name, float64."""
        found = {}
        for site in self._sites:
            total = self._sums_of(site, torch.device("cpu"))
            for axis in site.axes:
                found[axis.name] = total.view(self._num_examples, axis.size, -1).sum(-1)
        return found

    def _forget(self) -> None:
        self._sums.clear()
        self._inputs.clear()

    def _sums_of(self, site: _Site, device: torch.device) -> Tensor:
        """Running sums ``(examples, units)`` of a site."""
        if site.module not in self._sums:
            # MPS has no float64.
            wide = torch.float32 if device.type == "mps" else torch.float64
            shape = (self._num_examples, site.units)
            self._sums[site.module] = torch.zeros(shape, dtype=wide, device=device)
        return self._sums[site.module]

    def _watch(self, site: _Site, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Forward pre-hook: have the gradient of the input ``x`` reported to `_add`."""
        if not torch.is_grad_enabled():
            return None
        x: Tensor = args[0]
        for axis in site.axes:
            check_width(axis, x.shape[-1])
        self._check_rows(site, x)
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        self._calls += 1
        self._inputs[self._calls] = _product_with(x)
        # A view of its own, since x may have other readers, whose gradients are not the mask's.
        own = x.view_as(x)
        own.register_hook(partial(self._add, site, self._calls))
        return (own, *args[1:])

    def _check_rows(self, site: _Site, x: Tensor) -> None:
        if x.shape[0] % self._num_examples:
            axis = site.axes[0]
            raise StructureError(
                f"{axis.name}: the input of {axis.read_at} has {x.shape[0]} rows, which is no "
                f"multiple of the {self._num_examples} examples of the batch, so that no gradient "
                f'belongs to one example; exclude it with rules={{"{axis.module}": None}}.'
            )

    def _add(self, site: _Site, call: int, gradient: Tensor) -> None:
        """Tensor hook: add ``x·gradient``, summed per example and unit, to the site's sums."""
        product = self._buffer(gradient)
        self._inputs.pop(call)(gradient, product)
        sums = self._sums_of(site, gradient.device)
        features = product.view(self._num_examples, -1, gradient.shape[-1]).sum(1).to(sums.dtype)
        sums += features.view(self._num_examples, -1, site.width).sum(-1)

    def _buffer(self, like: Tensor) -> Tensor:
        """The reused product buffer in the shape of `like`, in float32 at least.

        A fresh tensor in every hook makes the pass 1.4 to 1.7 times as long on a CPU: its pages
        have to be mapped anew, and the caches are cold for the next kernel.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype)
        if key not in self._buffers or self._buffers[key].numel() < like.numel():
            self._buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self._buffers[key][: like.numel()].view(like.shape)


def _product_with(x: Tensor) -> Product:
    """Function that multiplies a gradient by `x`, without keeping `x` where possible."""
    node = x.grad_fn
    if node is not None and node.name() in REPLAYS and _saves_inputs(node):
        return partial(_replay, REPLAYS[node.name()], node, x.dtype)
    return partial(_multiply, x.detach())


def _multiply(values: Tensor, gradient: Tensor, out: Tensor) -> None:
    """Write ``values·gradient`` in the precision of `out`."""
    if out.dtype == values.dtype:
        torch.mul(values, gradient, out=out)
    else:
        out.copy_(values).mul_(gradient)


def _replay(replay: Replay, node: Any, dtype: torch.dtype, gradient: Tensor, out: Tensor) -> None:
    """Run an operation again, in the dtype in which it ran, and multiply the gradient by it."""
    if out.dtype == dtype:
        replay(node, out)
        out.mul_(gradient)
    else:
        values = torch.empty_like(out, dtype=dtype)
        replay(node, values)
        _multiply(values, gradient, out)


def _saves_inputs(node: Any) -> bool:
    """Whether autograd itself keeps every input of an operation.

    It keeps both factors of a product if both need a gradient. Under saved-tensor hooks, such as
    those of checkpointing, a kept tensor may be read only once, which is for autograd to do.
    """
    if any(function is None for function, _ in node.next_functions):
        return False
    try:
        with disable_saved_tensors_hooks("asked by hf_gradnas"):
            return True
    except RuntimeError:
        return False
