"""Run one module, or a whole model, masked and cut, and compare all that it returns.

A copy in float64 runs with masks; another is cut, and runs too. Knows no kinds of axes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import compress
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Cache

from .._compat import configs_of, implementations
from ..batches.longest import flops_inputs
from ..errors import described
from ..masks import masked
from ..running.states import seeded
from ..structure.trace import Call, map_tensors
from ..surgery.cut import cut
from ..types import Axis

TOLERANCE = 1e-10
"""Largest difference between masked and cut, relative to the largest output, in float64."""
EFFECT = 1e-7
"""Smallest effect of a mask, relative to the largest output, that counts as one."""
ROUNDING = 1e-6
"""Differences below this may come from rounding to float32 inside the module."""
RETRY_SCALES = (1.0, 1.01, 0.97)
"""The input is scaled anew while rounding may be at fault: other values, other rare elements."""
POSITIONS = 32
"""Positions of a sequence that a module is run on, where it runs on so few."""
FEW_TOKENS = 4
"""Tokens of one example for a model that makes very much of a token, such as a second of sound."""
_SEQUENCE_DIMS = 3
NO_EFFECT = "has no effect on the input"
NAN = "NaN instead of numbers (all that it attends to may be masked out)"
NOT_RUNNING = "it does not run"
KERNEL = "eager"
TINY = torch.finfo(torch.float64).tiny


@dataclass
class Trial:
    """What is run masked and cut.

    Attributes:
        model: Holds the axes; on a device with float64, in any dtype. It is left as it was.
        call: Arguments, in any dtype.
        path: Module of `model` that is called with them.
        kernels: Attention kernels.
        tables: Shared tables by name (see `surgery.cut`).
        every: Compare all tensors that it returns; otherwise the first.
        alike: Compare the others too that have the same shape masked and cut.
        until: Modules whose outputs are compared instead; the forward ends with the last of them.
        is_drawn: Parameters have drawn values, so that all units have an effect: those of a module
            may be 0 or next to nothing before training, or by the design of a gate.
        is_partial: Only what the forward calls is in float64.
    """

    model: nn.Module
    call: Call
    path: str = ""
    kernels: Sequence[str] = (KERNEL,)
    tables: Mapping[str, Tensor] | None = None
    every: bool = True
    until: Sequence[str] = ()
    is_drawn: bool = False
    is_partial: bool = False
    alike: bool = False
    _last: tuple[Any, Any, nn.Module] | None = field(default=None, init=False)
    _twin: nn.Module | None = field(default=None, init=False)
    _whole: dict[tuple[str, float], list[Tensor]] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def disproof(self, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> str:
        """Why masking and cutting all the axes differ, or cannot be compared; "" if they agree."""
        units = _counts(axes, kept)
        for kernel in self.kernels:
            difference, effect = 0.0, 0.0
            for scale in RETRY_SCALES:
                try:
                    difference, effect = self.compared(axes, kept, kernel=kernel, scale=scale)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # the module's own code may raise anything
                    return f"cut to {units} {not_running(error)}"
                if not TOLERANCE < difference < ROUNDING:
                    break
            if not effect > EFFECT:
                why = f", on which it puts out {NAN}" if isnan(effect) else ""
                return f"masking down to {units} {NO_EFFECT}{why}"
            if not difference <= TOLERANCE:
                return (
                    f"cut to {units} it differs from masked by {difference:.1e} "
                    f"({kernel}, relative, float64)"
                )
        return ""

    @torch.no_grad()
    def compared(
        self,
        axes: Sequence[Axis],
        kept: Mapping[str, Sequence[int]],
        *,
        kernel: str = KERNEL,
        scale: float = 1.0,
    ) -> tuple[float, float]:
        """Difference between masked and cut, and effect of the mask, by the largest value."""
        whole = self.whole(kernel, scale)
        reference = self.masked(axes, kept, kernel=kernel, scale=scale)
        result = self.run(self._part(axes, kept), kernel, scale)
        if self.alike and not self.every:
            same = [a.shape == b.shape for a, b in zip(result, reference, strict=False)]
            same[:1] = [True]
            result, reference, whole = (list(compress(x, same)) for x in (result, reference, whole))
        return largest_difference(result, reference, whole), largest_difference(
            reference, whole, whole
        )

    @torch.no_grad()
    def masked(
        self,
        axes: Sequence[Axis],
        kept: Mapping[str, Sequence[int]],
        *,
        kernel: str = KERNEL,
        scale: float = 1.0,
    ) -> list[Tensor]:
        """What it returns with the units masked."""
        with masked(self.twin(), axes, kept):
            return self.run(self.twin(), kernel, scale)

    @torch.no_grad()
    def whole(self, kernel: str = KERNEL, scale: float = 1.0) -> list[Tensor]:
        """What it returns as it is."""
        if (kernel, scale) not in self._whole:
            self._whole[kernel, scale] = self.run(self.twin(), kernel, scale)
        return self._whole[kernel, scale]

    def twin(self) -> nn.Module:
        """The copy in float64 that runs with masks and without."""
        if self._twin is None:
            self._twin = self._in_float64(self.copied())
        return self._twin

    def _part(self, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> nn.Module:
        """The model cut; the last one is kept for other kernels and scales."""
        if self._last is None or self._last[:2] != (axes, kept):
            self._last = None
            part = _copy(self.twin())
            cut(part, axes, kept, tables=self.tables)
            self._last = (axes, kept, self._in_float64(part))
        return self._last[2]

    def _in_float64(self, model: nn.Module) -> nn.Module:
        return _double_when_called(model) if self.is_partial else model.double()

    def on_few_positions(self) -> Trial:
        """The trial on the first positions of its call, if the module runs on them; or itself."""
        short = cropped(self.call)
        return self if short is self.call else self._or(replace(self, call=short))

    def on_what_it_calls(self) -> Trial:
        """The trial with only what its forward calls in float64, if that runs; or itself."""
        return self._or(replace(self, is_partial=True))

    def on_few_tokens(self) -> Trial:
        """The trial on one example of `FEW_TOKENS`, if the model runs on it; or itself."""
        inputs = flops_inputs(self.call.kwargs, FEW_TOKENS)
        return self._or(replace(self, call=replace(self.call, kwargs=inputs)))

    def _or(self, trial: Trial) -> Trial:
        """Another trial, if it runs; or this one."""
        try:
            trial.whole()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the module's own code may raise anything
            return self
        return trial

    def copied(self) -> nn.Module:
        """A copy of the model, with drawn values if that is asked for."""
        if not self.is_drawn:
            return _copy(self.model)
        part = _copy(self.model, shared=False)
        _draw(part)
        return part

    def run(self, model: nn.Module, kernel: str, scale: float) -> list[Tensor]:
        """What the model, or the module of it that is called, returns."""
        call = double_call(self.call, scale=scale)
        kernels = implementations(model, attention=kernel, experts=KERNEL)
        with kernels, float64_throughout(), seeded(model), _Until(model, self.until) as watch:
            output = model.get_submodule(self.path)(*call.args, **call.kwargs)
        if watch.outputs:
            return list(floating(watch.outputs))
        found = list(floating(output))
        if not found and not self.every:
            raise TypeError(f"it returns {type(output).__name__}, no tensor of numbers")
        return found if self.every or self.alike else found[:1]


class _Enough(Exception):
    """All that is compared has run."""


class _Until:
    """Keeps what modules return, and ends the block with the last of them."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.modules = [model.get_submodule(path) for path in dict.fromkeys(paths)]
        self.outputs: list[Any] = []
        self._left = set(self.modules)
        self._hooks: list[Any] = []

    def __enter__(self) -> _Until:
        self._hooks = [module.register_forward_hook(self._note) for module in self.modules]
        return self

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs.append(output)
        self._left.discard(module)
        if not self._left:
            raise _Enough

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> bool:
        for hook in self._hooks:
            hook.remove()
        if kind is None:  # some of them did not run
            self.outputs.clear()
        return kind is _Enough


def _copy(module: nn.Module, *, shared: bool = True) -> nn.Module:
    """Copy of a module in eval mode that *shares* its config objects, and the values of parameters.

    A copied config would no longer follow a switch of the attention kernel. A cut makes tensors
    anew, and no forward writes into parameters.
    """
    memo: dict[int, Any] = {id(config): config for config in configs_of(module)}
    for parameter in module.parameters() if shared else ():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(module, memo).eval().requires_grad_(False)


def _double_when_called(model: nn.Module) -> nn.Module:
    """Put modules in float64 as the forward calls them, and what is directly inside of them.

    The stem of a model is proved without the layers after it, which are most of its parameters.
    """

    def double(module: nn.Module, args: Any) -> None:
        for part in (module, *module.children()):
            part._apply(lambda x: x.double() if x.is_floating_point() else x, recurse=False)

    for module in model.modules():
        module.register_forward_pre_hook(double)
    return model


def _draw(module: nn.Module) -> None:
    """Draw all parameters: vectors around 1, matrices so that they keep the size of values."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = max(parameter.numel() // max(len(parameter), 1), 1) if parameter.ndim else 1
            is_vector = parameter.numel() == max(parameter.shape, default=1)
            parameter.copy_(1 + noise / 4 if is_vector else noise * fan_in**-0.5)


class _Doubling(TorchFunctionMode):
    """Gives float64 to a forward that asks for fewer bits: equal results then are equal exactly."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        given = {name: _doubled(value) for name, value in (kwargs or {}).items()}
        return func(*map(_doubled, args), **given)


def _doubled(value: Any) -> Any:
    is_type = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if is_type else value


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Run forwards in float64 also where they cast to fewer bits, or make numbers anew."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with _Doubling():
            yield
    finally:
        torch.set_default_dtype(before)


def double_call(call: Call, *, scale: float = 1.0) -> Call:
    """The call with floating-point tensors in float64, and without the cache that it filled."""

    def change(tensor: Tensor) -> Tensor:
        return tensor.detach().double() * scale if tensor.is_floating_point() else tensor

    args = tuple(None if isinstance(a, Cache) else a for a in call.args)
    kwargs = {k: None if isinstance(v, Cache) else v for k, v in call.kwargs.items()}
    return Call(map_tensors(args, change), map_tensors(kwargs, change), call.returns)


def cropped(call: Call) -> Call:
    """The call with the first positions of its sequences only; itself where none is longer.

    A sequence is the middle of an argument ``(batch, positions, features)``; every dimension of
    that length is cropped, in masks and tables of positions too, unless features have it as well.
    """
    given: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        given.append(tensor)
        return tensor

    map_tensors((tuple(call.args), dict(call.kwargs)), note)
    sequences = [x for x in given if x.ndim == _SEQUENCE_DIMS and x.is_floating_point()]
    features = {x.shape[-1] for x in sequences}
    lengths = {x.shape[1] for x in sequences if x.shape[1] > POSITIONS} - features
    if not lengths:
        return call

    def change(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            tensor = tensor.narrow(dim, 0, POSITIONS) if size in lengths else tensor
        return tensor

    return Call(
        map_tensors(tuple(call.args), change), map_tensors(dict(call.kwargs), change), call.returns
    )


def _counts(axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> str:
    """Units of the last axis, and of the groups that they are in."""
    last = axes[-1]
    nested = [axis for axis in axes if axis.name == last.parent]
    return ", ".join(f"{len(kept[axis.name])} {axis.kind}" for axis in (*nested, last))


def not_running(error: Exception) -> str:
    """What is said of a module that fails."""
    return f"{NOT_RUNNING} ({described(error)})"


def floating(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in nested tuples, mappings and dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floating(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from floating(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for item in fields(output):
            yield from floating(getattr(output, item.name))


def largest_difference(
    result: Sequence[Tensor], reference: Sequence[Tensor], whole: Sequence[Tensor]
) -> float:
    """Largest difference of any two tensors, relative to the largest finite value in `whole`."""
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (result, reference)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the model puts out tensors of {shapes[0]}, needed {shapes[1]}")
    differences = [torch.zeros((), dtype=torch.float64)]
    for new, old, full in zip(result, reference, whole, strict=True):
        if new.numel():
            finite = full[full.isfinite()].abs()
            scale = max(float(finite.max()) if finite.numel() else 1.0, TINY)
            # Equal infinities do not differ; a nan does, and stays the largest of all.
            apart = (new - old).abs().where(new != old, torch.zeros_like(new))
            differences.append(apart.max().double().cpu() / scale)
    return float(torch.stack(differences).max())
