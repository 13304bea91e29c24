"""Find the experts that a router chooses among: rows of its weight, and one matrix per expert.

A router is a weight whose products end in a choice of the largest. Its experts are the tensors in
the same block that have one entry per row of it; which rows of them belong to a neuron is measured.
Several versions are offered, since only the proof (`hf_gradnas.verification`) can tell which
tensors and sizes follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._compat import implementations
from ..errors import StructureError
from ..routing import Chosen, find_chosen, follows_interface
from ..surgery.rows import above, below
from ..types import KINDS, Attribute, Axis, Kind, Slice, Tap
from . import couplings
from .labels import NOBODY
from .reading import IrregularRows, Reading
from .trace import Call, map_tensors

BEST_OF_GROUP = 2
STACKED_DIMS = 3
"""Dimensions of a tensor that holds one matrix per expert."""


@dataclass(frozen=True)
class Routing:
    """A router, and the block that holds its experts.

    Attributes:
        block: Path of the module around router and experts.
        router: The rows of the router's weight.
        experts: Path of the module that holds the experts' matrices.
        size: Number of experts.
        chosen: How many are chosen for a token.
        time: When the router runs.
    """

    block: str
    router: Slice
    experts: str
    size: int
    chosen: int
    time: int


def find_routings(reading: Reading) -> Iterator[Routing]:
    """Every router whose block holds as many matrices as it has rows, in running order."""
    known: dict[str, Routing] = {}
    for choice in sorted(reading.labels.choices, key=lambda choice: choice.time):
        roots = reading.labels.roots(choice.labels)
        weights = {weight for root in roots for weight in reading.makers.get(root, ())}
        if len(weights) != 1 or NOBODY in roots or len(set(roots)) < len(roots):
            continue
        (router,) = weights
        if router in known:
            continue
        found, rows = _block_of(reading, router, len(roots)), _rows(reading, router, roots)
        if found is None or rows is None:
            continue
        block, experts = found
        known[router] = Routing(block, rows, experts, len(roots), choice.chosen, choice.time)
    return iter(known.values())


def _rows(reading: Reading, router: str, roots: Sequence[int]) -> Slice | None:
    """Rows of a router that make its experts' logits; None where they are not in order."""
    units = {root: number for number, root in enumerate(roots)}
    for rows, entries in reading.rows.items():
        if rows.tensor != router or not entries.present >= units.keys():
            continue
        try:
            patterns = entries.patterns(units)
        except IrregularRows:
            return None
        if len(patterns) == 1:
            return Slice(router, rows.dim, *patterns[0], role="makes")
    return None


def _block_of(reading: Reading, router: str, size: int) -> tuple[str, str] | None:
    """The nearest called module around a router that holds its experts, and where these are."""
    path = router.rpartition(".")[0]
    while path:
        path = path.rpartition(".")[0]
        if path not in reading.forward.calls:
            continue
        for inner, module in reading.modules[path].named_modules():
            if any(is_stack(p, size) for p in module.parameters(recurse=False)):
                return path, f"{path}.{inner}".rstrip(".")
    return None


def is_stack(tensor: Tensor, size: int) -> bool:
    """Whether a tensor holds one matrix for each of so many experts."""
    return tensor.ndim == STACKED_DIMS and tensor.shape[0] == size


UNTOLD = "its experts are not told by indices which of them were chosen, so that none can be scored"


def expert_versions(model: nn.Module, routing: Routing, call: Call) -> tuple[tuple[Axis, ...], ...]:
    """The axes of the experts and of the neurons in them, by names in their block.

    In every choice of what may follow; after the versions with both axes those with one of them.

    Args:
        model: The model.
        routing: A router, and its block.
        call: How the module of the experts was called.

    Raises:
        StructureError: They cannot be scored.
    """
    chosen = find_chosen(call.args, call.kwargs)
    if chosen is None:
        raise StructureError(UNTOLD)
    block = model.get_submodule(routing.block)
    router = replace(routing.router, tensor=below(routing.router.tensor, routing.block))
    inside = below(routing.experts, routing.block)
    own = tuple(_slices(block, router, inside, routing.size))
    loose = tuple(_loose(block, own, routing.size))
    sizes, config = _attributes(block, routing.size)
    experts = Axis(
        name=f":{Kind.EXPERTS}",
        module="",
        kind=Kind.EXPERTS,
        size=routing.size,
        slices=own,
        taps=(Tap(inside, "choice", -1),),
        attributes=sizes,
        minimum=max(routing.chosen, KINDS[Kind.EXPERTS].minimum),
    )
    grouped = _grouped(experts, block.get_submodule(router.module))
    alone = [
        replace(axis, slices=(*own, *more), attributes=(*sizes, *read))
        for axis, more, read in product(
            grouped, dict.fromkeys([loose, ()]), dict.fromkeys([(), config])
        )
    ]
    neurons = _neurons(block.get_submodule(inside), inside, chosen, call, experts)
    if neurons is None:
        return tuple((axis,) for axis in alone)
    fixed = replace(experts, minimum=experts.size)
    return (
        *((axis, replace(neurons, minimum=axis.minimum)) for axis in alone),
        *((axis,) for axis in alone),
        (fixed, replace(neurons, minimum=experts.size)),
    )


def _grouped(experts: Axis, router: nn.Module) -> list[Axis]:
    """The axis as it is; and in groups, if the router may first choose among these.

    A router like DeepSeek's weighs a group by its two best experts, so that two stay in each.
    """
    held = vars(router)
    groups = next((held[name] for name in couplings.EXPERT_GROUPS if name in held), 1)
    chosen = next((held[name] for name in couplings.CHOSEN_GROUPS if name in held), groups)
    if not isinstance(groups, int) or groups < 2 or experts.size % groups:  # noqa: PLR2004
        return [experts]
    fewest = max(BEST_OF_GROUP, -(-experts.minimum // max(chosen, 1)))
    return [experts, replace(experts, blocks=groups, minimum=groups * fewest)]


def _slices(block: nn.Module, router: Slice, experts: str, size: int) -> Iterator[Slice]:
    """Rows of the router and of the stacks, with the biases beside them."""
    for path, module in block.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        is_router = path == router.module
        if not (is_router or path == experts or path.startswith(f"{experts}.")):
            continue
        for leaf, tensor in own:
            name = f"{path}.{leaf}".lstrip(".")
            if name == router.tensor:
                yield router
            elif tensor.ndim and tensor.shape[0] == size:
                yield Slice(name, 0, role="follows")


def _loose(block: nn.Module, own: Sequence[Slice], size: int) -> Iterator[Slice]:
    """Vectors elsewhere in the block with one entry per expert, such as corrections of a choice."""
    held = {part.tensor for part in own}
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        dim = _vector_dim(tensor, size)
        if name not in held and dim is not None:
            yield Slice(name, dim, role="follows")


def _vector_dim(tensor: Tensor, size: int) -> int | None:
    """The dimension of a vector with one entry per expert, among others of size 1."""
    dims = [dim for dim, length in enumerate(tensor.shape) if length == size]
    return dims[0] if len(dims) == 1 and tensor.numel() == size else None


def _attributes(block: nn.Module, size: int) -> tuple[tuple[Attribute, ...], tuple[Attribute, ...]]:
    """Attributes that repeat the number of experts, and values that a forward may read."""
    sizes, config = [], []
    axis = f":{Kind.EXPERTS}"
    for path, module in block.named_modules():
        held = vars(module)
        sizes += [
            Attribute(path, name, axis)
            for name in _present(couplings.EXPERT_COUNTS, held)
            if held[name] == size and not isinstance(held[name], bool)
        ]
        own = held.get("config")
        base = vars(own).get("_base", own) if own is not None else None
        if base is not None:
            values = {**vars(base), **{n: getattr(base, n, None) for n in base.attribute_map}}
            config += [
                Attribute(path, name, axis, in_config=True)
                for name in _present(KINDS[Kind.EXPERTS].config_names, values)
                if values[name] == size
            ]
    return tuple(sizes), tuple(config)


def _present(names: Iterable[str], values: object) -> list[str]:
    return [name for name in names if name in values]  # type: ignore[operator]


# --- neurons inside of experts --------------------------------------------------------------------

READER = "down_proj"
"""Name that Transformers' interface gives the stack that reads neurons."""
TOKENS = 24
"""Random tokens that an expert is run with."""


KERNEL_MULTIPLE = 8
"""Grouped products need rows of a multiple of 16 bytes: 8 numbers in bfloat16."""


class _Irregular(Exception):
    """Rows of neurons that no slice can say."""


def _neurons(
    module: nn.Module, path: str, chosen: Chosen, call: Call, experts: Axis
) -> Axis | None:
    """The axis of the neurons of stacked experts; None where their rows cannot be told."""
    if not follows_interface(module):
        return None
    try:
        reader, slices = _Measured(module, chosen, call, experts.size).slices()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the module's own code may raise anything
        return None
    return Axis(
        name=f":{Kind.NEURONS}",
        module="",
        kind=Kind.NEURONS,
        size=experts.size * slices[0].each,
        slices=tuple(replace(s, tensor=above(s.tensor, path)) for s in slices),
        taps=(Tap(above(reader, path), "stack", -1),),
        parent=experts.name,
        minimum=experts.minimum,
        multiple=KERNEL_MULTIPLE,
    )


class _Measured:
    """Which rows of stacked experts belong to a neuron, measured on one expert that runs alone.

    Where the entries of a neuron in the reading stack are 0, the gradient of the output is exactly
    zero at all rows that make this neuron, and at no others.

    Args:
        module: Holds stacks of matrices, and runs those of given indices.
        chosen: The choice among its arguments.
        call: The arguments.
        size: Number of experts.
    """

    def __init__(self, module: nn.Module, chosen: Chosen, call: Call, size: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(shape: Sequence[int]) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values / shape[-1] ** 0.5

        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.module = module
        self.others = {
            name: tensor.detach().double() if tensor.is_floating_point() else tensor
            for name, tensor in named.items()
        }
        self.values = {
            name: random([1, *tensor.shape[1:]]).requires_grad_()
            for name, tensor in module.named_parameters()
            if tensor.ndim > 1 and tensor.shape[0] == size
        }
        self.call = _alone(call, chosen, random)
        self.noise = random([1, self.values[READER].shape[2 if module.is_transposed else 1]])

    def slices(self) -> tuple[str, list[Slice]]:
        """Name of the reading stack, and the rows of each neuron, those that read first.

        Raises:
            _Irregular: No slice can say it.
        """
        reader, dim = READER, 1 if self.module.is_transposed else 2
        each = self.values[reader].shape[dim]
        whole = self._gradients()
        owned = {unit: self._owned(whole, reader, dim, unit) for unit in (0, 1, each - 1)}
        found = [Slice(reader, dim, role="reads", each=each)]
        for name, (along, offsets) in owned[0].items():
            (_, second), (_, last) = owned[1][name], owned[each - 1][name]
            for place, offset in enumerate(offsets):
                stride = second[place] - offset
                if stride < 1 or last[place] != offset + (each - 1) * stride:
                    raise _Irregular(f"the rows of neurons in {name} follow no regular pattern")
                found.append(Slice(name, along, 1, offset, stride, "makes", each))
        if len(found) == 1:
            raise _Irregular("no rows make the neurons")
        return reader, found

    def _owned(
        self, whole: Mapping[str, Tensor], reader: str, dim: int, unit: int
    ) -> dict[str, tuple[int, list[int]]]:
        """Per tensor the dimension and the rows that make a neuron."""
        without = self.values[reader].detach().clone()
        without.select(dim, unit).zero_()
        gradients = self._gradients({reader: without.requires_grad_()})
        found = {}
        for name, gradient in whole.items():
            own = (gradient != 0) & (gradients[name] == 0)
            if name == reader or not own.any():
                continue
            for along in range(1, own.ndim):
                rest = [d for d in range(own.ndim) if d != along]
                rows = own.any(rest[-1]).any(0) if own.ndim > 2 else own[0]  # noqa: PLR2004
                lines = [1] * own.ndim
                lines[along] = -1
                if torch.equal(own, (gradient != 0) & rows.view(lines)):
                    found[name] = (along, rows.nonzero().flatten().tolist())
                    break
            else:
                raise _Irregular(f"a neuron has no whole rows of {name}")
        return found

    def _gradients(self, changed: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Gradients of a sum of the output at the experts' tensors."""
        values = {**self.values, **(changed or {})}
        with torch.enable_grad(), implementations(self.module, experts="eager"):
            tensors = {**self.others, **values}
            out = functional_call(self.module, tensors, self.call.args, dict(self.call.kwargs))
            if isinstance(out, tuple):
                out = out[0]
            total = (out.view(TOKENS, -1) * self.noise).sum()
            found = torch.autograd.grad(total, list(values.values()), allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(values.items(), found, strict=True)
        }


def _alone(call: Call, chosen: Chosen, random: Callable[[Sequence[int]], Tensor]) -> Call:
    """The call with random tokens, all of which choose the first expert."""
    tokens = chosen.indices.shape[0]

    def change(x: Tensor) -> Tensor:
        if x is chosen.indices:
            return x.new_zeros(TOKENS, *x.shape[1:])
        if not x.is_floating_point() or x.shape[:1] != (tokens,):
            return x.double() if x.is_floating_point() else x
        return random([TOKENS, *x.shape[1:]])

    args: tuple[Any, ...] = map_tensors(tuple(call.args), change)
    return Call(args, map_tensors(dict(call.kwargs), change), call.returns)
