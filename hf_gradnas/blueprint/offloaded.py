"""Finds what can be pruned in a model whose weights are not all in memory.

The first layers of every stack are built as a model of their own, with their own weights, and
examined as any model is; what holds of them is said of all layers. Costs are counted by shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..batches.batch import to_device
from ..batches.longest import flops_inputs
from ..checkpoint.prunable import find_prunables
from ..checkpoint.savable import check_savable
from ..config.limits import Rules, rule_for
from ..costs.counting import counted
from ..errors import DataError, StructureError
from ..running.offloading import Weights
from ..stock.layouts import layout_for
from ..stock.trials import silence
from ..types import Prunable
from .layers import SpansLayersError, Stack, build_unloaded, said_of_all, shortened


def find_offloaded(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    layout: str = "auto",
    rules: Rules | None = None,
    flops_length: int | None = None,
    layers: bool = False,
    every: bool = False,
) -> list[Prunable]:
    """As `find_prunables`, for a model that Accelerate offloads; it is left as it was.

    In memory is a model of the first layers of every stack, with all that is outside of stacks; of
    classes whose layers cannot be told apart, all of it.

    Args:
        model: Its weights are loaded from where they are kept, each once.
        batch: Keyword arguments of its forward.
        layout: As of `find_prunables`, and so are the others.
        rules: The rules.
        flops_length: Tokens that FLOPs are counted for.
        layers: Whether whole layers may go.
        every: Whether other layouts come after it.

    Raises:
        DataError: The model cannot run the batch.
        PlanError: The class can express nothing.
        StructureError: Nothing can be pruned, or costs cannot be counted without weights.
    """
    rules = rules or {}
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # of the weights, whatever the config says
    whole = build_unloaded(type(model), config)
    sample = flops_inputs(batch, flops_length, decoder=bool(model.config.is_encoder_decoder))
    given: dict[str, Any] = {"rules": rules, "layers": layers, "every": every}
    given["flops_length"] = flops_length

    def found(config: PreTrainedConfig, stacks: Sequence[Stack]) -> list[Prunable]:
        short = _with_weights_of(model, config)
        inputs = to_device(batch, short)
        check_savable(short, inputs)
        parts = find_prunables(short, inputs, layout=layout, **given)
        asked = [layout, *(part.layout for part in parts[1:])]
        return [
            _of_all_layers(part, whole, stacks, sample, rules, requested)
            for part, requested in zip(parts, asked, strict=True)
        ]

    try:
        return found(*shortened(whole))
    except SpansLayersError:
        return found(whole.config, ())


def _with_weights_of(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the CPU, with tensors of another one by their names."""
    with silence(), no_init_weights():
        short: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    short.tie_weights()
    weights, buffers = Weights(model), dict(model.named_buffers())
    for name, parameter in short.named_parameters():
        parameter.data = weights[name].cpu()
    for name, buffer in list(short.named_buffers()):
        if name in buffers:
            path, _, leaf = name.rpartition(".")
            has = weights.kept(name) if buffers[name].is_meta else buffers[name]
            own = cast(Any, short.get_submodule(path)._buffers)
            own[leaf] = buffer if has is None else has.detach().cpu()
    return short.eval()


def _of_all_layers(
    found: Prunable,
    whole: PreTrainedModel,
    stacks: Sequence[Stack],
    sample: Mapping[str, Any],
    rules: Rules,
    requested: str,
) -> Prunable:
    """What was found in the first layers, said of all, with the costs of all."""
    structure, space = said_of_all(found.structure, found.space, stacks)
    allowed = [axis for axis in structure.axes if rule_for(axis, rules) is not None]
    layout, reason = layout_for(space, allowed, requested=requested)
    inputs = {n: v.cpu() if hasattr(v, "cpu") else v for n, v in sample.items()}
    try:
        made = counted(whole, structure, inputs, space=space, layout=layout, reason=reason)
    except DataError as error:
        raise StructureError(
            f"{type(whole).__name__}: its forward depends on values, so that its cost cannot be "
            f"counted while weights are offloaded ({error}); load the model whole."
        ) from error
    return replace(made, sample=sample)
