"""Find every prunable axis of a model by running it once and probing one module of each kind.

Knows traces and probes; knows no architecture. What it returns is optimistic:
`hf_gradnas.verification` proves each kind, and what cannot be proved is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .._compat import attention_implementation
from ..errors import StructureError
from ..types import Attribute, Axis, Kind, Refusal
from . import couplings
from .attention import attention_versions
from .probe import double_call, double_copy, probe_heads, probe_neurons
from .trace import (
    Attention,
    Call,
    Matmul,
    Trace,
    above,
    below,
    common_path,
    trace_forward,
)

PROBE_EXAMPLES = 2
PROBE_TOKENS = 16
MIN_PROBE_TOKENS = 4
LOOK_AHEAD = 4
LOOK_BACK = 6


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


def discover(model: nn.Module, inputs: Mapping[str, Any]) -> Discovery:
    """Find the attentions and FFNs that a forward of `model` runs.

    Args:
        model: A Transformers model.
        inputs: Keyword arguments of its forward, as a dataloader yields them; the first two rows
            and sixteen tokens are used.

    Raises:
        StructureError: Nothing prunable was found.
    """
    with evaluating(model), attention_implementation(model, "eager"):
        trace = trace_forward(model, small_inputs(inputs))
        places, refusals = _probe_all(model, trace)
    if not places:
        seen = "; ".join(f"{r.module} ({r.reason})" for r in refusals) or "no attention, no FFN"
        raise StructureError(
            f"{type(model).__name__}: found nothing to prune. Seen: {seen}. "
            "Pass a model whose forward runs softmax attention or feed-forward layers."
        )
    return Discovery(tuple(places), tuple(refusals))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the ``with``; every module gets its own flag back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def small_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first examples and tokens of a batch; images and audio keep their size.

    Sequences of one to three tokens are repeated: a single token attends to itself whatever its
    query and key are, so that neither would show.
    """
    tokens = inputs.get("input_ids")
    small: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            small[name] = value
            continue
        cut = value[:PROBE_EXAMPLES]
        labels = value.ndim == 2 and not value.is_floating_point()  # noqa: PLR2004 - (batch, tokens)
        if is_token_aligned(value, tokens) or labels:
            if 0 < cut.shape[1] < MIN_PROBE_TOKENS:
                cut = cut.repeat(1, MIN_PROBE_TOKENS, *[1] * (cut.ndim - 2))
            cut = cut[:, :PROBE_TOKENS].contiguous()  # losses call labels.view(-1)
        small[name] = cut
    return small


def is_token_aligned(value: torch.Tensor, tokens: torch.Tensor | None) -> bool:
    """Whether a tensor of a batch holds one entry per token (and is no image)."""
    if tokens is None or value.ndim < 2 or value.shape[1] != tokens.shape[1]:  # noqa: PLR2004
        return False
    return value.ndim == tokens.ndim or not value.is_floating_point()


def _probe_all(model: nn.Module, trace: Trace) -> tuple[list[Place], list[Refusal]]:
    modules = dict(model.named_modules())
    known: dict[tuple[Any, ...], Template | Refusal] = {}
    places: list[Place] = []
    refusals: list[Refusal] = []
    table = ""
    for site in _sites(trace):
        key = _kind_of(site, modules[site.scope])
        if key not in known:
            known[key] = _probe_site(site, modules[site.scope], trace)
        found = known[key]
        if isinstance(found, Refusal):
            refusals.append(replace(found, module=site.scope))
            continue
        table = _shared_table(site, modules, table)
        removal = found.versions[0][-1].removal
        cross = removal is not None and removal.cross
        places.append(Place(site.scope, found, "" if cross or site.core is None else table))
    return places, refusals


def _shared_table(site: _Site, modules: Mapping[str, nn.Module], current: str) -> str:
    """Table (`SharedTable`) that the attention at `site` takes its bias from; "" for none."""
    if site.core is None:
        return current
    attributes = vars(modules[site.core])
    for row in couplings.SHARED_TABLES:
        if row.flag in attributes:
            return f"{site.core}.{row.table}.weight" if attributes[row.flag] else current
    return ""


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
            scope = _called(_scope_of(event, producers, trace), trace)
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
    """Weights that ran shortly before and put out as many features as event `index` reads."""
    event = trace.events[index]
    if isinstance(event, Attention):
        return ()
    features = event.x_shape[-1]
    found = []
    for earlier in reversed(trace.events[max(0, index - LOOK_BACK) : index]):
        if isinstance(earlier, Attention):
            break
        fits = earlier.out_shape[-1] in (features, 2 * features)
        if (
            fits
            and earlier.parameter not in (None, event.parameter)
            and earlier.parameter not in owned
        ):
            found.append(earlier.parameter)
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _scope_of(event: Matmul, producers: tuple[str, ...], trace: Trace) -> str:
    modules = {e.parameter: e.module for e in trace.events if isinstance(e, Matmul)}
    scope = event.module
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


def _probe_site(site: _Site, module: nn.Module, trace: Trace) -> Template | Refusal:
    """Probe one module; names in the template are relative to the scope."""
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
    except StructureError as error:
        return Refusal(site.scope, "neurons" if site.core is None else "heads", str(error))


def _probe_ffn(site: _Site, twin: nn.Module, call: Call) -> Template:
    projection = below(site.projection, site.scope)
    inside = [n for n in site.producers if n.startswith(site.scope + ".")]
    producers = [below(n, site.scope) for n in inside]
    size, slices = probe_neurons(twin, call, producers=producers, projection=projection)
    read_at = projection.rpartition(".")[0]
    axis = Axis(":neurons", "", Kind.NEURONS, size, read_at, 1, slices)
    return Template(site.scope, call, ((axis,),))


def _move_attribute(attribute: Attribute, scope: str) -> Attribute:
    return replace(
        attribute,
        module=above(attribute.module, scope),
        axis=scope + attribute.axis,
        per=None if attribute.per is None else scope + attribute.per,
    )


def move_axis(axis: Axis, scope: str, *, tied: str = "") -> Axis:
    """An axis whose names are relative to a module, with names from the root of the model."""
    removal = axis.removal
    return replace(
        axis,
        tied=tied,
        name=scope + axis.name,
        module=above(axis.module, scope),
        read_at=above(axis.read_at, scope),
        slices=tuple(replace(s, tensor=above(s.tensor, scope)) for s in axis.slices),
        attributes=tuple(_move_attribute(a, scope) for a in axis.attributes),
        parent=None if axis.parent is None else scope + axis.parent,
        removal=None if removal is None else replace(removal, module=above(removal.module, scope)),
    )
