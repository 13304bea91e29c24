"""The model of a checkpoint with lazy tensors: all that a model has, and none of its numbers.

Transformers loads it as any other, so that names are changed, and tensors are joined and tied, as
it does with the model in memory; and saving reverts it the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..errors import CheckpointError, RepairError, described
from ..repair.repairs import Repair
from ..stock.trials import silence
from .files import SHOWN, CheckpointFiles
from .lazy import LazyTensor
from .parts import Part, Stored


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names, of Transformers.

    Raises:
        CheckpointError: It names none that Transformers has.
    """
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"config.json: names {names[0] if names else 'no class'} under 'architectures', needed "
            "a class of Transformers; give the class (cls=…), or prune the model in memory."
        )
    return found


def lazy_model(
    files: CheckpointFiles,
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    *,
    dtype: str | torch.dtype = "auto",
) -> PreTrainedModel:
    """The model of a checkpoint, as ``from_pretrained`` builds it, its weights lazy.

    Args:
        files: The open checkpoint.
        config: Its config.
        cls: Class of the model.
        dtype: As of ``from_pretrained``.

    Raises:
        CheckpointError: The class cannot be built, or the checkpoint lacks weights of it.
    """
    given = {name: LazyTensor(part) for name, part in files.tensors.items()}
    if vars(config).get("quantization_config"):
        raise CheckpointError(
            f"{files.folder}: its config has a quantization_config, needed are plain "
            "floating-point weights; prune the model first, and quantise the result."
        )
    try:
        with silence(), torch.random.fork_rng(devices=[]):
            model, info = cast(Any, cls).from_pretrained(
                None, config=config, state_dict=given, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # classes refuse in their own ways
        raise CheckpointError(
            f"{files.folder}: cannot be loaded as {cls.__name__} ({described(error, whole=True)}); "
            "check config.json and the versions, or prune the model in memory."
        ) from error
    _check_loaded(files, model, info)
    model.config.name_or_path = model.name_or_path = str(files.folder)
    if model.can_generate():
        _load_generation(files, model)
    return cast(PreTrainedModel, model)


def _load_generation(files: CheckpointFiles, model: Any) -> None:
    """Give a model the generation config of its folder, as loading it by its name does.

    Raises:
        CheckpointError: It cannot be read.
    """
    options: dict[str, Any] = {
        "cache_dir": None,
        "force_download": False,
        "proxies": None,
        "token": None,
    }
    options |= {"local_files_only": True, "revision": "main", "subfolder": ""}
    try:
        with silence():
            model.adjust_generation_fn(
                None, False, None, str(files.folder), trust_remote_code=None, **options
            )
    except Exception as error:  # whatever it meets in the file
        raise CheckpointError(
            f"{files.folder}: its generation_config.json cannot be read "
            f"({described(error, whole=True)}); mend it, or remove it."
        ) from error


def _check_loaded(files: CheckpointFiles, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that every tensor that is saved comes from the checkpoint."""
    wrong = [str(name) for name, *_ in info["mismatched_keys"]]
    own = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not isinstance(tensor, LazyTensor)
    ]
    lost = sorted({*info["missing_keys"], *own, *wrong})
    if lost:
        raise CheckpointError(
            f"{files.folder}: has no weights for {', '.join(lost[:SHOWN])} of "
            f"{type(model).__name__} ({len(lost)} in all); they would be random. Check that "
            "its files are whole and its config.json is theirs, or fine-tune the model first."
        )


def lend_repair(model: PreTrainedModel, repair: Repair) -> None:
    """Put the new weights of a repair in the place of those of the checkpoint.

    Args:
        model: Of `lazy_model`, not cut yet.
        repair: Of this plan and model.

    Raises:
        RepairError: A weight is not one of the model's.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in repair.tensors.items():
        old = known.get(name)
        if old is None or old.shape != tensor.shape:
            has = "no such parameter" if old is None else f"the shape {tuple(old.shape)}"
            raise RepairError(
                f"repair: {name} has the shape {tuple(tensor.shape)}, the model has {has}; use it "
                "with the whole model that it was made from, or repair again."
            )
        new = nn.Parameter(LazyTensor(_held(tensor.to(old.dtype))), old.requires_grad)
        for module, leaf in places[id(old)]:
            module._parameters[leaf] = new


def _held(tensor: Tensor) -> Stored:
    return Stored(lambda: tensor, tuple(tensor.shape), tensor.dtype)


def saved_tensors(model: PreTrainedModel) -> dict[str, Part]:
    """Every tensor that ``save_pretrained`` of a lazy model would write, by its name there.

    Raises:
        CheckpointError: Transformers cannot say how the model is saved.
    """
    state: dict[str, Any] = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    try:
        # By names and identities: the stand-ins are what upstream takes for weights elsewhere.
        shown = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}
        left = remove_tied_weights_from_state_dict(shown, model)
        found = revert_weight_conversion(model, {name: state[name] for name in left})
    except Exception as error:  # as of any conversion
        raise CheckpointError(
            f"{type(model).__name__}: the names of its weights in a checkpoint cannot be told "
            f"({described(error, whole=True)}); prune the model in memory. Report it with the "
            "model's class and config."
        ) from error
    return {name: tensor.part for name, tensor in found.items()}
