"""Find every prunable axis of a model by running it once and probing one module of each kind.

Knows traces and probes; knows no architecture. What it returns is optimistic:
`hf_gradnas.verification` proves each kind, and what cannot be proved is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .._compat import attention_implementation
from ..errors import StructureError, first_line
from ..running.wrappers import evaluating
from ..types import Attribute, Axis, Kind, Refusal, Tap
from .attention import attention_versions
from .modeling_gradnas import table_of
from .probe import NotAPair, double_call, double_copy, probe_heads, probe_neurons
from .trace import (
    CONVS,
    Attention,
    Call,
    Matmul,
    Trace,
    above,
    below,
    common_path,
    trace_forward,
)

MAX_TRIES = 3
"""Modules of a kind that are probed before the kind is given up (one may be degenerate)."""
LOOK_AHEAD = 4
LOOK_BACK = 6
LAYER = re.compile(r".*\.\d+(?=\.|$)")
"""The part of a module path that ends with the innermost layer."""


@dataclass(frozen=True)
class Template:
    """The axes of one kind of module, not proved yet; names relative to the module.

    Attributes:
        scope: Path of the module that was probed for all of its kind.
        call: Its captured arguments, in float64.
        versions: The axes (KV groups before the heads that stand in them) in one or more
            versions, which differ in what must follow a cut; the first that is proved holds.
    """

    scope: str
    call: Call
    versions: tuple[tuple[Axis, ...], ...]

    @property
    def kind(self) -> Kind:
        """What the units are: heads (in KV groups or not) or neurons."""
        return self.versions[0][-1].kind


@dataclass(frozen=True)
class Place:
    """One module of a kind: its path, its template, and the shared table it takes a bias from."""

    scope: str
    template: Template
    tied: str = ""


@dataclass(frozen=True)
class Discovery:
    """Places in the order in which the model runs them, and what could not be read."""

    places: tuple[Place, ...]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class _Site:
    """Where an attention or FFN was seen: scope, core module (attention), projection weight."""

    scope: str
    core: str | None
    projection: str
    producers: tuple[str, ...]
    heads: int = 0


def discover(
    model: nn.Module, inputs: Mapping[str, Any], *, allow_nothing: bool = False
) -> Discovery:
    """Find the attentions and FFNs that a forward of `model` runs.

    Args:
        model: A Transformers model.
        inputs: Keyword arguments of its forward; short ones suffice (`samples.probe_inputs`).
        allow_nothing: Return an empty discovery rather than raise (it has convolutions besides).

    Raises:
        DataError: The model cannot run the inputs.
        StructureError: Nothing prunable was found.
    """
    with evaluating(model), attention_implementation(model, "eager"):
        trace = trace_forward(model, inputs)
        places, refusals = _probe_all(model, trace)
    if not places and not allow_nothing:
        seen = "; ".join(f"{r.module} ({r.reason})" for r in refusals) or "no attention, no FFN"
        raise StructureError(
            f"{type(model).__name__}: found nothing to prune. Seen: {seen}. "
            "Pass a model whose forward runs softmax attention or feed-forward layers."
        )
    return Discovery(tuple(places), tuple(refusals))


def _probe_all(model: nn.Module, trace: Trace) -> tuple[list[Place], list[Refusal]]:
    modules = dict(model.named_modules())
    sites = [(site, _kind_of(site, modules[site.scope])) for site in _sites(trace)]
    found: dict[tuple[Any, ...], Template | Refusal] = {}
    tries: dict[tuple[Any, ...], int] = {}
    for site, key in sites:
        if not isinstance(found.get(key), Template) and tries.get(key, 0) < MAX_TRIES:
            tries[key] = tries.get(key, 0) + 1
            outcome = _probe_site(site, modules[site.scope], trace)
            if outcome is not None:
                found[key] = outcome
    places: list[Place] = []
    refusals: list[Refusal] = []
    table = ""
    for site, key in sites:
        kind = found.get(key)
        if isinstance(kind, Refusal):
            refusals.append(replace(kind, module=site.scope))
        elif kind is not None:
            table = _shared_table(site, modules, table)
            removal = kind.versions[0][-1].removal
            cross = removal is not None and removal.cross
            places.append(Place(site.scope, kind, "" if cross or site.core is None else table))
    return places, refusals


def _shared_table(site: _Site, modules: Mapping[str, nn.Module], current: str) -> str:
    """Table (`SharedTable`) that the attention at `site` takes its bias from; "" for none."""
    if site.core is None:
        return current
    core = modules[site.core]
    row = table_of(core)
    if row is None:
        return ""
    return f"{site.core}.{row.table}.weight" if getattr(core, row.flag) else current


def _sites(trace: Trace) -> Iterator[_Site]:
    """Attentions and FFN pairs in running order; each module once."""
    seen: set[str] = set()
    owned = {e.parameter for e in _attention_matmuls(trace)}
    for index, event in enumerate(trace.events):
        if isinstance(event, Attention):
            out = next(_following_weights(trace, index), None)
            if out is None or out.parameter is None or out.parameter in seen:
                continue
            seen.add(out.parameter)
            scope = _called(common_path(event.module, out.module), trace)
            yield _Site(scope, event.module, out.parameter, (), event.heads)
        elif event.parameter is not None and event.parameter not in seen | owned:
            producers = _producers(trace, index, owned)
            scope = _called(_scope_of(trace, index, producers), trace)
            if producers and re.search(r"\.\d+(\.|$)", f".{scope}"):
                seen.add(event.parameter)
                yield _Site(scope, None, event.parameter, producers)


def _attention_matmuls(trace: Trace) -> Iterator[Matmul]:
    """Products with weights inside modules that run an attention, and the out-projections."""
    cores = {e.module for e in trace.events if isinstance(e, Attention)}
    for index, event in enumerate(trace.events):
        if isinstance(event, Attention):
            yield from [m for m in [next(_following_weights(trace, index), None)] if m is not None]
        elif any(event.module.startswith(core + ".") for core in cores):
            yield event


def _following_weights(trace: Trace, index: int) -> Iterator[Matmul]:
    for event in trace.events[index + 1 : index + 1 + 2 * LOOK_AHEAD]:
        if isinstance(event, Matmul) and event.parameter is not None:
            yield event


def _producers(trace: Trace, index: int, owned: set[str | None]) -> tuple[str, ...]:
    """Weights that ran shortly before and put out as many features as event `index` reads.

    Convolutions have no features in their last dimension.
    """
    event = trace.events[index]
    if isinstance(event, Attention) or event.function in CONVS:
        return ()
    features = event.x_shape[-1]
    layer = ""
    found = []
    for earlier in reversed(trace.events[max(0, index - LOOK_BACK) : index]):
        if isinstance(earlier, Attention):
            break
        fits = earlier.out_shape[-1] in (features, 2 * features)
        if (
            fits
            and earlier.function not in CONVS
            and earlier.parameter not in (None, event.parameter)
            and earlier.parameter not in owned
            and f"{earlier.module}.".startswith(layer)
        ):
            found.append(earlier.parameter)
            layer = layer or _layer_of(common_path(event.module, earlier.module))
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _layer_of(path: str) -> str:
    """Prefix of everything in the innermost layer around a module; "" outside of layers."""
    found = LAYER.match(f".{path}")
    return f"{found[0][1:]}." if found else ""


def _scope_of(trace: Trace, index: int, producers: tuple[str, ...]) -> str:
    """The module around event `index` and the weights that ran before it."""
    # The last to run with a weight: modules may share it.
    earlier = [e for e in trace.events[: index + 1] if isinstance(e, Matmul)]
    modules = {e.parameter: e.module for e in earlier}
    scope = trace.events[index].module
    for name in producers[:2]:
        scope = common_path(scope, modules[name])
    return scope


def _called(path: str, trace: Trace) -> str:
    """The nearest enclosing module that is called itself (a ModuleList is not)."""
    while path and path not in trace.calls:
        path = path.rpartition(".")[0]
    return path


def _kind_of(site: _Site, module: nn.Module) -> tuple[Any, ...]:
    """Modules with the same key have the same layout: class, place in the layer, shapes."""
    relative = [
        None if name is None else below(name, site.scope) for name in (site.core, site.projection)
    ]
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    template = re.sub(r"\.\d+(?=\.|$)", ".*", "." + site.scope)
    return (template, type(module), *relative, site.heads, shapes)


def _probe_site(site: _Site, module: nn.Module, trace: Trace) -> Template | Refusal | None:
    """Probe one module; names in the template are relative to the scope.

    None where there is no axis after all: the weights before do not make what the weight reads.
    """
    try:
        owner, _, leaf = site.projection.rpartition(".")
        if leaf != "weight" or owner not in trace.calls:
            raise StructureError(f"the out-projection {site.projection} is not a module of its own")
        twin, call = double_copy(module), double_call(trace.calls[site.scope])
        if site.core is None:
            return _probe_ffn(site, twin, call)
        projection, core = below(site.projection, site.scope), below(site.core, site.scope)
        layout = probe_heads(twin, call, core=core, projection=projection)
        versions = attention_versions(
            twin, layout, core=core, projection=projection, call=trace.calls[site.core]
        )
        return Template(site.scope, call, versions)
    except NotAPair:
        return None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the module's own code may raise anything
        reason = first_line(error)
        return Refusal(site.scope, "neurons" if site.core is None else "heads", reason)


def _probe_ffn(site: _Site, twin: nn.Module, call: Call) -> Template:
    projection = below(site.projection, site.scope)
    inside = [n for n in site.producers if n.startswith(site.scope + ".")]
    if not inside:
        raise StructureError(f"another module owns {site.producers[0]} too, which makes its units")
    producers = [below(n, site.scope) for n in inside]
    size, slices = probe_neurons(twin, call, producers=producers, projection=projection)
    read_at = projection.rpartition(".")[0]
    axis = Axis(":neurons", "", Kind.NEURONS, size, slices, (Tap(read_at, "input", -1),))
    return Template(site.scope, call, ((axis,),))


def move_axis(axis: Axis, scope: str, *, tied: str = "", name: str | None = None) -> Axis:
    """An axis whose names are relative to a module, with names from the root of the model.

    Args:
        axis: The axis.
        scope: Path of the module.
        tied: Key of `Axis.tied`.
        name: Path that the axis is named after; None: the module.
    """
    removal, prefix = axis.removal, scope if name is None else name
    return replace(
        axis,
        tied=tied,
        name=prefix + axis.name,
        module=above(axis.module, scope),
        slices=tuple(replace(s, tensor=above(s.tensor, scope)) for s in axis.slices),
        taps=tuple(replace(t, module=above(t.module, scope)) for t in axis.taps),
        norms=tuple(replace(t, module=above(t.module, scope)) for t in axis.norms),
        attributes=tuple(_move_attribute(a, scope, prefix) for a in axis.attributes),
        parent=None if axis.parent is None else prefix + axis.parent,
        removal=None if removal is None else replace(removal, module=above(removal.module, scope)),
    )


def _move_attribute(attribute: Attribute, scope: str, prefix: str) -> Attribute:
    return replace(
        attribute,
        module=above(attribute.module, scope),
        axis=prefix + attribute.axis,
        per=None if attribute.per is None else prefix + attribute.per,
    )
