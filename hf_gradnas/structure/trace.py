"""Record what one forward of a model does: which products it runs, in which module.

Knows torch functions and module paths. Knows no architecture and draws no conclusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache

from ..errors import DataError, GradNASError

CONVS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())
MATMULS = CONVS | frozenset(
    "linear addmm matmul bmm baddbmm mm einsum __matmul__ __rmatmul__".split()
)
CASTS = frozenset("to type type_as float double half bfloat16".split())
"""Functions whose result is still known as the parameter that they take."""
CACHED_DIMS = 4
"""Keys and values are ``(batch, heads, tokens, features)``."""


@dataclass(frozen=True)
class Matmul:
    """A matrix product. `parameter` is the weight's full name, None between activations."""

    module: str
    function: str
    parameter: str | None
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    macs: int


@dataclass(frozen=True)
class Call:
    """Arguments of a module's first call and the shape of what it returned.

    `returns` names each element of a tuple by the shape of its tensor, or by the argument that is
    handed on; None stands for anything else. Empty when the module returned a bare tensor.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    returns: tuple[tuple[int, ...] | str | None, ...]


@dataclass(frozen=True, slots=True)
class Cached:
    """What a module hands to the cache for one token, keys and values together.

    Attributes:
        module: Its path.
        heads: How many keys and values it has for a token; 0 where their shape does not say it.
        bytes: Bytes of all of them.
        least: Bytes of one number of each.
    """

    module: str
    heads: int
    bytes: float
    least: float


@dataclass
class Trace:
    """Products in the order in which they ran, and what was cached."""

    events: list[Matmul] = field(default_factory=list)
    cached: list[Cached] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """Fills a `Trace` while active.

    Use through `record`, which also places the module hooks that say who is running.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.running: list[str] = []
        self._casts: list[Tensor] = []
        self.parameter_names = {
            id(p): name
            for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))
        }

    def _name_of(self, tensor: object) -> str | None:
        while isinstance(tensor, Tensor):
            if id(tensor) in self.parameter_names:
                return self.parameter_names[id(tensor)]
            tensor = tensor._base
        return None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not self.running or not isinstance(out, Tensor):
            return out
        if name in MATMULS:
            self._record_matmul(name, out, args, kwargs)
        elif name in CASTS and args and self._name_of(args[0]) is not None:
            self._casts.append(out)  # held: the id of a tensor that is gone may come again
            self.parameter_names[id(out)] = cast(str, self._name_of(args[0]))
        return out

    def _record_matmul(
        self, name: str, out: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        named = [(self._name_of(a), a) for a in operands]
        weights = [(n, a) for n, a in named if n is not None and a.ndim > 1]
        plain = [a for n, a in named if n is None and a.is_floating_point()]
        if not plain:
            return
        x = plain[0]
        parameter, weight = weights[0] if weights else (None, plain[-1])
        if name in CONVS:  # (input, weight, bias): the bias may be a computed tensor too
            parameter, weight = named[1]
        self.trace.events.append(
            Matmul(
                module=self.running[-1],
                function=name,
                parameter=parameter,
                x_shape=tuple(x.shape),
                out_shape=tuple(out.shape),
                macs=_macs(name, x, weight, out),
            )
        )


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record every forward of `model` inside the ``with``; names in the trace are relative to it.

    "" is the model itself.
    """
    recorder = Recorder(model)

    update = Cache.update

    def recorded(cache: Cache, keys: Tensor, values: Tensor, *args: Any, **more: Any) -> Any:
        recorder.trace.cached.append(_cached(recorder.running[-1:], keys, values))
        return update(cache, keys, values, *args, **more)

    def enter(path: str) -> Callable[..., None]:
        return lambda module, args: recorder.running.append(path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if recorder.running:
            recorder.running.pop()

    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(path)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.callback(setattr, Cache, "update", update)
        Cache.update = recorded
        stack.enter_context(recorder)
        yield recorder.trace


def _cached(running: Sequence[str], keys: Tensor, values: Tensor) -> Cached:
    is_usual = keys.ndim == values.ndim == CACHED_DIMS and keys.shape[1] == values.shape[1]
    amount = sum(t.numel() * t.element_size() / (len(t) * t.shape[-2]) for t in (keys, values))
    return Cached(
        module="".join(running),
        heads=keys.shape[1] if is_usual else 0,
        bytes=amount,
        least=float(keys.element_size() + values.element_size()),
    )


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def common_path(first: str, second: str) -> str:
    """Longest module path that both paths start with."""
    shared: list[str] = []
    for left, right in zip(first.split("."), second.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def _macs(function: str, x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Multiply-accumulates of one product.

    A convolution applies ``weight[c]`` (in/groups x kernel) at every position of output channel
    ``c``; a transposed one scatters ``weight[c]`` (out/groups x kernel) from every position of
    input channel ``c``. Products with padding are counted, as `FlopCounterMode` counts them.
    """
    if function not in CONVS:
        return out.numel() * x.shape[-1]
    channels = x if "transpose" in function else out
    return channels.numel() * weight[0].numel()


def rows_of(macs: int, weight: Tensor) -> float:
    """Number of row vectors that products of so many MACs multiplied with `weight`.

    For a convolution its output positions, for a transposed one its input positions: whatever the
    groups, they do not depend on the channels. For one matrix of a stack, their share in all of it.
    """
    return macs / weight.numel() if weight.numel() else 0.0


@torch.no_grad()
def trace_forward(
    model: nn.Module, inputs: Mapping[str, Any], *, args: tuple[Any, ...] = ()
) -> Trace:
    """Trace of ``model(*args, **inputs)`` without a graph.

    Raises:
        DataError: The model cannot run the inputs.
    """
    with record(model) as trace, telling(model, args, inputs):
        model(*args, **inputs)
    return trace


@contextmanager
def telling(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Iterator[None]:
    """Name the inputs in whatever a forward of the model raises inside the ``with``.

    Raises:
        DataError: The model cannot run the inputs.
    """
    try:
        yield
    except (torch.OutOfMemoryError, GradNASError):
        raise
    except Exception as error:  # the model's own code may raise anything
        given = {f"args[{index}]": value for index, value in enumerate(args)} | dict(inputs)
        shapes = {n: tuple(v.shape) for n, v in given.items() if isinstance(v, Tensor)}
        raise DataError(
            f"{type(model).__name__} cannot run a batch of {shapes}: "
            f"{str(error).partition(chr(10))[0]}; check that its columns are what the forward "
            "takes (labels or decoder_input_ids for an encoder-decoder), and that no sequence "
            "is longer than the model's positions."
        ) from error
