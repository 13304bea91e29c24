"""From a model to a search space, from the space to the cut model, and what a file says of both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.apply import apply_plan, cut_with_proof
from ..checkpoint.savable import check_savable
from ..errors import CheckpointError, PlanError, StructureError
from ..stock.rewrite import write_stock
from ..stock.space import find_stock_space
from ..surgery.cut import merge_records
from ..surgery.modeling_gradnas import resize
from ..types import Plan, Structure
from .config import GradNASConfig
from .hparams import check_kernels, close_space, needed_space, open_space

RECORD = "gradnas_record"
"""Attribute of a cut module that is no Transformers model: its record of new shapes."""


def convert_model(model: nn.Module, config: GradNASConfig) -> tuple[nn.Module, dict[str, Any]]:
    """Make a model a search space; no module or weight of it changes.

    Raises:
        CheckpointError: The config or generation config of a Transformers model cannot be saved.
        PlanError: The config asks for another kernel size than a convolution has.
        StructureError: The model has no parameters, or could not be saved and loaded as it is.
    """
    if next(model.parameters(), None) is None:
        raise StructureError(
            f"{type(model).__name__}: has no parameters, so there is nothing to prune; pass the "
            "model itself."
        )
    check_savable(model)
    check_kernels(model, config)
    open_space(model, config)
    return model, {}


def export_model(model: nn.Module) -> nn.Module:
    """Cut a searched model in place to its active choices.

    Raises:
        CutError: The cut model does not do what the masked one did.
        OrderError: The model was not searched.
    """
    space = needed_space(model)
    kept, structure = space.kept(), space.needed_structure()
    if isinstance(model, PreTrainedModel):
        _export_pretrained(model, structure, kept, space.probe)
    else:
        calls = [] if space.probe is None else [((), space.probe)]
        record = cut_with_proof(model, structure.axes, kept, calls=calls)
        earlier = vars(model).get(RECORD)
        setattr(model, RECORD, record if earlier is None else merge_records(earlier, record))
    space.is_exported = True
    return model


def _export_pretrained(
    model: PreTrainedModel,
    structure: Structure,
    kept: Mapping[str, tuple[int, ...]],
    probe: Mapping[str, Any] | None,
) -> None:
    """Cut, as stock where the class's config can say the widths, else per layer."""
    stock = find_stock_space(model, structure)
    sizes = {axis.name: axis.size for axis in structure.axes}
    plan = Plan(kept, sizes, "stock", search="binary", score="gradnas")
    try:
        write_stock(copy.deepcopy(model.config), plan, structure, stock)
    except PlanError:
        plan = Plan(kept, sizes, "per_layer", search="binary", score="gradnas")
    apply_plan(model, plan, structure, stock, sample=probe)


def note_state(model: nn.Module, config: GradNASConfig, metadata: dict[str, Any]) -> None:
    """Bring metadata up to date: a Transformers model's config, another's record of shapes."""
    metadata["architecture"] = type(model).__name__
    if isinstance(model, PreTrainedModel):
        metadata["model_config"] = model.config.to_dict()
    else:
        metadata["record"] = record_of(model)


def record_of(model: nn.Module) -> Mapping[str, Any] | None:
    """Record of the new shapes of a cut model; None where it has none of its own."""
    if isinstance(model, PreTrainedModel):
        found: Mapping[str, Any] | None = vars(model.config).get("gradnas")
        return found
    return vars(model).get(RECORD)


def restore_model(
    model: nn.Module, config: GradNASConfig, metadata: Mapping[str, Any]
) -> nn.Module:
    """Bring a fresh model to the state that `note_state` noted; weights are not loaded.

    Raises:
        CheckpointError: The model is of another class.
    """
    name = type(model).__name__
    if metadata.get("architecture", name) != name:
        raise CheckpointError(
            f"restore: the file is of a {metadata['architecture']}, the model is a {name}; build "
            "the model that was saved, unpruned."
        )
    if isinstance(model, PreTrainedModel):
        return _restore_pretrained(model, metadata)
    record = metadata.get("record")
    if record is not None:
        resize(model, record)
        setattr(model, RECORD, record)
        close_space(model)
    else:
        open_space(model, config)
    return model


def _restore_pretrained(model: PreTrainedModel, metadata: Mapping[str, Any]) -> nn.Module:
    """Give `model` the modules of one that its class builds from the noted config."""
    first = next(model.parameters())
    config = type(model.config).from_dict(metadata["model_config"])
    kernel = model.config._attn_implementation
    fresh = type(model)._from_config(config, attn_implementation=kernel)
    fresh.to(device=first.device, dtype=first.dtype).train(model.training)
    if "generation_config" in vars(model):
        fresh.generation_config = model.generation_config
    close_space(model)
    model.__class__ = type(fresh)
    vars(model).clear()
    vars(model).update(vars(fresh))
    return model
