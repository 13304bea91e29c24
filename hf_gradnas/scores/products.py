"""``x·∂L/∂x`` without keeping ``x``, where autograd keeps what it was made from.

Where a layer is run again in the backward (gradient checkpointing), ``x`` comes from there. Knows
autograd functions; knows nothing of units.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

# Replays of the operation that made an out-projection's input, from what autograd keeps of it
# anyway. Keeping the input itself as well would cost up to a third of a pass's memory, since
# frozen weights do not ask for it.
Replay = Callable[[Any, Tensor], Any]
# Writes x·∂L/∂x into its second argument, given ∂L/∂x.
Product = Callable[[Tensor, Tensor], None]
# Takes the product with x, and ∂L/∂x.
Add = Callable[[Product, Tensor], None]
# Takes x, and ∂L/∂x.
AddKept = Callable[[Tensor, Tensor], None]


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


def watched(x: Tensor, add: Add, *, is_replayed: bool, add_kept: AddKept | None = None) -> Tensor:
    """A view of ``x``; `add` is called with its gradient, and with what multiplies it by ``x``.

    A view of its own, since ``x`` may have other readers, whose gradients are not the mask's.

    Args:
        x: The values.
        add: Called in the backward.
        is_replayed: Whether this function is called again where the forward runs again in the
            backward. Then ``x`` is kept no longer than autograd keeps what it saves itself.
        add_kept: Called instead, with ``x`` itself, where autograd keeps it anyway (`keeps_input`),
            so that nothing has to be made again: a GELU takes as long as the rest of its hook.
    """
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    if is_replayed and has_saving_hooks():
        view: Tensor = _Watched.apply(x, add)
        return view
    own = x.view_as(x)
    if add_kept is None:
        own.register_hook(partial(add, product_with(x)))
    else:
        own.register_hook(partial(add_kept, x.detach()))
    return own


def keeps_input(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd keeps the input of a module that reads it, for gradients of its weights.

    Under autocast it keeps a copy where the input is in another dtype.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        return False
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class _Watched(torch.autograd.Function):
    """A view of ``x`` that saves ``x`` as operations save their inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.add(partial(multiply, x.detach()), gradient)
        return gradient, None


def product_with(x: Tensor) -> Product:
    """Function that multiplies a gradient by `x`, without keeping `x` where possible."""
    node = x.grad_fn
    if node is not None and node.name() in REPLAYS and _saves_inputs(node):
        return partial(_replay, REPLAYS[node.name()], node, x.dtype)
    return partial(multiply, x.detach())


def multiply(values: Tensor, gradient: Tensor, out: Tensor) -> None:
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
        multiply(values, gradient, out)


def _saves_inputs(node: Any) -> bool:
    """Whether autograd itself keeps every input of an operation.

    It keeps both factors of a product if both need a gradient. Under saved-tensor hooks, such as
    those of checkpointing, a kept tensor may be read only once, which is for autograd to do.
    """
    return all(function is not None for function, _ in node.next_functions) and (
        not has_saving_hooks()
    )


def has_saving_hooks() -> bool:
    """Whether saved-tensor hooks are in force, such as those of checkpointing."""
    try:
        with disable_saved_tensors_hooks("asked by hf_gradnas"):
            return False
    except RuntimeError:
        return True
