"""Measure which rows of stacked matrices belong to a neuron, of one expert or of all together.

Knows no architecture: which stack reads the neurons is that of the last product, and which rows
make them is told by gradients that are exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._compat import implementations
from ..routing import STACKED_DIMS, Chosen, follows_interface
from ..running.hooks import add_pre_hook
from ..stacks import Products
from ..surgery.rows import above
from ..tokens import Following
from ..types import KINDS, Attribute, Axis, Kind, Slice, Tap
from .trace import Call, map_tensors

TOKENS = 24
"""Random tokens that an expert is run with."""
MATRIX_DIMS = 2
KERNEL_MULTIPLE = 8
"""Grouped products need rows of a multiple of 16 bytes: 8 numbers in bfloat16."""


class _Irregular(Exception):
    """Rows of neurons that no slice can say."""


def neurons_of(
    module: nn.Module, path: str, chosen: Chosen | None, call: Call, experts: Axis
) -> Axis | None:
    """The axis of the neurons of stacked experts; None where their rows cannot be told.

    Args:
        module: Holds stacks of matrices.
        path: Its path.
        chosen: The choice among its arguments; None: all experts run for all tokens.
        call: The arguments.
        experts: The axis of the experts.
    """
    is_known = follows_interface(module)
    flat = any(is_flat(p, experts.size) for p in module.parameters())
    if chosen is not None and not (is_known or flat):
        return None
    found = _measured(module, chosen, call, experts.size)
    if found is None:
        return None
    measured, reader, slices = found
    return Axis(
        name=f":{Kind.NEURONS}",
        module="",
        kind=Kind.NEURONS,
        size=experts.size * measured.each(reader, slices[0].dim),
        slices=tuple(replace(s, tensor=above(s.tensor, path)) for s in slices),
        taps=(Tap(above(reader, path), "stack", -1, runner="" if is_known else path),),
        attributes=() if slices[0].each else tuple(_widths(module, path, measured, reader)),
        parent=experts.name,
        minimum=experts.minimum,
        multiple=KERNEL_MULTIPLE if is_known else 1,
    )


def is_flat(tensor: Tensor, size: int) -> bool:
    """Whether a matrix may hold the rows of so many experts, those of one after another."""
    return tensor.ndim == MATRIX_DIMS and tensor.shape[0] > size and tensor.shape[0] % size == 0


def _widths(module: nn.Module, path: str, measured: _Measured, reader: str) -> Iterator[Attribute]:
    """Attributes that repeat the number of neurons in an expert."""
    for inner, part in module.named_modules():
        held = vars(part)
        for name in KINDS[Kind.NEURONS].config_names:
            if held.get(name) == measured.each(reader, 0):
                place, axis = above(inner, path), f":{Kind.NEURONS}"
                yield Attribute(place, name, axis, per=f":{Kind.EXPERTS}")


def neurons_of_all(module: nn.Module, call: Call) -> Axis | None:
    """The axis of neurons that a module of stacked matrices has in each of them, by their number.

    Unit ``i`` is neuron ``i`` of all matrices: shared experts, all of which run for every token.
    None where their rows cannot be told.

    Args:
        module: Holds stacks of matrices.
        call: Its arguments.
    """
    sizes = {len(p) for p in module.parameters(recurse=False) if p.ndim == STACKED_DIMS}
    if len(sizes) != 1:
        return None
    (size,) = sizes
    found = _measured(module, None, call, size, experts=0)
    if found is None:
        return None
    _, reader, slices = found
    return Axis(
        name=f":{Kind.NEURONS}",
        module="",
        kind=Kind.NEURONS,
        size=slices[0].each,
        slices=tuple(replace(part, each=0) for part in slices),
        taps=(Tap(reader, "stack", -1),),
    )


def neurons_in_block(block: nn.Module, call: Call, size: int) -> list[Slice]:
    """Rows of each neuron of experts whose stacks are in several modules, those that read first.

    Empty where they cannot be told.

    Args:
        block: Holds a router and the experts.
        call: Its arguments.
        size: Number of experts.
    """
    try:
        measured = _Measured(block, None, call, size, experts=0)
        reader, slices = measured.slices()
        is_apart = measured.is_apart(reader)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the module's own code may raise anything
        return []
    return slices if is_apart and all(part.each for part in slices) else []


def all_run(module: nn.Module, call: Call, size: int) -> bool:
    """Whether every expert runs for all tokens: its own part of the rows, with its own matrices."""
    rows = [x for x in call.args if isinstance(x, Tensor) and x.is_floating_point()]
    if len(rows) != 1 or rows[0].shape[0] % size:
        return False
    try:
        measured = _Measured(module, None, call, size, experts=2)
        for expert in range(2):
            found = measured.gradients(rows=slice(expert * TOKENS, (expert + 1) * TOKENS))
            others = [bool(gradient[1 - expert].any()) for gradient in found.values()]
            own = [bool(gradient[expert].any()) for gradient in found.values()]
            if any(others) or not all(own):
                return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the module's own code may raise anything
        return False
    return True


def _measured(
    module: nn.Module, chosen: Chosen | None, call: Call, size: int, *, experts: int = 1
) -> tuple[_Measured, str, list[Slice]] | None:
    """What is measured, its reading stack and rows; None where they cannot be told."""
    try:
        measured = _Measured(module, chosen, call, size, experts=experts)
        return (measured, *measured.slices())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the module's own code may raise anything
        return None


class _Measured:
    """Stacked experts, the first of which run on random tokens.

    Where the entries of a neuron in the reading stack are 0, the gradient of the output is exactly
    zero at all rows that make this neuron, and at no others.

    Args:
        module: Holds stacks of matrices.
        chosen: The choice among its arguments; None: all experts run for all tokens.
        call: The arguments.
        size: Number of experts.
        experts: How many of them run; 0: all, on as many random tokens as in the call.
    """

    def __init__(
        self, module: nn.Module, chosen: Chosen | None, call: Call, size: int, *, experts: int = 1
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(shape: Sequence[int]) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values / shape[-1] ** 0.5

        self.module = module
        is_stacked = any(tensor.ndim == STACKED_DIMS for tensor in module.parameters())
        self.values = {
            name: random([len(tensor) // size * (experts or size), *tensor.shape[1:]])
            for name, tensor in module.named_parameters()
            if tensor.ndim > 1 and (tensor.shape[0] == size or is_flat(tensor, size) > is_stacked)
        }
        self.others = {
            name: tensor.detach().double() if tensor.is_floating_point() else tensor
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if name not in self.values
        }
        for value in self.values.values():
            value.requires_grad_()
        self.call = _alone(call, chosen, random, experts) if experts else _redrawn(call, random)
        self.noise = random([1, self._run(self.values).shape[-1]])

    def slices(self) -> tuple[str, list[Slice]]:
        """Name of the reading stack, and the rows of each neuron, those that read first.

        Raises:
            _Irregular: No slice can say it.
        """
        reader, whole = self._reader(), self.gradients()
        stacked = self.values[reader].ndim == STACKED_DIMS
        for dim in range(1, STACKED_DIMS) if stacked else (0,):
            found = self._slices_along(reader, dim, whole)
            if len(found) > 1:
                return reader, found
        raise _Irregular("no rows make the neurons")

    def _reader(self) -> str:
        """The stack that the last product reads with."""
        return self._products()[-1][0]

    def is_apart(self, name: str) -> bool:
        """Whether every product reads with one matrix of a stack."""
        return all(number is not None for other, number in self._products() if other == name)

    def _products(self) -> list[tuple[str, int | None]]:
        """Stack and number of the matrix of each product, in running order."""
        found: list[tuple[str, int | None]] = []

        def note(name: str, x: Tensor, number: int | None) -> Tensor:
            found.append((name, number))
            return x

        self._run(self.values, Products(self.values, note))
        return found

    def each(self, reader: str, dim: int) -> int:
        """Neurons in an expert."""
        return self.values[reader].shape[dim]

    def _slices_along(self, reader: str, dim: int, whole: Mapping[str, Tensor]) -> list[Slice]:
        number = self.each(reader, dim)
        each = number if self.values[reader].ndim == STACKED_DIMS else 0
        owned = {unit: self._owned(whole, reader, dim, unit) for unit in (0, 1, number - 1)}
        found = [Slice(reader, dim, role="reads", each=each)]
        for name, (along, offsets) in owned[0].items():
            (_, second), (_, last) = owned[1][name], owned[number - 1][name]
            is_flat = not each and (offsets != [0] or len(self.values[name]) != number)
            for place, offset in enumerate(offsets):
                stride = second[place] - offset
                is_even = last[place] == offset + (number - 1) * stride
                if stride < 1 or not is_even or is_flat:
                    raise _Irregular(f"the rows of neurons in {name} follow no regular pattern")
                found.append(Slice(name, along, 1, offset, stride, "makes", each))
        return found

    def _owned(
        self, whole: Mapping[str, Tensor], reader: str, dim: int, unit: int
    ) -> dict[str, tuple[int, list[int]]]:
        """Per tensor the dimension and the rows that make a neuron."""
        without = self.values[reader].detach().clone()
        without.select(dim, unit).zero_()
        gradients = self.gradients({reader: without.requires_grad_()})
        found = {}
        for name, gradient in whole.items():
            own = (gradient != 0) & (gradients[name] == 0)
            if name == reader or not own.any():
                continue
            for along in range(int(own.ndim == self.values[reader].ndim == STACKED_DIMS), own.ndim):
                rows = own.movedim(along, 0).flatten(1).any(1)
                lines = [1] * own.ndim
                lines[along] = -1
                if torch.equal(own, (gradient != 0) & rows.view(lines)):
                    found[name] = (along, rows.nonzero().flatten().tolist())
                    break
            else:
                raise _Irregular(f"a neuron has no whole rows of {name}")
        return found

    def gradients(
        self, changed: Mapping[str, Tensor] | None = None, *, rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """Gradients of a sum of rows of the output at the experts' tensors.

        Args:
            changed: Other values of some tensors.
            rows: Those that are summed.
        """
        values = {**self.values, **(changed or {})}
        total = (self._run(values)[rows] * self.noise).sum()
        found = torch.autograd.grad(total, list(values.values()), allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(values.items(), found, strict=True)
        }

    def _run(self, values: Mapping[str, Tensor], mode: Products | None = None) -> Tensor:
        """The output ``(tokens of all experts that run, features)``."""
        tensors = {**self.others, **values}
        with torch.enable_grad(), implementations(self.module, experts="eager"):
            if mode is None:
                out = functional_call(self.module, tensors, self.call.args, dict(self.call.kwargs))
            else:
                with mode:
                    return self._run(values)
        out = out[0] if isinstance(out, tuple) else out
        return out.view(-1, out.shape[-1])


def _alone(
    call: Call,
    chosen: Chosen | None,
    random: Callable[[Sequence[int]], Tensor],
    experts: int,
) -> Call:
    """The call with random tokens, all of which choose the first expert, or run in all."""
    if chosen is None:
        tokens, now = next(x for x in call.args if isinstance(x, Tensor)).shape[0], TOKENS * experts
    else:
        tokens, now = chosen.indices.shape[0], TOKENS

    def change(x: Tensor) -> Tensor:
        if chosen is not None and x is chosen.indices:
            return x.new_zeros(TOKENS, *x.shape[1:])
        if not x.is_floating_point() or x.shape[:1] != (tokens,):
            return x.double() if x.is_floating_point() else x
        return random([now, *x.shape[1:]])

    args: tuple[Any, ...] = map_tensors(tuple(call.args), change)
    return Call(args, map_tensors(dict(call.kwargs), change), call.returns)


def _redrawn(call: Call, random: Callable[[Sequence[int]], Tensor]) -> Call:
    """The call with random values."""

    def change(x: Tensor) -> Tensor:
        return random(x.shape) if x.is_floating_point() else x

    args: tuple[Any, ...] = map_tensors(tuple(call.args), change)
    return Call(args, map_tensors(dict(call.kwargs), change), call.returns)


# --- experts that are modules of their own --------------------------------------------------------


def taker_of(modules: Mapping[str, nn.Module], around: str, calls: Mapping[str, Call]) -> str:
    """Path of the module that takes rows out of its input for those in a list; "" for none.

    Such are experts in a list, which get the tokens that a router sends them: two-dimensional
    inputs, other rows for each, which are those of the input of the module around the list.

    Args:
        modules: All modules of the model by path.
        around: Path of the list.
        calls: First call of each module.
    """
    runner = around
    while runner and runner not in calls:
        runner = runner.rpartition(".")[0]
    names = [f"{around}.{name}" for name, _ in modules[around].named_children()]
    inputs = [first_of(calls[name]) for name in names if name in calls] if runner else []
    rows = [len(x) for x in inputs if x is not None and x.ndim == MATRIX_DIMS]
    whole = first_of(calls[runner]) if rows else None
    if whole is None or len(rows) < len(inputs):
        return ""
    if len(inputs) == len(names) and set(rows) == {whole[..., 0].numel()}:
        return ""  # of a few that ran, each may have got all
    experts = [modules[name] for name in names]
    return runner if _takes_rows(modules[runner], calls[runner], experts) else ""


def first_of(call: Call) -> Tensor | None:
    """The first tensor of numbers that a module is given."""
    given = (*call.args, *call.kwargs.values())
    return next((x for x in given if isinstance(x, Tensor) and x.is_floating_point()), None)


@torch.no_grad()
def _takes_rows(runner: nn.Module, call: Call, experts: Sequence[nn.Module]) -> bool:
    """Whether the rows that modules in a module get are rows of its input."""
    following, known = Following(), list[bool]()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens, x = following.tokens, first_of(Call(args, kwargs, ()))
        known.append(tokens is not None and x is not None and tokens.of(x) is not None)

    with ExitStack() as stack:
        following.attach(stack, runner)
        for expert in experts:
            add_pre_hook(stack, expert, note, with_kwargs=True)
        runner(*call.args, **call.kwargs)
    return bool(known) and all(known)
