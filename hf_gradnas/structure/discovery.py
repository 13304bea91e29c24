"""Find every prunable axis of a model by running it once and following the labels of its entries.

Knows labels and modules; knows no architecture. What it returns is optimistic:
`hf_gradnas.verification` proves each kind, and what cannot be proved is not cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from .._compat import implementations
from ..errors import DataError, StructureError, described
from ..routing import STACKED_DIMS, follows_interface
from ..surgery.modeling_gradnas import table_of
from ..surgery.rows import above, below
from ..types import Axis, Kind, Refusal, Slice, Tap
from .attention import attention_versions
from .channels import read_channels
from .expert_lists import gets_parts
from .expert_neurons import neurons_of_all, taker_of
from .experts import (
    UNROUTED,
    Routing,
    counted_with_others,
    expert_versions,
    find_routings,
    versions_without_router,
)
from .graph import Flow, Forward, trace_graph
from .labels import NOBODY, Labels
from .places import Discovery, Place, Template, axes_at, move_axis
from .products import STACKED
from .reading import Reading
from .repeats import Group, UnlikeLayers, equal_layers
from .sites import Site, find_sites
from .trace import Call, common_path, telling

MAKER_AND_READER = 2
"""Stacks of matrices that neurons need at least."""


def discover(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Discovery:
    """Find the heads, neurons and channels that a forward of `model` makes and reads.

    Args:
        model: Any module; it is left as it was.
        args: Positional arguments of its forward; a small batch suffices.
        kwargs: Keyword arguments of its forward.

    Raises:
        DataError: The model cannot run the inputs.
        StructureError: Its outputs do not depend on its parameters through autograd.
    """
    call = Call(args, kwargs, ())
    groups = equal_layers(model) if isinstance(model, PreTrainedModel) else []
    if groups:
        with suppress(UnlikeLayers, DataError, StructureError):
            return _Finding(model, read_forward(model, args, kwargs, groups=groups)).found(call)
    return _Finding(model, read_forward(model, args, kwargs)).found(call)


def read_forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    groups: Sequence[Group] = (),
) -> Reading:
    """Run the model once under eager attention, follow the labels, and read them.

    Args:
        model: Any module; it is left as it was.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        groups: Equal layers, of which some are passed over.

    Raises:
        DataError: The model cannot run the inputs.
        StructureError: Its outputs do not depend on its parameters through autograd.
        UnlikeLayers: Layers of a group are not equal.
    """
    with implementations(model, attention="eager"):
        with telling(model, args, kwargs):
            forward = trace_graph(model, args, kwargs, groups=groups)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        tables = _shared_tables(model, forward)
        flow = Flow(forward.functions, names, constants=tables)
        outside = _made_outside(forward, flow.labels)
        if outside:
            flow = Flow(forward.functions, names, constants=[*tables, *outside])
        if not all(flow.is_same(came, left) for came, left in forward.repeats.streams):
            raise UnlikeLayers("what comes out of a layer is not what comes in")
        return Reading(model, forward, flow)


def _made_outside(forward: Forward, labels: Labels) -> list[str]:
    """Weights outside of the attentions that make one value a head for several of them."""
    cores: dict[int, set[str]] = {}
    for softmax in labels.softmaxes:
        for root in set(labels.roots(softmax.labels)) - {NOBODY}:
            cores.setdefault(root, set()).add(forward.running(softmax.time))
    shared = {root: paths for root, paths in cores.items() if len(paths) > 1}
    found = []
    for made in labels.made if shared else ():
        roots = labels.roots(made.labels)
        paths = {path for root in roots for path in shared.get(root, ())}
        if len(set(roots)) == len(roots) > 1 and paths:
            place = f"{forward.running(made.time)}."
            inside = (place.startswith(f"{path}.") for path in paths)
            found += [] if any(inside) else [made.weight]
    return list(dict.fromkeys(found))


def _shared_tables(model: nn.Module, forward: Forward) -> list[str]:
    """Tables from which all attentions of a stack take a bias in this forward."""
    rows = {path: (module, table_of(module)) for path, module in model.named_modules()}
    return [
        f"{path}.{row.table}.weight".lstrip(".")
        for path, (module, row) in rows.items()
        if row is not None and getattr(module, row.flag) and row.table in module._modules
        if path in forward.calls and forward.calls[path].kwargs.get(row.argument) is None
    ]


class _Finding:
    """Makes places and refusals out of what was read."""

    def __init__(self, model: nn.Module, reading: Reading) -> None:
        self.model, self.forward, self.reading = model, reading.forward, reading
        self.tables = _shared_tables(model, self.forward)
        self.modules = dict(model.named_modules())
        self.templates: dict[Any, Template] = {}
        self.takers: dict[str, str] = {}
        self.experts: dict[Any, tuple[tuple[Axis, ...], ...]] = {}

    def found(self, call: Call) -> Discovery:
        """Everything, heads and neurons before the channels that they leave."""
        found: list[tuple[float, Place]] = []
        refusals: list[Refusal] = []
        readers: dict[Refusal, str] = {}
        is_known, repeats = isinstance(self.model, PreTrainedModel), self.forward.repeats
        sites = [(site.time, site) for site in find_sites(self.reading, is_known=is_known)]
        table = ""
        for time, site in repeats.spread(sites, lambda site: site.names):
            scope = self._scope(site)
            if site.reason:
                refusals.append(Refusal(scope, str(site.kind), site.reason))
                readers[refusals[-1]] = "" if site.roots else site.reader
                continue
            table = self._shared_table(site, table)
            try:
                template = self._template(site, scope, shares=bool(table))
            except Exception as error:  # a config's own code may raise anything
                refusals.append(Refusal(scope, str(site.kind), described(error)))
                continue
            removal = template.versions[0][-1].removal
            is_free = site.core is None or (removal is not None and removal.cross)
            own = self.forward.calls[scope]
            runner = self._taker(scope)
            tied = "" if is_free else table
            found.append((time, Place(scope, template, own, tied, runner)))
        found += self._experts([place for _, place in found], refusals)
        found += self._stacks([place for _, place in found], refusals)
        places = [place for _, place in sorted(found, key=lambda item: item[0])]
        taken = axes_at([place for place in places if not place.template.holder])
        channels, others = self._channels(taken, {r for _, site in sites for r in site.roots})
        held = {part.tensor for axis in (*taken, *channels) for part in axis.slices}
        refusals += self._stacked(held)
        refusals = [r for r in refusals if readers.get(r, "") not in held]  # or they are channels
        reasons = {n: self.reading.reason_of(n) for n, _ in self.model.named_parameters()}
        for repeat in repeats.passed:
            reasons |= {repeat.moved(n): repeat.moved(reasons[n]) for n in repeat.inner(reasons)}
        return Discovery(tuple(places), channels, tuple(refusals), others, call, reasons)

    def _channels(
        self, taken: Sequence[Axis], roots: Set[int]
    ) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
        """As `read_channels`, with those of layers that were passed over."""
        repeats, began = self.forward.repeats, self.forward.began
        axes, refusals = read_channels(self.reading, taken, roots)
        found = repeats.spread([(began[axis.module], axis) for axis in axes], _names_of)
        seen = [(began[refusal.module], refusal) for refusal in refusals]
        # One of a stream is named after the first layer only.
        others = repeats.spread(seen, lambda refusal: [refusal.module], is_compared=False)
        return tuple(axis for _, axis in found), tuple(refusal for _, refusal in others)

    def _experts(
        self, places: Sequence[Place], refusals: list[Refusal]
    ) -> Iterator[tuple[float, Place]]:
        """Blocks of experts, and when they ran; others are added to the refusals.

        Args:
            places: Modules with heads and neurons, those of experts in a list among them.
            refusals: All that cannot be cut.
        """
        known, kind = set(), str(Kind.EXPERTS)
        routings = [(routing.time, routing) for routing in find_routings(self.reading)]
        for time, routing in self.forward.repeats.spread(routings, lambda routing: routing.names):
            known.add(routing.experts)
            try:
                versions = self._expert_versions(routing, places)
            except StructureError as error:
                refusals.append(Refusal(routing.block, kind, str(error)))
                continue
            shared = counted_with_others(self.model, routing)
            if shared:
                refusals.append(Refusal(routing.block, kind, shared))
            yield from self._placed(routing.block, versions, time)
        for path, call in self.forward.calls.items():
            if path not in known and follows_interface(self.modules[path]):
                versions = versions_without_router(self.modules[path], call)
                refusals.append(Refusal(path, kind, UNROUTED))
                yield from self._placed(path, versions, self.forward.began[path])
        for path, runner in self.takers.items():
            if runner and path not in known and gets_parts(self.modules[path], path, self.forward):
                refusals.append(Refusal(path, kind, UNROUTED))

    def _placed(
        self, path: str, versions: tuple[tuple[Axis, ...], ...], time: float
    ) -> Iterator[tuple[float, Place]]:
        if not versions:
            return
        template, call = self._template_of(path, versions), self.forward.calls[path]
        # Of experts whose matrices are in several modules, the block takes the rows out.
        is_block = bool(template.holder) or any(
            tap.side == "stack" and tap.width > 1 for tap in versions[0][0].taps
        )
        yield time, Place(path, template, call, runner=path if is_block else "")

    def _expert_versions(
        self, routing: Routing, places: Sequence[Place]
    ) -> tuple[tuple[Axis, ...], ...]:
        """The versions of a router's experts, measured once for each kind of block."""
        block = self.modules[routing.block]
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        router = replace(routing.router, tensor=below(routing.router.tensor, routing.block))
        key = (type(block), shapes, router, below(routing.experts, routing.block), routing.chosen)
        if key not in self.experts:
            is_fixed, calls = bool(counted_with_others(self.model, routing)), self.forward.calls
            within = f"{routing.experts}."
            inside = [place for place in places if f"{place.scope}.".startswith(within)]
            members = [
                move_axis(axis, below(place.scope, routing.block))
                for place in inside
                for axis in place.template.versions[0]
            ]
            self.experts[key] = expert_versions(
                self.model, routing, calls, is_fixed=is_fixed, members=members
            )
        return self.experts[key]

    def _stacks(
        self, places: Sequence[Place], refusals: list[Refusal]
    ) -> Iterator[tuple[float, Place]]:
        """Other modules that hold stacks of matrices with neurons, and when they ran."""
        held = {part.tensor for axis in axes_at(places) for part in axis.slices}
        known: dict[Any, Axis | None] = {}
        for path, call in self.forward.calls.items():
            module = self.modules[path]
            own = dict(module.named_parameters(recurse=False))
            stacks = [
                name for name, p in own.items() if p.ndim == STACKED_DIMS and min(p.shape[1:]) > 1
            ]
            if len(stacks) < 2 or any(above(name, path) in held for name in stacks):  # noqa: PLR2004
                continue
            key = (type(module), tuple((name, tuple(p.shape)) for name, p in own.items()))
            if key not in known:
                known[key] = neurons_of_all(module, call)
            axis = known[key]
            if axis is not None:
                refusals[:] = [r for r in refusals if (r.module, r.kind) != (path, str(axis.kind))]
                yield from self._placed(path, ((axis,),), self.forward.began[path])

    def _stacked(self, held: set[str]) -> list[Refusal]:
        """Modules whose tensors hold the weights of several experts, which are not cut."""
        paths = dict.fromkeys(
            name.rpartition(".")[0]
            for name, parameter in self.model.named_parameters()
            if name not in held and sum(size > 1 for size in parameter.shape) == STACKED_DIMS
            if self.reading.opaque_owner([name]) is None
        )
        return [
            Refusal(path, str(Kind.NEURONS), STACKED)
            for path in paths
            if path in self.forward.calls and not isinstance(self.modules[path], _ConvNd)
        ]

    def _taker(self, path: str) -> str:
        """Path of the module that takes rows out for the module at a path; "" for none."""
        around = path
        while around and not isinstance(self.modules[around], nn.ModuleList | nn.ModuleDict):
            around = around.rpartition(".")[0]
        if around not in self.takers:
            self.takers[around] = taker_of(self.modules, around, self.forward.calls)
        return self.takers[around]

    def _scope(self, site: Site) -> str:
        """The nearest called module around all that a site names, or owns."""
        layout = site.layout
        owned = [part.module for part in (*layout.head_slices, *layout.group_slices)]
        path = reduce(common_path, (*site.paths, *owned))
        while path and path not in self.forward.calls:
            path = path.rpartition(".")[0]
        return path

    def _shared_table(self, site: Site, current: str) -> str:
        """Table (`SharedTable`) that the attention at `site` takes its bias from; "" for none."""
        if site.core is None:
            return current
        core = self.modules[site.core]
        row = table_of(core)
        if row is None:
            return ""
        own = f"{site.core}.{row.table}.weight"
        if getattr(core, row.flag) and own not in self.tables:
            return ""
        return own if getattr(core, row.flag) else current

    def _template(self, site: Site, scope: str, *, shares: bool) -> Template:
        """The template of a site's kind: modules of one class and shapes with the same axes."""
        module = self.modules[scope]
        own = [Slice(name, 1) for name in self.tables if name.startswith(f"{site.core}.")]
        layout = replace(
            site.layout,
            head_slices=tuple(_below(s, scope) for s in (*site.layout.head_slices, *own)),
            group_slices=tuple(_below(s, scope) for s in site.layout.group_slices),
            taps=tuple(_at(tap, scope) for tap in site.layout.taps),
            group_taps=tuple(_at(tap, scope) for tap in site.layout.group_taps),
            norms=tuple(_at(norm, scope) for norm in site.layout.norms),
            group_norms=tuple(_at(norm, scope) for norm in site.layout.group_norms),
        )
        projection = below(site.reader, scope)
        if site.core is None:
            read_at = projection.rpartition(".")[0]
            places = [read_at, *(below(name, scope).rpartition(".")[0] for name in site.also)]
            axis = Axis(
                name=f":{Kind.NEURONS}",
                module="",
                kind=Kind.NEURONS,
                size=layout.heads,
                slices=layout.head_slices,
                taps=tuple(Tap(p, "input", -1, layout.width, 0, layout.width) for p in places),
                attributes=tuple(_at(size, scope) for size in site.sizes),
            )
            versions: tuple[tuple[Axis, ...], ...] = ((axis,),)
        else:
            core = below(site.core, scope)
            call = self.forward.calls[site.core]
            versions = attention_versions(
                module,
                layout,
                core=core,
                projection=projection,
                call=call,
                shares=shares,
                sizes=tuple(_at(size, scope) for size in site.sizes),
            )
        return self._template_of(scope, versions, shares=shares)

    def _template_of(
        self, scope: str, versions: tuple[tuple[Axis, ...], ...], *, shares: bool = False
    ) -> Template:
        """The one template of all modules of a class and shapes that have the same versions."""
        module = self.modules[scope]
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        key = (type(module), shapes, versions, shares)
        return self.templates.setdefault(key, Template(versions))


def _names_of(axis: Axis) -> list[str]:
    """Modules and tensors that belong to an axis."""
    places: tuple[Any, ...] = (*axis.taps, *axis.norms, *axis.attributes)
    return [*(part.tensor for part in axis.slices), *(place.module for place in places)]


def _below(rows: Any, scope: str) -> Any:
    return replace(rows, tensor=below(rows.tensor, scope))


def _at(place: Any, scope: str) -> Any:
    return replace(place, module=below(place.module, scope))
