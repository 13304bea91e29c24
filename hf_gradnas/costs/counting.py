"""Count what the closed forms of costs need, in one forward of the whole model.

Knows how to read its trace; the forward is in `costs.flops`, the formulas in `costs.closed_form`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..structure.trace import Trace, rows_of
from ..surgery.lists import real_names, stacks_in, with_stacks
from ..types import KINDS, Axis, CostModel, Prunable, Refusal, StockSpace, Structure
from .cache import cache_cost
from .closed_form import flops_cost, params_cost
from .flops import count_flops, heads_of


def count_costs(
    model: nn.Module,
    structure: Structure,
    inputs: Mapping[str, Any],
    *,
    layout: str,
    args: tuple[Any, ...] = (),
) -> dict[str, CostModel]:
    """Closed forms of FLOPs, parameters, bytes of weights and of the cache.

    Args:
        model: The model that holds the axes of `structure`.
        structure: Its proved axes.
        inputs: Batch 1 at the length that FLOPs are counted for (see `flops_inputs`), by keyword.
        layout: ``"stock"`` or ``"per_layer"``; see `params_cost`.
        args: Positional arguments before the keywords.

    Returns:
        By name: ``flops``, ``params``, ``memory``, ``kv_cache``, and ``active_params`` where a
        token runs through a few of many experts. FLOPs are 2 x MACs of all matmuls and convolutions
        of one forward under eager attention, as `FlopCounterMode` counts them; look-ups are 0. A
        weight that a forward computes first (weight norm) is not known by name: its FLOPs are
        constant.
    """
    axes = _with_counted_names(model, structure.axes)
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes = with_stacks(own, axes)
    total_flops, trace = count_flops(model, inputs, args=args)
    macs: dict[str, int] = defaultdict(int)
    for event in trace.events:
        if event.parameter is not None:
            macs[event.parameter] += event.macs
    rows = {name: rows_of(macs[name], model.get_parameter(name)) for name in macs}
    for stack, names in stacks_in(own, axes).items():
        rows[stack] = sum(rows.get(name, 0.0) for name in names) / max(len(names), 1)
    flops = flops_cost(
        axes,
        shapes,
        rows=rows,
        macs_per_head={a.name: _macs_per_head(a, trace) for a in axes if KINDS[a.kind].attends},
        total_flops=total_flops,
        in_layers={a.name: _flops_in(a.module, trace) for a in axes if a.is_layer},
    )
    elements = {name: float(prod(shape)) for name, shape in own.items()}
    rest = partial(parts_of_rest, model, axes, structure.refusals)
    flops_of = {name: 2.0 * rows.get(name, 0) * size for name, size in elements.items()}
    parts = rest(costs=flops_of, constant=flops.constant)
    costs = {"flops": replace(flops, parts=parts, unit=_flops_unit(inputs))}
    given: dict[str, Any] = {"layout": layout, "tied": _tied(model)}
    for name, (weights, routed, unit) in _weights(model, axes, rows).items():
        cost = params_cost(axes, shapes, name=name, weights=weights, routed=routed, **given)
        costs_of = {tensor: size * weights[tensor] for tensor, size in elements.items()}
        parts = rest(costs=costs_of, constant=cost.constant)
        costs[name] = replace(cost, parts=parts, unit=unit)
    return costs | {"kv_cache": cache_cost(axes, trace.cached, layout=layout)}


def _weights(
    model: nn.Module, axes: Sequence[Axis], rows: Mapping[str, float]
) -> dict[str, tuple[dict[str, float], frozenset[str], str]]:
    """What an element of each parameter counts, per cost; those that are routed; and the unit."""
    parameters = dict(model.named_parameters())
    sizes = {name: float(parameter.element_size()) for name, parameter in parameters.items()}
    dims = {name: parameter.dim() for name, parameter in parameters.items()}
    for stack, (first, *_) in stacks_in(parameters, axes).items():
        sizes[stack], dims[stack] = sizes[first], dims[first] + 1
    ones = dict.fromkeys(sizes, 1.0)
    whole: frozenset[str] = frozenset()
    found = {"params": (ones, whole, "parameters"), "memory": (sizes, whole, "bytes")}
    shares = _shares_of_experts(axes, dims, rows)
    if shares:
        unit = "parameters that a token runs through"
        found["active_params"] = ({**ones, **shares}, frozenset(shares), unit)
    return found


def _shares_of_experts(
    axes: Sequence[Axis], dims: Mapping[str, int], rows: Mapping[str, float]
) -> dict[str, float]:
    """Which share of the experts a token runs through, per parameter of chosen experts.

    One with a number for each expert, such as a bias of the router, is none of theirs.
    """
    shares: dict[str, float] = {}
    for experts in axes:
        if experts.is_chosen:
            own = {s.tensor for s in experts.slices if s.role != "makes" and dims.get(s.tensor)}
            own = {tensor for tensor in own if dims[tensor] > 1}
            inside = (axis for axis in axes if axis.parent == experts.name)
            own |= {s.tensor for axis in inside for s in axis.slices if s.tensor in dims}
            tokens = max((rows.get(s.tensor, 0.0) for s in experts.makers), default=0.0)
            runs = max((rows.get(tensor, 0.0) for tensor in own), default=0.0)
            if runs and tokens:
                shares |= dict.fromkeys(own, min(runs / tokens, 1.0))
    return shares


def _flops_unit(inputs: Mapping[str, Any]) -> str:
    """FLOPs of what: of a sequence of so many tokens, or of one input."""
    tokens = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    if tokens is None:
        return "FLOPs of one input"
    return f"FLOPs of one sequence of {tokens.shape[1]} tokens"


def count_params(
    model: nn.Module, axes: Sequence[Axis], kept: Mapping[str, int], *, layout: str
) -> int:
    """Parameters of `model` once each axis is cut to so many units, from shapes alone.

    Args:
        model: The model before the cut.
        axes: All its axes.
        kept: Number of kept units per axis name.
        layout: ``"stock"`` or ``"per_layer"``; see `params_cost`.
    """
    named = _with_counted_names(model, axes)
    shapes = with_stacks({name: tuple(p.shape) for name, p in model.named_parameters()}, named)
    return round(params_cost(named, shapes, layout=layout, tied=_tied(model)).of(kept))


def _tied(model: nn.Module) -> list[str]:
    """The one name of every parameter that several modules have."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return [name for name, parameter in model.named_parameters() if owners[id(parameter)] > 1]


def _with_counted_names(model: nn.Module, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Axes whose slices call a shared parameter by the one name that it is counted under."""
    first = {id(p): name for name, p in model.named_parameters()}
    names = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    return tuple(
        replace(
            axis,
            slices=tuple(
                dict.fromkeys(replace(s, tensor=names.get(s.tensor, s.tensor)) for s in axis.slices)
            ),
        )
        for axis in axes
    )


def _macs_per_head(axis: Axis, trace: Trace) -> float:
    """MACs of queries x keys and of weights x values, per head, summed over calls."""
    if axis.removal is None:
        return 0.0
    macs = sum(
        event.macs
        for event in trace.events
        if event.parameter is None
        and event.module == axis.removal.module
        and heads_of(event) == axis.size
    )
    return macs / axis.size


def _flops_in(path: str, trace: Trace) -> float:
    """FLOPs of all products that a module and those in it run."""
    return 2.0 * sum(e.macs for e in trace.events if f"{e.module}.".startswith(f"{path}."))


def counted(
    model: nn.Module,
    structure: Structure,
    sample: Mapping[str, Any],
    *,
    space: StockSpace = StockSpace(()),  # noqa: B008 - frozen
    layout: str = "per_layer",
    reason: str = "",
) -> Prunable:
    """A structure with its costs in one layout, and those of the whole model.

    Args:
        model: The model, in eval mode or not; it is left as it was.
        structure: Its proved axes.
        sample: As the inputs of `count_costs`.
        space: What the stock class can express.
        layout: ``"stock"`` or ``"per_layer"``.
        reason: Why this layout, as a sentence.
    """
    found = count_costs(model, structure, sample, layout=layout)
    sizes = {axis.name: axis.size for axis in structure.axes}
    totals = {name: cost.of(sizes) for name, cost in found.items()}
    absent = {name: why for name, why in _ABSENT.items() if not totals.get(name)}
    absent |= {
        name: f"is {totals[name]:.6g} {cost.unit} whatever is pruned"
        for name, cost in found.items()
        if name in _ABSENT and name not in absent and cost.is_constant
    }
    costs = {name: cost for name, cost in found.items() if name not in absent}
    totals = {name: totals[name] for name in costs}
    return Prunable(structure, costs, totals, layout, reason, space, sample, absent)


_ABSENT = {
    "kv_cache": "is 0: this model keeps no keys and values of the tokens before",
    "active_params": "is no cost of its own: no experts of this model of which a token runs "
    "through a few can be pruned, so that all parameters count (params)",
    "latency_ms": "needs a table that is measured on the machine; make one with measure_latency, "
    "or give one to use_latency (--latency-table)",
}
"""Why a model has no such cost."""


# --- what holds the cost that no plan can change, in words ----------------------------------------


EMBEDDINGS, HEAD, SHARED = "embeddings", "the model's head", "embeddings (tied to the LM head)"
REFUSED, NORMS, OTHER = "refused modules", "norms and biases", "other modules"
_ONE_DIMENSION = 1


def parts_of_rest(
    model: nn.Module,
    axes: Iterable[Axis],
    refusals: Sequence[Refusal],
    *,
    costs: Mapping[str, float],
    constant: float,
) -> dict[str, float]:
    """Cost of the parameters that no axis cuts, by what they are; largest first.

    Args:
        model: The model.
        axes: Its axes, with parameters by the names that they are counted under.
        refusals: What was seen but cannot be pruned.
        costs: Cost of every parameter, by name.
        constant: What no plan can change; what no parameter accounts for is `OTHER`.
    """
    axes = tuple(axes)
    cut = real_names(dict(model.named_parameters()), axes)
    removed = tuple(f"{axis.removal.module}." for axis in axes if axis.removal is not None)
    kinds = _kinds(model)
    parts: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if name in cut or name.startswith(removed):
            continue
        kind = kinds.get(name) or _kind_of(name, parameter.dim(), refusals)
        parts[kind] = parts.get(kind, 0.0) + costs[name]
        if kind == OTHER:
            others[name.rpartition(".")[0]] = costs[name]
    parts[OTHER] = parts.get(OTHER, 0.0) + constant - sum(parts.values())
    if others:
        parts[f"{OTHER} such as {max(others, key=others.__getitem__)}"] = parts.pop(OTHER)
    found = {kind: cost for kind, cost in parts.items() if cost > 0}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _kinds(model: nn.Module) -> dict[str, str]:
    """Kind of the parameters of embeddings and of the head, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds: dict[str, str] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            kinds[names[id(module.weight)]] = EMBEDDINGS
    if not isinstance(model, PreTrainedModel):
        return kinds
    base = {id(parameter) for parameter in model.base_model.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in base:
            kinds[names[id(parameter)]] = HEAD
    output = model.get_output_embeddings()
    for parameter in () if output is None else output.parameters():
        is_shared = kinds.get(names[id(parameter)]) == EMBEDDINGS
        kinds[names[id(parameter)]] = SHARED if is_shared else HEAD
    return kinds


def _kind_of(name: str, dims: int, refusals: Iterable[Refusal]) -> str:
    if any(name.startswith(f"{refusal.module}.") for refusal in refusals if refusal.module):
        return REFUSED
    return NORMS if dims <= _ONE_DIMENSION else OTHER
