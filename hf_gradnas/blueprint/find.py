"""Finds everything that a plan is made from, from a config alone.

Three models of one class take part: the whole one, unloaded; a short one, unloaded, with the first
layers of every stack; and a small one with random weights, the short one with fewer units, which is
examined as any model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..batches.batch import to_device
from ..batches.longest import flops_inputs
from ..checkpoint.prunable import rehearsed
from ..config.limits import Rules, rule_for
from ..costs.counting import counted
from ..errors import DataError, StructureError
from ..stock.layouts import layout_for
from ..stock.space import find_stock_space
from ..stock.trials import silence
from ..types import Prunable, StockSpace, Structure
from ..verification import find_structure
from .carrying import carried
from .layers import (
    NeedsWeightsError,
    SpansLayersError,
    build_unloaded,
    said_of_all,
    shortened,
)
from .shrinking import shrunk

BatchOf = Callable[[PreTrainedConfig, PreTrainedModel], Mapping[str, Any]]


@dataclass(frozen=True)
class Blueprint:
    """A model without weights, and what can be pruned in it.

    Attributes:
        model: On the meta device.
        prunable: Its axes, layout and costs. What is not among axes, slices and costs may be that
            of a smaller model: plans can be made, but no weights can be cut by it.
    """

    model: PreTrainedModel
    prunable: Prunable


def find_blueprint(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    batch_of: BatchOf,
    *,
    layout: str = "auto",
    rules: Rules | None = None,
    flops_length: int | None = None,
    layers: bool = False,
) -> Blueprint:
    """Find the axes of a model that nobody loads, decide its layout, and count its costs.

    Equal to `find_prunable` of a model of this config, in seconds whatever its size.

    Args:
        cls: Class of the model.
        config: Its config.
        batch_of: Gives a batch for a model and its config, on the CPU.
        layout: ``"auto"``, ``"stock"`` or ``"per_layer"``.
        rules: What must stay; globs that match nothing do nothing.
        flops_length: Tokens of the one sequence that FLOPs are counted for; None: the batch's.
        layers: Whether whole layers may go, too.

    Raises:
        DataError: The model cannot run the batch.
        PlanError: Layout ``"stock"`` was asked for, and the class can express nothing.
        NeedsWeightsError: The model can only be examined with its weights.
        StructureError: Nothing can be pruned.
    """
    rules = rules or {}
    whole = build_unloaded(cls, config)
    examined = partial(_examined, layout=layout, rules=rules, layers=layers)
    try:
        structure, space = _by_few_layers(whole, examined, batch_of)
    except SpansLayersError:
        structure = _found(whole, examined, batch_of)
        space = find_stock_space(whole, structure)
    allowed = [axis for axis in structure.axes if rule_for(axis, rules) is not None]
    chosen, reason = layout_for(space, allowed, requested=layout)
    batch = batch_of(whole.config, whole)
    sample = flops_inputs(batch, flops_length, decoder=bool(config.is_encoder_decoder))
    return Blueprint(whole, _counted(whole, structure, sample, (space, chosen, reason)))


def _by_few_layers(
    whole: PreTrainedModel, examined: Callable[..., Structure], batch_of: BatchOf
) -> tuple[Structure, StockSpace]:
    """Structure and stock space, found in the first layers of every stack.

    Raises:
        SpansLayersError: Units of an axis are in several layers of a stack.
        StructureError: As of `find_blueprint`.
    """
    config, stacks = shortened(whole)
    short = build_unloaded(type(whole), config)
    structure = _found(short, examined, batch_of)
    return said_of_all(structure, find_stock_space(short, structure), stacks)


def _counted(
    model: PreTrainedModel,
    structure: Structure,
    sample: Mapping[str, Any],
    decision: tuple[StockSpace, str, str],
) -> Prunable:
    """The structure of an unloaded model with its costs."""
    space, layout, reason = decision
    try:
        return counted(model, structure, sample, space=space, layout=layout, reason=reason)
    except DataError as error:
        raise NeedsWeightsError(
            f"{type(model).__name__}: its forward depends on values, so that its cost cannot be "
            f"counted without weights ({error}); omit --no-weights, so that they are loaded."
        ) from error


def _found(
    short: PreTrainedModel, examined: Callable[..., Structure], batch_of: BatchOf
) -> Structure:
    """The structure of the short model, found in the smallest that can be examined."""
    first: Exception | None = None
    for config in shrunk(short):
        try:
            small = _built(type(short), config)
            structure = examined(small, batch_of(small.config, small))
            return carried(structure, small, short)
        except (DataError, StructureError) as error:
            first = first or error
    assert first is not None
    raise first


def _built(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, as `from_pretrained` would build one that is complete."""
    with silence(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = cls._from_config(config, dtype=config.dtype)
    return model.eval()


def _examined(
    model: PreTrainedModel, batch: Mapping[str, Any], *, layout: str, rules: Rules, layers: bool
) -> Structure:
    """Axes that are proved, and that a cut model is built again with."""
    batch = to_device(batch, model)

    def decide(structure: Structure) -> tuple[StockSpace, str, str]:
        space = find_stock_space(model, structure)
        allowed = [axis for axis in structure.axes if rule_for(axis, rules) is not None]
        return space, *layout_for(space, allowed, requested=layout)

    return rehearsed(model, find_structure(model, batch, layers=layers), batch, decide)[0]
