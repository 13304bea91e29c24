"""Find the channels of convolutions and plain networks that can be cut, by one traced forward.

Knows how the layers of torch name their sizes; what goes together stands in `channel_graph`. What
it returns is optimistic: the proof runs the whole model masked and cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..errors import described
from ..types import KINDS, Attribute, Axis, Kind, Refusal, Role, Slice, Tap
from .channel_graph import Flow, Forward, Run, trace_graph
from .channel_labels import ATTRIBUTE, NOBODY, OUTPUT, Rows, core, nobody, varying
from .channel_rules import Edge

CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
"""Modules whose features stand in dimension 1, also where that is the last."""
PRODUCERS = (_ConvNd, nn.Linear, Conv1D)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
"""Modules whose result for one channel depends on others, or is not 0 where their input is."""
ACTIVATIONS = (
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Softplus,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
)
"""Modules without parameters that are not 0 where their input is."""
OPAQUE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag)
"""Modules whose tensors or sizes cannot be sliced by channels."""
SIZES = {
    "num_features": (_NormBase,),
    "num_channels": (nn.GroupNorm,),
    "normalized_shape": (nn.LayerNorm, nn.RMSNorm),
}
"""Attribute that repeats the number of channels, by norm."""


class _IrregularRows(Exception):
    """Rows that no slice can say."""


def discover_channels(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    taken: Iterable[Axis] = (),
) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
    """Find the channels that a forward of `model` makes and reads.

    Args:
        model: Any module; it is left as it was.
        args: Positional arguments of its forward; a small batch suffices.
        kwargs: Keyword arguments of its forward.
        taken: Axes that were found otherwise; channels that own rows of theirs are left out.

    Returns:
        Axes of kind ``channels`` in running order, not proved yet, and the channels that were seen
        but cannot be cut. A forward that cannot be traced is one refusal of the module ``""``.
    """
    try:
        forward = trace_graph(model, args, kwargs)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return _Reading(model, forward, Flow(forward.functions, names)).read(tuple(taken))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"the forward cannot be traced ({described(error)})"
        return (), (Refusal("", str(Kind.CHANNELS), reason),)


class _Entries:
    """Root of the label of every entry along one dimension of a tensor."""

    def __init__(self, where: str, roots: Sequence[int]) -> None:
        self.where, self.roots, self.present = where, roots, frozenset(roots)

    def patterns(self, units: Mapping[int, int]) -> list[tuple[int, int, int]]:
        """Width, offset and stride of the entries of the units (number by root).

        Several if the entries of a unit are apart, none if the units have none.

        Raises:
            _IrregularRows: The entries are not evenly spaced, or differ in number.
        """
        if self.present.isdisjoint(units):
            return []
        owned: list[list[int]] = [[] for _ in units]
        for entry, root in enumerate(self.roots):
            if root in units:
                owned[units[root]].append(entry)
        if len({len(entries) for entries in owned}) > 1:
            raise _IrregularRows(f"they own different numbers of entries of {self.where}")
        columns = list(zip(*owned, strict=True))
        apart = [any(b - a != 1 for a, b in zip(*pair, strict=True)) for pair in pairwise(columns)]
        starts = [0, *(number for number, gap in enumerate(apart, 1) if gap), len(columns)]
        return [(end - start, *self._evenly(columns[start])) for start, end in pairwise(starts)]

    def _evenly(self, column: Sequence[int]) -> tuple[int, int]:
        """Offset and stride of the first entry of every unit."""
        steps = {b - a for a, b in pairwise(column)}
        if len(steps) > 1 or min(steps) < 1:
            raise _IrregularRows(f"their entries of {self.where} follow no regular pattern")
        return column[0], steps.pop()


class _Reading:
    """Reads axes out of the labels of a forward.

    All that binds or refuses labels happens before the first root is looked up.
    """

    def __init__(self, model: nn.Module, forward: Forward, flow: Flow) -> None:
        self.flow, self.labels = flow, flow.labels
        self.modules = dict(model.named_modules())
        for edge in forward.outputs:
            self.labels.refuse(self._at(edge), OUTPUT)
        makers = self._makers(forward.runs)
        producing = [r for r in forward.runs if r.path in makers]
        following = [r for r in forward.runs if r.path not in makers and _is_norm(r.module)]
        producers, norms = self._stand(producing), self._stand(following)
        sizes = [size for run in following for size in self._follow(run)]
        sizes += [(r.tensor, "groups", x) for r, x in self.labels.rows.items() if r.dim < 0]

        def entries(where: str, labels: Tensor) -> _Entries:
            return _Entries(where, self.labels.roots(labels))

        self.producers = [(path, dim, entries(path, x)) for path, dim, x in producers]
        self.norms = [(path, dim, entries(path, x)) for path, dim, x in norms]
        self.sizes = [(path, name, entries(path, x)) for path, name, x in sizes]
        names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
        order = {name: number for number, name in enumerate(names)}
        bound = [rows for rows in self.labels.rows if rows.dim != ATTRIBUTE]
        bound.sort(key=lambda rows: (order[rows.tensor], rows.dim))
        self.rows = {rows: entries(rows.tensor, self.labels.rows[rows]) for rows in bound}
        self.reasons = self.labels.reasons()

    def _at(self, edge: Edge) -> Tensor:
        labels = self.flow.at(edge)
        return nobody((1,)) if labels is None else labels

    def _makers(self, runs: Iterable[Run]) -> set[str]:
        """Modules whose output holds the channels that they make with a weight of their own."""
        called = {run.path: run for run in runs}
        makers = {run.path for run in called.values() if isinstance(run.module, PRODUCERS)}
        for made in self.labels.made:
            path = made.weight.rpartition(".")[0]
            if path in makers:
                continue
            returned = self._at(called[path].edge).unique() if path in called else nobody((1,))
            if set(self.labels.roots(made.labels)) & set(self.labels.roots(returned)):
                makers.add(path)
            else:
                where = path or "the model itself"
                self.labels.refuse(made.labels, f"{where} makes them, but does not return them")
        return makers

    def _stand(self, runs: Iterable[Run]) -> list[tuple[str, int, Tensor]]:
        """Path, dimension and labels of what modules return; refused where no tap can say it."""
        found = []
        for run in runs:
            labels = self._at(run.edge)
            dims, last = varying(labels), labels.ndim - 1
            if dims == (1,) and (last > 1 or isinstance(run.module, CHANNELS_FIRST)):
                found.append((run.path, 1, core(labels, dims)))
            elif dims == (last,):
                found.append((run.path, -1, core(labels, dims)))
            elif dims:
                why = f"{run.path} returns them in the dimensions {dims} of {labels.ndim}"
                self.labels.refuse(core(labels, dims), why)
        return found

    def _follow(self, run: Run) -> list[tuple[str, str, Tensor]]:
        """Bind the buffers of a norm, and return the sizes that none of its tensors has."""
        labels, module = self._at(run.edge), run.module
        dims = varying(labels)
        if len(dims) != 1:
            return []
        vector = core(labels, dims)
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.shape == vector.shape:
                self.labels.bind(Rows(f"{run.path}.{name}".lstrip("."), 0), vector)
        sizes = []
        if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
            sizes.append((run.path, "num_groups", vector))
        for name, kinds in SIZES.items():
            if isinstance(module, kinds) and not any(tensor.ndim for tensor in tensors):
                size = getattr(module, name)
                place = dims[0] - labels.ndim + len(size) if isinstance(size, tuple) else 0
                if place == 0:
                    sizes.append((run.path, name, vector))
                elif place > 0:
                    self.labels.refuse(vector, f"{run.path} repeats their number within {size}")
        return sizes

    def read(self, taken: Sequence[Axis]) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
        """Axes and refusals in running order; rows that `taken` owns are left out."""
        owners: dict[int, list[str]] = {}
        for path, _, entries in self.producers:
            for root in dict.fromkeys(entries.roots):
                if root != NOBODY:
                    owners.setdefault(root, []).append(path)
        groups: dict[str, dict[tuple[str, ...], list[int]]] = {}
        for root, paths in owners.items():
            groups.setdefault(paths[0], {}).setdefault(tuple(paths), []).append(root)
        found = [self._read_group(path, list(g.values()), taken) for path, g in groups.items()]
        return (
            tuple(item for item in found if isinstance(item, Axis)),
            tuple(item for item in found if isinstance(item, Refusal)),
        )

    def _read_group(
        self, path: str, parts: Sequence[Sequence[int]], taken: Sequence[Axis]
    ) -> Axis | Refusal | None:
        """The axis of the channels that `path` makes first; None where there is nothing to say."""
        roots = [root for part in parts for root in part]
        touched = {rows for rows, held in self.rows.items() if not held.present.isdisjoint(roots)}
        owned = {Rows(s.tensor, s.dim) for axis in taken for s in axis.slices}
        if len(roots) == 1 or touched & owned:
            return None
        reason = self._obstacle(roots, touched, taken)
        if reason == OUTPUT and not touched & self.labels.columns:
            return None
        if reason is None and len(parts) > 1:
            reason = "only some of them meet the channels of other layers"
        if reason is None:
            try:
                return self._axis(path, {root: number for number, root in enumerate(roots)})
            except _IrregularRows as error:
                reason = str(error)
        return Refusal(path, str(Kind.CHANNELS), reason)

    def _obstacle(
        self, roots: Sequence[int], touched: Iterable[Rows], taken: Sequence[Axis]
    ) -> str | None:
        """Why the units cannot be cut, if there is a reason."""
        names = sorted(rows.tensor for rows in touched)
        attentions = [a.removal.module for a in taken if a.kind is Kind.HEADS and a.removal]
        inside = [n for n in names if any(n.startswith(f"{a}.") for a in attentions)]
        if inside and inside == names:
            return f"they are inside an attention, whose heads are pruned instead ({names[0]})"
        if inside:
            return f"they are the residual stream of attention layers ({inside[0]} belongs to one)"
        reasons = [why for root in roots for why in self.reasons.get(root, ())]
        if OUTPUT in reasons:
            return OUTPUT
        owner = next(filter(None, map(self._opaque_owner, names)), None)
        if owner is not None:
            return f"{owner} holds some of them, which is not cut by channels"
        return reasons[0] if reasons else None

    def _opaque_owner(self, name: str) -> str | None:
        """The module that owns a tensor, if its tensors cannot be sliced one by one."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            if isinstance(self.modules[path], OPAQUE) or ".parametrizations." in f".{name}":
                return f"{path or 'the model'} ({type(self.modules[path]).__name__})"
        return None

    def _axis(self, path: str, units: Mapping[int, int]) -> Axis:
        """The axis of the units, by root.

        Raises:
            _IrregularRows: Slices cannot say it.
        """
        name = f"{path}:{Kind.CHANNELS}"
        taps, norms = (
            tuple(
                Tap(place, "output", dim, *pattern)
                for place, dim, entries in places
                for pattern in entries.patterns(units)
            )
            for places in (self.producers, self.norms)
        )
        attributes = []
        for place, attribute, entries in self.sizes:
            each, value = sum(width for width, _, _ in entries.patterns(units)), len(entries.roots)
            if each:
                shared = None if each * len(units) == value else value
                attributes.append(Attribute(place, attribute, name, each, value=shared))
        return Axis(
            name=name,
            module=path,
            kind=Kind.CHANNELS,
            size=len(units),
            slices=tuple(
                Slice(rows.tensor, rows.dim, *pattern, self._role(rows))
                for rows, entries in self.rows.items()
                for pattern in entries.patterns(units)
            ),
            taps=taps,
            attributes=tuple(attributes),
            minimum=KINDS[Kind.CHANNELS].minimum,
            norms=norms,
        )

    def _role(self, rows: Rows) -> Role:
        """What the rows do; a depthwise kernel, which reads no sum over channels, follows."""
        if rows in self.labels.columns:
            return "reads"
        makes = any(made.weight == rows.tensor for made in self.labels.made)
        reads = any(other.tensor == rows.tensor for other in self.labels.columns)
        return "makes" if makes and reads else "follows"


def _is_norm(module: nn.Module) -> bool:
    """Whether the result for one channel may not be 0 where the input is, or depend on others."""
    if isinstance(module, (*NORMS, *ACTIVATIONS)):
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    whole = next(module.children(), None) is None
    return bool(own) and whole and not isinstance(module, (nn.PReLU, nn.Embedding))
