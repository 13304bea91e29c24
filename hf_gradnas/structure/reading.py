"""Read the labels of a forward: which rows, modules and sizes belong to which labels.

Knows how the layers of torch name their sizes; what goes together is in `labels`. Axes are made
of it in `discovery`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..types import Attribute, Role, Slice, Tap
from .graph import Flow, Forward, Run
from .labels import ATTRIBUTE, NOBODY, OUTPUT, Labels, Rows, core, nobody, varying
from .products import EMBEDDED

CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
"""Modules whose features are in dimension 1, also where that is the last."""
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
"""Modules whose tensors or sizes cannot be sliced."""
SIZES = {
    "num_features": (_NormBase,),
    "num_channels": (nn.GroupNorm,),
    "normalized_shape": (nn.LayerNorm, nn.RMSNorm),
}
"""Attribute that repeats the number of channels, by norm."""
Units = Mapping[int, int]
"""Number of each unit of an axis, by the root of its labels."""


class IrregularRows(Exception):
    """Rows that no slice can say."""


class Entries:
    """Root of the label of every entry along one dimension of a tensor."""

    def __init__(self, where: str, roots: Sequence[int]) -> None:
        self.where, self.roots = where, roots
        self.present = frozenset(roots) - {NOBODY}

    def patterns(self, units: Units) -> list[tuple[int, int, int]]:
        """Width, offset and stride of the entries of the units (number by root).

        Several if the entries of a unit are apart, none if the units have none.

        Raises:
            IrregularRows: The entries are not evenly spaced, or differ in number.
        """
        numbers = np.array([units.get(root, NOBODY) for root in self.roots])
        entries = np.flatnonzero(numbers != NOBODY)
        if not len(entries):
            return []
        owners = numbers[entries]
        owned = np.bincount(owners, minlength=max(units.values()) + 1)
        if owned.min() < owned.max():
            raise IrregularRows(f"they own different numbers of entries of {self.where}")
        table = entries[np.argsort(owners, kind="stable")].reshape(len(owned), -1)
        apart = (np.diff(table, axis=1) != 1).any(axis=0)
        starts = [0, *(np.flatnonzero(apart) + 1).tolist(), table.shape[1]]
        return [
            (end - start, *self._evenly(table[:, start], end - start))
            for start, end in pairwise(starts)
        ]

    def _evenly(self, column: np.ndarray, width: int) -> tuple[int, int]:
        """Offset and stride of the first entry of every unit; a single unit's stride is `width`."""
        steps = np.diff(column) if len(column) > 1 else np.array([width])
        if steps.min() < 1 or steps.min() < steps.max():
            raise IrregularRows(f"their entries of {self.where} follow no regular pattern")
        return int(column[0]), int(steps[0])


class Reading:
    """What the labels of a forward say of tensors, modules and sizes, by their roots.

    All that binds or refuses labels happens before the first root is looked up.

    Attributes:
        rows: Every dimension of a tensor that has labels, as the model names its tensors.
        readers: Those that read with a product, and when they first do, in running order.
        producers: Path, tap dimension and entries of what layers with a weight of their own return.
        norms: The same of norms.
        sizes: Path, attribute and entries of sizes that no tensor repeats.
        makers: Weights that make each root.
        reasons: Why labels cannot be cut.
        untapped: Why they cannot be masked where they are made.
        collapsed: First path that makes several entries of one label, by its root.
    """

    def __init__(self, model: nn.Module, forward: Forward, flow: Flow) -> None:
        self.flow, self.labels, self.forward = flow, flow.labels, forward
        self.modules = dict(model.named_modules())
        self._tapless: list[tuple[Tensor, str]] = []
        self._uniform: list[tuple[str, Tensor]] = []
        for edge in forward.outputs:
            self.labels.refuse(self._at(edge), OUTPUT)
        made_by = self._makers(forward.runs)
        producing = [r for r in forward.runs if r.path in made_by]
        following = [r for r in forward.runs if r.path not in made_by and _is_norm(r.module)]
        producers, norms = self._stand(producing, made_by), self._stand(following, made_by)
        sizes = [size for run in following for size in self._follow(run)]
        sizes += [(r.tensor, "groups", x) for r, x in self.labels.rows.items() if r.dim < 0]
        _tie_side_by_side(self.labels, forward)
        self.labels.standing()  # which may tie

        def entries(where: str, labels: Tensor) -> Entries:
            return Entries(where, self.labels.roots(labels))

        self.standing = self.labels.standing()
        self.producers = [(path, dim, entries(path, x)) for path, dim, x in producers]
        self.norms = [(path, dim, entries(path, x)) for path, dim, x in norms]
        self.sizes = [(path, name, entries(path, x)) for path, name, x in sizes]
        names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
        order = {name: number for number, name in enumerate(names)}
        bound = [rows for rows in self.labels.rows if rows.dim != ATTRIBUTE]
        bound.sort(key=lambda rows: (order[rows.tensor], rows.dim))
        self.rows = {rows: entries(rows.tensor, self.labels.rows[rows]) for rows in bound}
        self._in_order = tuple(self.rows)
        self._rows_of: dict[int, list[int]] = {}  # places among the rows in order
        self._rows_in: dict[str, list[Rows]] = {}
        for number, (rows, held) in enumerate(self.rows.items()):
            self._rows_in.setdefault(rows.tensor, []).append(rows)
            for root in held.present:
                self._rows_of.setdefault(root, []).append(number)
        self.readers = dict(sorted(self.labels.readers.items(), key=lambda item: item[1]))
        self.reasons = self.labels.reasons()
        self.untapped = {
            root: why for x, why in self._tapless for root in self.labels.roots(x.flatten())
        }
        self.collapsed: dict[int, str] = {}
        for path, label in self._uniform:
            self.collapsed.setdefault(self.labels.roots(label)[0], path)
        self._made = {made.weight for made in self.labels.made}
        self.makers: dict[int, set[str]] = {}
        for made in self.labels.made:
            for root in self.labels.roots(made.labels):
                self.makers.setdefault(root, set()).add(made.weight)

    def _at(self, edge: tuple[object, int]) -> Tensor:
        labels = self.flow.at(edge)
        return nobody((1,)) if labels is None else labels

    def _makers(self, runs: Iterable[Run]) -> set[str]:
        """Modules whose output holds the entries that they make with a weight of their own."""
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
                why = f"{where} makes them, but does not return them"
                self._tapless.append((made.labels, why))
        return makers

    def _stand(
        self, runs: Iterable[Run], made_by: Collection[str]
    ) -> list[tuple[str, int, Tensor]]:
        """Path, dimension and labels of what modules return; noted where no tap can say it."""
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
                self._tapless.append((core(labels, dims), why))
            elif not labels.numel():
                continue
            elif run.path in made_by and labels.shape[_features_dim(run.module, last)] > 1:
                self._uniform.append((run.path, labels.flatten()[:1]))
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

    def touched(self, roots: Iterable[int]) -> list[Rows]:
        """Dimensions of tensors that hold any of the roots."""
        found = {number for root in roots for number in self._rows_of.get(root, ())}
        return [self._in_order[number] for number in sorted(found)]

    def made_by(self, weight: str) -> set[int]:
        """Labels that a weight makes, by their roots."""
        held = [made.labels for made in self.labels.made if made.weight == weight]
        return {root for labels in held for root in self.labels.roots(labels)}

    def slices(self, units: Units) -> tuple[Slice, ...]:
        """Rows that belong to the units.

        Raises:
            IrregularRows: Slices cannot say it.
        """
        return tuple(
            Slice(rows.tensor, rows.dim, *pattern, self._role(rows))
            for rows in self.touched(units)
            for pattern in self.rows[rows].patterns(units)
        )

    def taps(
        self, places: Iterable[tuple[str, int, Entries]], units: Units, *, side: str = "output"
    ) -> tuple[Tap, ...]:
        """Where the units are among what modules return.

        Raises:
            IrregularRows: Taps cannot say it.
        """
        return tuple(
            Tap(path, side, dim, *pattern)
            for path, dim, entries in places
            for pattern in entries.patterns(units)
        )

    def sizes_of(self, units: Units, axis: str) -> tuple[Attribute, ...]:
        """Sizes that no tensor repeats, and the share of each unit of the axis in them.

        Raises:
            IrregularRows: Units have different shares.
        """
        found = []
        for path, name, entries in self.sizes:
            each, value = sum(width for width, _, _ in entries.patterns(units)), len(entries.roots)
            if each and isinstance(vars(self.modules[path]).get(name), int | tuple):
                shared = None if each * len(units) == value else value
                found.append(Attribute(path, name, axis, each, value=shared))
        return tuple(found)

    def _role(self, rows: Rows) -> Role:
        """What the rows do; a depthwise kernel, which reads no sum over channels, follows."""
        if rows in self.readers:
            return "reads"
        reads = any(other in self.readers for other in self._rows_in[rows.tensor])
        return "makes" if reads and rows.tensor in self._made else "follows"

    def mixes(self, path: str, entries: Entries) -> bool:
        """Whether a norm runs across the units: its own values, if it has any, belong to them."""
        module = self.modules[path]
        named = [*module.named_parameters(), *module.named_buffers()]
        own = [rows for n, _ in named for rows in self._rows_in.get(f"{path}.{n}".lstrip("."), ())]
        if any(self.rows[rows].present & entries.present for rows in own):
            return True
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return isinstance(module, NORMS) and not tensors

    def is_elementwise(self, path: str) -> bool:
        """Whether each entry of what a module returns is computed from that of its input alone.

        Then it matters to nothing that is masked where it is read.
        """
        module, (x, *rest) = self.modules[path], self.forward.calls[path].args or (None,)
        if isinstance(module, NORMS) or not isinstance(x, Tensor) or rest:
            return False
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            x = torch.randn_like(x.detach()).requires_grad_()
            out = module(x)
            if not isinstance(out, Tensor) or out.shape != x.shape or not out.requires_grad:
                return False
            (gradient,) = torch.autograd.grad(out[..., 0].sum(), x)
        return not bool(gradient[..., 1:].any())

    def reason_of(self, name: str) -> str:
        """Why a parameter is not pruned, if no axis holds it."""
        held = [self.rows[rows] for rows in self._rows_in.get(name, ())]
        roots = {root for entries in held for root in entries.present}
        reasons = [why for root in sorted(roots) for why in self.reasons.get(root, ())]
        if EMBEDDED in reasons:
            return "it belongs to the embeddings, or to the residual stream that starts there"
        if OUTPUT in reasons:
            return "it makes the model's output, or belongs to the residual stream that ends there"
        if reasons:
            return reasons[0]
        if not roots:
            return "no unit of a layer has rows of it, or the sample does not reach it"
        return "what it makes or follows is no sub-layer: it goes where all units share it"

    def opaque_owner(self, names: Iterable[str]) -> str | None:
        """The module that owns a tensor, if its tensors cannot be sliced one by one."""
        for name in names:
            path = name
            while path:
                path = path.rpartition(".")[0]
                if isinstance(self.modules[path], OPAQUE) or ".parametrizations." in f".{name}":
                    return f"{path or 'the model'} ({type(self.modules[path]).__name__})"
        return None


def _tie_side_by_side(labels: Labels, forward: Forward) -> None:
    """Tie the heads of two attentions of a module, if one weight reads all of one, then the other.

    Such a module has one number of heads (ConvBERT): what is first goes with what is first.
    """
    met = {root for meeting in labels.meetings for root in labels.roots(meeting.labels)}
    heads: dict[str, list[set[int]]] = {}
    for softmax in labels.softmaxes:
        roots = set(labels.roots(softmax.labels)) & met - {NOBODY}
        heads.setdefault(forward.running(softmax.time), []).append(roots)
    for found in (found for found in heads.values() if len(found) > 1):
        for rows in labels.readers:
            order = list(dict.fromkeys(labels.roots(labels.rows[rows])))
            first, second = order[: len(order) // 2], order[len(order) // 2 :]
            if len(first) > 1 and set(first) in found and set(second) in found:
                labels.tie(torch.tensor(first), torch.tensor(second), "one weight reads both")


def _features_dim(module: nn.Module, last: int) -> int:
    """The dimension in which a module has its features; `last` unless they come first."""
    return 1 if isinstance(module, CHANNELS_FIRST) else last


def _is_norm(module: nn.Module) -> bool:
    """Whether the result for one channel may not be 0 where the input is, or depend on others."""
    if isinstance(module, (*NORMS, *ACTIVATIONS)):
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    whole = next(module.children(), None) is None
    return bool(own) and whole and not isinstance(module, (nn.PReLU, nn.Embedding))
