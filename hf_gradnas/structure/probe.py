"""Find the layout of one attention or FFN by gradients, without module names.

A copy of the enclosing module is run in float64 on inputs captured from the model. For each head,
the gradient of its part of the out-projection's input is *exactly* zero for every parameter row
that belongs to other heads; the pattern of zeros is the layout (separate, fused, grouped, …). FFN
neurons likewise, three of them standing for all. What comes out is a guess until it is proved.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Cache

from .._compat import configs_of
from ..errors import StructureError
from ..types import Role, Slice
from .trace import Attention, Call, Matmul, map_tensors, record

MIN_NEURONS = 8


class NotAPair(Exception):
    """The weights that ran before do not make what a weight reads: no FFN stands there."""


@dataclass(frozen=True)
class HeadLayout:
    """What a probe found out about one attention; names relative to the probed module.

    Attributes:
        heads: Number of query heads.
        groups: Number of KV groups (equal to `heads` without grouping, 1 for multi-query).
        width: Values per head at the input of the out-projection.
        head_slices: Rows that belong to one head.
        group_slices: Rows that belong to one KV group and to no single head.
    """

    heads: int
    groups: int
    width: int
    head_slices: tuple[Slice, ...]
    group_slices: tuple[Slice, ...]

    @property
    def is_grouped(self) -> bool:
        """Whether there are KV groups that can go one by one (not one per head, not a single)."""
        return 1 < self.groups < self.heads


def double_copy(module: nn.Module) -> nn.Module:
    """Copy of `module` in float64 and eval mode that *shares* its config objects.

    A copied config would no longer follow a switch of the attention kernel.
    """
    memo = {id(config): config for config in configs_of(module)}
    twin = copy.deepcopy(module, memo).double().eval()
    return twin.requires_grad_(False)


def double_call(call: Call, *, scale: float = 1.0) -> Call:
    """The call with floating-point tensors in float64, and without the cache that it filled."""

    def change(tensor: Tensor) -> Tensor:
        return tensor.detach().double() * scale if tensor.is_floating_point() else tensor

    args = tuple(None if isinstance(a, Cache) else a for a in call.args)
    kwargs = {k: None if isinstance(v, Cache) else v for k, v in call.kwargs.items()}
    return Call(map_tensors(args, change), map_tensors(kwargs, change), call.returns)


def probe_heads(module: nn.Module, call: Call, *, core: str, projection: str) -> HeadLayout:
    """Layout of the attention that `core` runs and the weight `projection` puts out.

    Args:
        module: The enclosing module, in float64 (see `double_copy`); its graph is used.
        call: Arguments for it, in float64.
        core: Relative path of the module that runs the softmax.
        projection: Relative name of the out-projection's weight.

    Raises:
        StructureError: The zero pattern is not one of whole heads.
    """
    with _traced(module, call) as events:
        attention = next(e for e in events if isinstance(e, Attention) and e.module == core)
        out = next(
            e
            for e in events[events.index(attention) :]
            if isinstance(e, Matmul) and e.parameter == projection
        )
        x = _graph_tensor(out.x, projection)
        heads = attention.heads
        if x.shape[-1] % heads:
            raise StructureError(f"{heads} heads do not divide the context width {x.shape[-1]}")
        width = x.shape[-1] // heads
        makers = {e.parameter for e in events if isinstance(e, Matmul)}
        names, owners = _head_owners(module, x, heads, exclude=projection)
    weights = dict(module.named_parameters())
    out_dim = 1 if out.function == "linear" else 0
    head_slices = [Slice(projection, out_dim, width, 0, width, "reads")]
    group_slices: list[Slice] = []
    groups: int | None = None
    for name in names:
        for dim, sets in enumerate(owners[name]):
            found = _read_sets(sets, heads)
            if found is None:
                continue
            per_head, per_group, count = found
            if per_group and groups not in (None, count):
                raise StructureError(f"{name} groups the heads in {count}, another in {groups}")
            groups = count if per_group else groups
            role: Role = "makes" if name in makers else "follows"
            head_slices += [replace(s, tensor=name, dim=dim, role=role) for s in per_head]
            group_slices += [replace(s, tensor=name, dim=dim, role=role) for s in per_group]
    head_slices = _add_biases(head_slices, weights, skip=projection)
    group_slices = _add_biases(group_slices, weights, skip=projection)
    if len(head_slices) == 1 and heads > 1:  # all that a single head owns goes with the module
        raise StructureError("no parameter belongs to single heads")
    return HeadLayout(heads, groups or heads, width, tuple(head_slices), tuple(group_slices))


def probe_neurons(
    module: nn.Module, call: Call, *, producers: Sequence[str], projection: str
) -> tuple[int, tuple[Slice, ...]]:
    """Number of neurons between `producers` and `projection`, and the rows each one owns.

    Args:
        module: The enclosing module, in float64.
        call: Arguments for it, in float64.
        producers: Relative names of weights that ran shortly before, nearest first.
        projection: Relative name of the weight that reads the neurons.

    Raises:
        StructureError: A neuron does not own whole rows of a producer.
        NotAPair: The input of `projection` depends on no parameter of the module.
    """
    weights = dict(module.named_parameters())
    with _traced(module, call) as events:
        down = next(e for e in events if isinstance(e, Matmul) and e.parameter == projection)
        if down.x is None or not down.x.requires_grad:
            raise NotAPair
        x = down.x
        size = x.shape[-1]
        flat = x.detach().reshape(-1, size)
        active = (flat != 0).any(0).nonzero().flatten().tolist()
        if size < MIN_NEURONS or len(active) < 3:  # noqa: PLR2004 - three points check a line
            raise StructureError(f"{len(active)} of {size} neurons are active: too few to probe")
        picked = [active[0], active[len(active) // 2], active[-1]]
        candidates = [
            name
            for name, p in weights.items()
            if name in producers or (p.ndim == 1 and p.numel() in (size, 2 * size))
        ]
        touched = [_touched_by_neuron(x, i, [weights[n] for n in candidates]) for i in picked]
    out_dim = 1 if down.function == "linear" else 0
    slices = [Slice(projection, out_dim, 1, 0, 1, "reads")]
    for position, name in enumerate(candidates):
        if name.endswith(".bias") and name[:-5] + ".weight" in weights:
            continue
        per_neuron = [t[position] for t in touched]
        role: Role = "makes" if name in producers else "follows"
        found = _neuron_slices(name, per_neuron, picked, size)
        slices += [replace(part, role=role) for part in found]
    slices = _add_biases(slices, weights, skip=projection)
    if not any(s.role == "makes" for s in slices):
        raise StructureError("no earlier weight has rows that belong to single neurons")
    return size, tuple(slices)


@contextmanager
def _traced(module: nn.Module, call: Call) -> Iterator[list[Matmul | Attention]]:
    """Run `module` with a graph; parameters ask for gradients inside the ``with`` only."""
    module.requires_grad_(True)
    try:
        with torch.enable_grad(), record(module, keep_graph=True) as trace:
            module(*call.args, **call.kwargs)
        yield trace.events
    finally:
        module.requires_grad_(False)


def _graph_tensor(x: Tensor | None, projection: str) -> Tensor:
    if x is None or not x.requires_grad:
        raise StructureError(f"the input of {projection} does not depend on any parameter")
    return x


def _head_owners(
    module: nn.Module, x: Tensor, heads: int, *, exclude: str
) -> tuple[list[str], Mapping[str, list[list[frozenset[int]]]]]:
    """For each parameter and dim, the set of heads that touch each index."""
    named = [(n, p) for n, p in module.named_parameters() if n != exclude]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    weighted = (x * noise.to(x.device)).reshape(*x.shape[:-1], heads, -1)
    touched: dict[str, list[list[set[int]]]] = {}
    for head in range(heads):
        grads = torch.autograd.grad(
            weighted[..., head, :].sum(),
            [p for _, p in named],
            retain_graph=True,
            allow_unused=True,
        )
        for (name, _), grad in zip(named, grads, strict=True):
            if grad is None or not grad.any():
                continue
            sets = touched.setdefault(name, [[set() for _ in range(n)] for n in grad.shape])
            for dim, indices in enumerate(_touched_indices(grad)):
                for index in indices:
                    sets[dim][index].add(head)
    frozen = {
        name: [[frozenset(s) for s in dim] for dim in dims]
        for name, dims in touched.items()
        if not (name.endswith(".bias") and name[:-5] + ".weight" in touched)
    }
    return list(frozen), frozen


def _touched_indices(grad: Tensor) -> list[list[int]]:
    nonzero = grad != 0
    dims = range(grad.ndim)
    return [
        (nonzero.any(dim=[d for d in dims if d != dim]) if grad.ndim > 1 else nonzero)
        .nonzero()
        .flatten()
        .tolist()
        for dim in dims
    ]


def _read_sets(
    sets: list[frozenset[int]], heads: int
) -> tuple[list[Slice], list[Slice], int] | None:
    """Slices per head and per group of one dim of one tensor, and the number of groups.

    None when the dim is not divided among the heads.

    Raises:
        StructureError: It is divided, but not into whole heads or even groups.
    """
    if {len(owners) for owners in sets} <= {0, heads} or heads == 1:
        return None
    runs = _runs(sets)
    single = [r for r in runs if len(r[0]) == 1]
    grouped = [r for r in runs if 1 < len(r[0]) < heads]
    per_head = _regular(single, [frozenset([h]) for h in range(heads)])
    if not grouped:
        return per_head, [], heads
    in_group = len(grouped[0][0])
    if heads % in_group:
        raise StructureError(f"{heads} heads do not fall into groups of {in_group}")
    count = heads // in_group
    owners = [frozenset(range(g * in_group, (g + 1) * in_group)) for g in range(count)]
    return per_head, _regular(grouped, owners), count


def _runs(sets: list[frozenset[int]]) -> list[tuple[frozenset[int], int, int]]:
    """Runs of equal sets as (set, start, length)."""
    runs: list[tuple[frozenset[int], int, int]] = []
    for index, owners in enumerate(sets):
        if runs and runs[-1][0] == owners:
            runs[-1] = (owners, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((owners, index, 1))
    return runs


def _regular(
    runs: list[tuple[frozenset[int], int, int]], owners: list[frozenset[int]]
) -> list[Slice]:
    """Blocks of rows in which the owners follow each other with one width and one stride."""
    if not runs:
        return []
    per_owner = [[(start, length) for s, start, length in runs if s == owner] for owner in owners]
    blocks = len(per_owner[0])
    if any(len(p) != blocks for p in per_owner) or blocks * len(owners) != len(runs):
        raise StructureError("rows are not divided evenly among the heads")
    slices = []
    for block in range(blocks):
        starts = [p[block][0] for p in per_owner]
        widths = {p[block][1] for p in per_owner}
        strides = {b - a for a, b in itertools.pairwise(starts)}
        if len(widths) != 1 or len(strides) > 1:
            raise StructureError("rows of the heads have no common width and stride")
        width = widths.pop()
        slices.append(Slice("", 0, width, starts[0], strides.pop() if strides else width))
    return slices


def _touched_by_neuron(x: Tensor, neuron: int, parameters: list[Tensor]) -> list[list[list[int]]]:
    """Per parameter and dim, the indices that one neuron's value depends on."""
    value = x[..., neuron]
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    grads = torch.autograd.grad(
        (value * noise.to(x.device)).sum(), parameters, retain_graph=True, allow_unused=True
    )
    return [
        [[] for _ in range(p.ndim)] if g is None else _touched_indices(g)
        for p, g in zip(parameters, grads, strict=True)
    ]


def _neuron_slices(
    name: str, per_neuron: list[list[list[int]]], picked: list[int], size: int
) -> list[Slice]:
    """Rows per neuron of one tensor, from the rows that three neurons touch."""
    for dim in range(len(per_neuron[0])):
        rows = [touched[dim] for touched in per_neuron]
        count = len(rows[0])
        if not 1 <= count <= 2 or any(len(r) != count for r in rows):  # noqa: PLR2004 - gate, up
            continue
        if all(r == [2 * i, 2 * i + 1] for r, i in zip(rows, picked, strict=True)):
            return [Slice(name, dim, 2, 0, 2)]
        offsets = [{r[k] - i for r, i in zip(rows, picked, strict=True)} for k in range(count)]
        if any(len(o) != 1 for o in offsets):
            raise StructureError(f"{name} has no regular rows per neuron (of {size})")
        return [Slice(name, dim, 1, o.pop(), 1) for o in offsets]
    return []


def _add_biases(slices: list[Slice], weights: Mapping[str, Tensor], *, skip: str) -> list[Slice]:
    """A bias follows its weight's output rows, never its own gradient (a K bias has none)."""
    added = list(slices)
    for s in slices:
        if s.tensor == skip or not s.tensor.endswith(".weight"):
            continue
        bias = s.tensor.removesuffix("weight") + "bias"
        if bias in weights and weights[bias].shape == (weights[s.tensor].shape[s.dim],):
            added.append(Slice(bias, 0, s.width, s.offset, s.stride))
    return added
