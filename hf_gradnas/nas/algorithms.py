"""The calls of the reference: convert, search and prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn

from ..errors import PlanError
from .arguments import unwrap
from .config import GradNASConfig
from .conversion import export_model
from .hparams import needed_space
from .mode import GradNASModeDescriptor
from .searcher import GradientBinarySearcher

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
    export_model(inner)
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
