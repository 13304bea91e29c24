"""One type through the whole loop: discover, score, plan, mask, cut, save, reload.

Every step is compared with the one before it; what was pruned and refused is a `Row`. The rows of
all types are the table of docs/architectures.md.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_inputs
import torch
import transformers
from tiny_configs import built, class_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_gradnas import GradNASError, GradNASPruner
from hf_gradnas.errors import StructureError
from hf_gradnas.search.solver import lowest_costs
from hf_gradnas.stock.trials import silence
from hf_gradnas.surgery.lists import real_names
from hf_gradnas.types import KINDS, Axis, Budget, Kind, Plan, Structure

CUT, RELOADED, EXACT = 1e-4, 1e-5, 1e-6
"""Largest relative differences of masked and cut, cut and reloaded, and both in float64."""
SHARES = (0.4, 0.2, 0.05)
"""Parts of what can go at all that a plan takes away; the first that can be reached."""
MOST_PARAMETERS = 60_000_000
_SAID = 130
_REASONS = 3


@dataclass(frozen=True)
class Row:
    """What became of one type.

    Attributes:
        name: The type.
        cls: Class that was built.
        pruned: Kinds of its axes, in words.
        refused: Reasons by kind, the most frequent first.
        layout: Of the saved model; "" if nothing was saved.
        loads: How it loads.
        wrong: What failed, and where; "" if all steps agree.
    """

    name: str
    cls: str = ""
    pruned: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    layout: str = ""
    loads: str = ""
    wrong: str = ""


class LoopError(Exception):
    """Two steps disagree."""


def examine(name: str, folder: Path) -> Row:
    """The row of a type; whatever a step raises is in it.

    Args:
        name: The type.
        folder: An empty folder, which is left as large as the model.
    """
    row, step = Row(name), "build"
    try:
        with silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step, row in _steps(name, folder):  # noqa: B007 - the last that was reached
                pass
    except StructureError as error:
        if step != "discover":
            return replace(row, wrong=_short(f"{step}: {error}"))
        said = str(error).partition(": ")[2]
        return replace(row, refused=(_short(f"all: {said.partition('with proof (')[2] or said}"),))
    except TimeoutError:
        return replace(row, wrong=f"{step}: takes too long")
    except Exception as error:
        said = " ".join(str(error).split())
        kind = "" if isinstance(error, LoopError) else f"{type(error).__name__}: "
        return replace(row, wrong=_short(f"{step}: {kind}{said}"))
    return row


def _steps(name: str, folder: Path) -> Iterator[tuple[str, Row]]:
    """Runs one step after the other; yields the name of the next, and what is known so far."""
    row = Row(name, class_of(name)[0])
    yield "build", row
    model, batches = build(name)
    whole = outputs(model, batches)
    is_noisy = not _agree(outputs(model, batches), whole, whole, 0)
    yield "discover", row
    pruner = GradNASPruner(model)
    structure = pruner.discover(batches[0])
    row = replace(row, pruned=_pruned(structure), refused=_refused(structure))
    _check_seen(model, structure)
    yield "score", row
    plan = _random_plan(structure) if _is_drawn(name, pruner) else _scored_plan(pruner, name)
    plan = replace(plan, costs={n: cost.of(plan.counts()) for n, cost in pruner.costs.items()})
    yield "mask", row
    with pruner.masked(plan):
        masked = outputs(model, batches)
    _check(is_noisy or _agree(outputs(model, batches), whole, whole, 0), "a mask leaves a trace")
    yield "cut", row
    pruner.apply(plan)
    number = sum(parameter.numel() for parameter in model.parameters())
    _check(plan.costs["params"] == number, f"{plan.costs['params']} parameters said, {number} are")
    cut = outputs(model, batches)
    if not (is_noisy or _agree(cut, masked, whole, CUT)):
        _check(_agrees_exactly(name, plan, pruner.layout), "cut differs from masked")
    yield "save", row
    pruner.save_pretrained(folder / "model", report=False)
    auto = _auto_class(getattr(transformers, row.cls))
    row = replace(row, layout=plan.layout, loads=_ways(plan.layout))
    yield "reload", row
    again = getattr(transformers, auto or row.cls).from_pretrained(
        folder / "model", **_kernel(model)
    )
    _check(is_noisy or _agree(outputs(again, batches), cut, whole, RELOADED), "reloaded differs")
    yield "", row


def _check(holds: bool, said: str) -> None:
    if not holds:
        raise LoopError(said)


# --- the model ------------------------------------------------------------------------------------


def build(name: str, *, seed: int = 0) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """A tiny model of a type in eval mode, and two batches for it."""
    cls, config = built(name)
    torch.manual_seed(seed)
    try:
        model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32)
    except (ValueError, TypeError, AttributeError):  # has no such kernel
        model = cls._from_config(config, dtype=torch.float32)
    number = sum(parameter.numel() for parameter in model.parameters())
    if number > MOST_PARAMETERS:
        raise LoopError(f"{number} parameters are too many; shrink its config in overrides.py")
    model = model.float().eval()
    _draw_constants(model, seed)
    task = class_of(name)[1]
    return model, [tiny_inputs.of_model(model, name, task, draw) for draw in (seed, 23)]


@torch.no_grad()
def _draw_constants(model: nn.Module, seed: int) -> None:
    """Give biases, norms and all that is constant at first values of their own."""
    generator = torch.Generator().manual_seed(seed + 7)
    for parameter in model.parameters():
        if not (parameter.is_floating_point() and parameter.numel()):
            continue
        drawn = torch.randn(parameter.shape, generator=generator) * 0.05
        if not torch.isfinite(parameter).all():
            parameter.copy_(drawn)
        elif parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(drawn)


def outputs(model: nn.Module, batches: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Every floating-point output for every batch, without caches and attention weights."""
    torch.manual_seed(0)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found = []
    for batch in batches:
        given = {
            key: value.to(dtype) if _is_float(value) else value for key, value in batch.items()
        }
        with torch.no_grad():
            found.append({path: v.clone() for path, v in _leaves(model(**given))})
    return found


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if _is_float(value):
        yield path, value
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, part in items:
        if not re.search(r"past_key_values|cache|attentions", str(key)):
            yield from _leaves(part, f"{path}.{key}")


Outputs = list[dict[str, Tensor]]


def _agree(found: Outputs, wanted: Outputs, whole: Outputs, limit: float) -> bool:
    """Whether outputs differ by at most `limit` of the largest value of the whole model's."""
    for one, other, scale in zip(found, wanted, whole, strict=True):
        if one.keys() != other.keys():
            return False
        for path, value in one.items():
            same = other[path]
            if value.shape != same.shape:
                return False
            finite = scale[path][scale[path].isfinite()].double().abs()
            largest = max(float(finite.max()) if finite.numel() else 1.0, 1e-30)
            apart = (value.double() - same.double()).abs()
            apart = apart.masked_fill((value == same) | (value.isnan() & same.isnan()), 0.0)
            if apart.numel() and not float(apart.max()) / largest <= limit:
                return False
    return True


def _agrees_exactly(name: str, plan: Plan, layout: str) -> bool:
    """Whether masked and cut agree in float64: else a choice of a router flips by rounding."""
    model, batches = build(name)
    model = model.double()
    pruner = GradNASPruner(model, layout=layout)
    pruner.discover(batches[0])
    whole = outputs(model, batches)
    with pruner.masked(plan):
        masked = outputs(model, batches)
    pruner.apply(plan)
    return _agree(outputs(model, batches), masked, whole, EXACT)


def _kernel(model: PreTrainedModel) -> Mapping[str, Any]:
    is_eager = model.config._attn_implementation == "eager"
    return {"attn_implementation": "eager"} if is_eager else {}


# --- plans ----------------------------------------------------------------------------------------


def _scored_plan(pruner: GradNASPruner, name: str) -> Plan:
    """By gradients, with the model's own labels if the batch has none, else by magnitude."""
    task = class_of(name)[1]
    batches = [tiny_inputs.of_model(pruner.model, name, task, seed) for seed in (1, 2)]
    for method, labels in (("fisher", "data"), ("fisher", "model"), ("magnitude", "data")):
        try:
            pruner.score_method = method
            scores = pruner.score(batches, labels=labels)
            break
        except GradNASError:
            if method == "magnitude":
                raise
    _check(all(np.isfinite(v).all() for v in scores.values.values()), "scores are not finite")
    total = pruner.totals["params"]
    lowest = lowest_costs(pruner.prunable, budgets=[Budget("params", 0.0, 1.0)])["params"]
    for share in SHARES:
        try:
            return pruner.plan({"params": total - share * (total - lowest)})
        except GradNASError:
            if share == SHARES[-1]:
                raise
    raise LoopError("no plan")


def _is_drawn(name: str, pruner: GradNASPruner) -> bool:
    """Whether a type gets a random plan: one in three of those whose layers may differ."""
    return pruner.layout == "per_layer" and zlib.crc32(name.encode()) % 3 == 0


def _random_plan(structure: Structure) -> Plan:
    """Other numbers of other units in every axis; every seventh loses all that it may."""
    draw = np.random.default_rng(5)
    sizes = {axis.name: axis.size for axis in structure.axes}
    inner = {axis.parent: axis for axis in structure.axes if axis.parent}
    kept: dict[str, tuple[int, ...]] = {}
    for number, axis in enumerate(structure.axes):
        if axis.parent is not None:
            continue
        held = [axis, *([inner[axis.name]] if axis.name in inner else [])]
        goes = number % 7 == 3 and not any(a.minimum for a in held) and not _is_single(axis)
        kept[axis.name] = () if goes else _draw(draw, axis)
        for nested in held[1:]:
            each = nested.size // axis.size
            few = draw.integers(max(1, each // 2), each + 1)
            few -= few % nested.multiple if few > nested.multiple else 0
            kept[nested.name] = tuple(
                unit * each + int(place)
                for unit in kept[axis.name]
                for place in sorted(draw.permutation(each)[:few])
            )
    return Plan(kept, sizes, "per_layer")


def _is_single(axis: Axis) -> bool:
    return axis.kind is Kind.CHANNELS


def _draw(draw: np.random.Generator, axis: Axis) -> tuple[int, ...]:
    """Half of the units to four fifths, the same number in every block."""
    length = axis.size // axis.blocks
    few = max(1, -(-axis.minimum // axis.blocks), round(length * draw.uniform(0.45, 0.8)))
    starts = range(0, axis.size, length)
    return tuple(int(s + u) for s in starts for u in sorted(draw.permutation(length)[:few]))


# --- words ----------------------------------------------------------------------------------------


def _check_seen(model: nn.Module, structure: Structure) -> None:
    """Every parameter is in an axis, in a refused module, or has a reason."""
    held = real_names(dict(model.named_parameters()), structure.axes)
    refused = tuple(f"{refusal.module}." for refusal in structure.refusals if refusal.module)
    unseen = [
        name
        for name, _ in model.named_parameters()
        if name not in held.keys() | structure.unpruned.keys() and not name.startswith(refused)
    ]
    _check(not unseen, f"not seen: {', '.join(unseen[:2])}")


def _pruned(structure: Structure) -> tuple[str, ...]:
    """Kinds of axes, those of experts' neurons named so."""
    kinds = {axis.name: axis.kind for axis in structure.axes}
    found = []
    for axis in structure.axes:
        inside = axis.parent is not None and kinds[axis.parent] is Kind.EXPERTS
        found.append(f"{KINDS[axis.kind].plural}{' in experts' if inside else ''}")
    return tuple(sorted(dict.fromkeys(found)))


def _refused(structure: Structure) -> tuple[str, ...]:
    """The most frequent reasons, each with its kind, without numbers that a machine decides."""
    count: dict[str, int] = {}
    for refusal in structure.refusals:
        said = _short(f"{KINDS[Kind(refusal.kind)].plural}: {refusal.reason}")
        count[said] = count.get(said, 0) + 1
    return tuple(sorted(count, key=lambda said: -count[said]))[:_REASONS]


def _short(said: str) -> str:
    said = re.sub(r"\d\.\d+e[-+]\d+", "…", re.sub(r"(?<=\.)\d+(?=[.\s])", "*", said))
    return said if len(said) <= _SAID else said[: _SAID - 1].rstrip() + "…"


def _auto_class(cls: type[PreTrainedModel]) -> str:
    """An auto class that builds a class; "" if there is none."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and cls.config_class in mapping:
            classes = mapping[cls.config_class]
            if cls in (classes if isinstance(classes, list | tuple) else [classes]):
                found.append(name)
    return min(found, key=lambda name: (name == "AutoModel", name), default="")


def _ways(layout: str) -> str:
    return "plain Transformers" if layout == "stock" else "hf_gradnas, remote code"
