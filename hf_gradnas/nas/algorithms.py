"""The calls of the reference, convert, search and prune, and the mode ``gradnas`` that they run.

From a model to a search space, from the space to the cut model, and what a file says of both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.apply import apply_plan, cut_with_proof
from ..checkpoint.savable import check_savable
from ..errors import CheckpointError, PlanError, StructureError
from ..stock.rewrite import write_stock
from ..stock.space import find_stock_space
from ..surgery.modeling_gradnas import resize
from ..surgery.records import merge_records
from ..types import Plan, Structure
from .arguments import unwrap
from .config import GradNASConfig
from .hparams import check_kernels, close_space, needed_space, open_space
from .searcher import GradientBinarySearcher

Convert = Callable[[nn.Module, GradNASConfig], tuple[nn.Module, dict[str, Any]]]
Restore = Callable[[nn.Module, GradNASConfig, Mapping[str, Any]], nn.Module]
Update = Callable[[nn.Module, GradNASConfig, dict[str, Any]], None]


class GradNASModeDescriptor:
    """What the mode ``gradnas`` consists of. Instances are alike and hold nothing."""

    @property
    def name(self) -> str:
        """Name of the mode."""
        return "gradnas"

    @property
    def config_class(self) -> type[GradNASConfig]:
        """Class of the mode's config."""
        return GradNASConfig

    @property
    def search_algorithm(self) -> type[GradientBinarySearcher]:
        """Class of the search."""
        return GradientBinarySearcher

    @property
    def next_modes(self) -> set[str]:
        """Modes that may follow; `search` exports by itself."""
        return {"export"}

    @property
    def export_mode(self) -> str:
        """Mode in which a searched model leaves this one."""
        return "export"

    @property
    def convert(self) -> Convert:
        """Function that makes a model a search space: ``(model, config) -> (model, metadata)``."""
        return _convert_model

    @property
    def restore(self) -> Restore:
        """Inverse of `convert` on a fresh model: ``(model, config, metadata) -> model``."""
        return _restore_model

    @property
    def update_for_save(self) -> Update:
        """Function that brings metadata up to date: ``(model, config, metadata) -> None``."""
        return _note_state


# --- from a model to a space, and to the cut model ------------------------------------------------


RECORD = "gradnas_record"
"""Attribute of a cut module that is no Transformers model: its record of new shapes."""


def _convert_model(model: nn.Module, config: GradNASConfig) -> tuple[nn.Module, dict[str, Any]]:
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


def _export_model(model: nn.Module) -> nn.Module:
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


def _note_state(model: nn.Module, config: GradNASConfig, metadata: dict[str, Any]) -> None:
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


def _restore_model(
    model: nn.Module, config: GradNASConfig, metadata: Mapping[str, Any]
) -> nn.Module:
    """Bring a fresh model to the state that `_note_state` noted; weights are not loaded.

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


# --- the calls of the reference -------------------------------------------------------------------


Mode = str | GradNASModeDescriptor
ModeLike = Mode | tuple[Mode, Any] | Sequence[Any] | Mapping[str, Any]

MODES = {mode.name: mode for mode in (GradNASModeDescriptor(),)}


def convert(model: nn.Module, mode: ModeLike) -> nn.Module:
    """Make a model a search space for `search`, in place; weights and forward stay as they are.

    Args:
        model: A Transformers model or any other module, or its distributed wrapper.
        mode: ``"gradnas"``, ``[("gradnas", config)]``, ``{"gradnas": config}`` or a descriptor;
            `config` is a `GradNASConfig`, a dict for one, or None for the defaults. A descriptor of
            a subclass brings its own `search_algorithm`.

    Raises:
        CheckpointError: The config or generation config of a Transformers model cannot be saved.
        PlanError: The mode is unknown, more than one is given, or its config cannot be read or
            asks for another kernel size than a convolution has; the message has the field's path.
        StructureError: The model has no parameters, or could not be saved and loaded as it is.
    """
    descriptor, config = _read_mode(mode)
    inner = unwrap(model)
    descriptor.convert(inner, config)
    needed_space(inner).algorithm = descriptor.search_algorithm
    return model


def search(
    model: nn.Module,
    constraints: Mapping[str, Any],
    dummy_input: Any,
    config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Find the best sizes within constraints, and cut the model to them in place.

    Args:
        model: A converted model.
        constraints: Upper limits by cost, such as ``{"flops": "60%"}`` or ``{"params": 5e6}``;
            several hold at once. FLOPs are 2 x multiply-accumulates of matmuls and convolutions.
        dummy_input: Arguments of the forward that FLOPs are counted for, at its batch size: a
            tensor, a tuple, or a tuple that ends in a dict of keywords.
        config: Settings of the search, ``data_loader`` and ``loss_func`` among them; see
            `GradientBinarySearcher.default_search_config`.

    Returns:
        The same model, cut, and the history: ``history["best"]`` has ``config``, ``constraints``
        and ``score``. A Transformers model then saves with ``save_pretrained``, any with `save`.

    Raises:
        BudgetError: A constraint cannot be read or met; raised before scoring.
        DataError: Batches, losses or a dummy input that the model cannot be scored with.
        OrderError: The model was not converted.
        PlanError: A setting is unknown or wrong.
        StructureError: Nothing in the model can be searched.
    """
    inner = unwrap(model)
    searcher = (needed_space(inner).algorithm or GradientBinarySearcher)()
    searcher.search(inner, constraints, dummy_input, config)
    _export_model(inner)
    return model, searcher.state_dict()


def prune(
    model: nn.Module,
    mode: ModeLike,
    constraints: Mapping[str, Any],
    dummy_input: Any,
    config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """`convert` and `search` in one call, as ``modelopt.torch.prune.prune`` was.

    Args:
        model: A Transformers model or any other module; it is cut in place.
        mode: As in `convert`.
        constraints: As in `search`.
        dummy_input: As in `search`.
        config: As in `search`.

    Returns:
        As `search`.

    Raises:
        GradNASError: As `convert` and `search`.

    Example:
        >>> model, history = prune(                                      # doctest: +SKIP
        ...     model, "gradnas", {"flops": "60%"}, dummy_input=({"input_ids": ids},),
        ...     config={"data_loader": loader, "collect_func": lambda batch: (batch,),
        ...             "loss_func": lambda output, batch: output.loss})
    """
    return search(convert(model, mode), constraints, dummy_input, config)


def _read_mode(mode: ModeLike) -> tuple[GradNASModeDescriptor, GradNASConfig]:
    """The descriptor and the config in any of the forms that the reference takes."""
    entries: list[Any] = [mode]
    if isinstance(mode, Mapping | list):
        entries = list(mode.items() if isinstance(mode, Mapping) else mode)
    if len(entries) != 1:
        raise PlanError(f"mode: found {len(entries)} modes, needed one; give 'gradnas'.")
    entry = entries[0]
    is_pair = isinstance(entry, tuple) and len(entry) == 2  # noqa: PLR2004 - name and config
    name, given = entry if is_pair else (entry, None)
    if isinstance(name, type) and issubclass(name, GradNASModeDescriptor):
        name = name()
    descriptor = name if isinstance(name, GradNASModeDescriptor) else None
    if isinstance(name, str):
        descriptor = MODES.get(name)
    if descriptor is None:
        raise PlanError(
            f"mode {name!r:.60}: not known, this package has {', '.join(map(repr, MODES))}; "
            "give that name, or [('gradnas', config)]."
        )
    if isinstance(given, GradNASConfig):
        return descriptor, given
    try:
        return descriptor, GradNASConfig.model_validate({} if given is None else given)
    except ValidationError as error:
        raise PlanError(f"mode: its config cannot be read: {error}") from error
