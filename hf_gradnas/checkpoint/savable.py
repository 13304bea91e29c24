"""One check before all work: could this model be saved and loaded now?

What cannot is refused here, before anything is scored or trained, and nothing is changed. Weights
are looked at first (`plain`), then what the class builds from the saved config is compared by names
and shapes, and at last by outputs, which shows whatever else a load would not restore.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, StructureError, described
from ..running.wrappers import check_no_adapters, is_partitioned, is_sharded
from .twin import Entry, build_twin, check_outputs, entries, fill_twin, is_narrowed

SHOWN = 4


def check_savable(model: nn.Module, batch: Mapping[str, Any] | None = None) -> None:
    """Check that a model, pruned or not, could be saved and loaded with all that it computes.

    It costs the time to build the model without weights, and one short forward of it and its twin.

    Args:
        model: The model, unwrapped. A module that is none of Transformers has no config to compare
            with: only its weights are checked. Nothing of it changes.
        batch: Keyword arguments of its forward; None: outputs are not compared.

    Raises:
        CheckpointError: Its config or generation config cannot be saved.
        StructureError: Its weights are not plain numbers, are not those that its config builds, are
            shared where the class declares no tie, or a load would not restore what it computes.
    """
    check_plain(model)
    if is_sharded(model) or not isinstance(model, PreTrainedModel):
        return
    twin = build_twin(model)
    given, wanted = entries(model), entries(twin)
    _check_names(model, given, wanted)
    _check_shapes(model, given, wanted)
    if any(parameter.is_meta for parameter in model.parameters()):  # offloaded: no values
        return
    _check_shared(model, given, wanted)
    _check_values(given, wanted, twin)
    others = fill_twin(twin, model)
    if batch is not None and len({p.device for p in model.parameters()}) == 1:
        check_outputs(model, twin, batch, others)


def check_processor(processor: Any) -> None:
    """Check that a tokenizer, image processor or processor can be saved, in a folder that is gone.

    Args:
        processor: What is saved beside the model; None: nothing is.

    Raises:
        CheckpointError: It cannot.
    """
    if processor is None:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
    except Exception as error:  # each kind of processor refuses in its own ways
        raise CheckpointError(
            f"{type(processor).__name__}: cannot be saved beside the model "
            f"({described(error, whole=True)}); give a tokenizer or "
            "processor whose save_pretrained works, or none."
        ) from error


# --- names and shapes -----------------------------------------------------------------------------


def _check_names(
    model: PreTrainedModel, given: Mapping[str, Entry], wanted: Mapping[str, Entry]
) -> None:
    """Check that a checkpoint of the model would hold the names that its config builds."""
    extra = [n for n, e in given.items() if e.is_saved and not _is_saved(wanted.get(n))]
    missing = [n for n, e in wanted.items() if e.is_saved and not _is_saved(given.get(n))]
    if not extra and not missing:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in extra:
        path = name.partition(".parametrizations.")[0]
        path = path if path in modules and path != name else name.rpartition(".")[0]
        maker = made_by(modules[path])
        if maker:
            raise StructureError(
                f"{path}: its weight is made by {maker} at every forward, which a load would not "
                "restore, needed is a plain parameter; make it one first "
                "(torch.nn.utils.parametrize.remove_parametrizations(module, name), "
                "torch.nn.utils.remove_weight_norm or remove_spectral_norm)."
            )
    name = type(model).__name__
    found = ", ".join(f"{n} {list(given[n].tensor.shape)}" for n in extra[:SHOWN]) or "nothing more"
    needed = ", ".join(f"{n} {list(wanted[n].tensor.shape)}" for n in missing[:SHOWN])
    path = (extra or missing)[0].rpartition(".")[0]
    raise StructureError(
        f"{path or 'model'}: the model is not what {name} builds from its config, so that what is "
        f"saved could not be loaded: found {found} ({len(extra)} in all), needed "
        f"{needed or 'nothing more'} ({len(missing)} in all). Take out what was added by hand; if "
        "a module was replaced or layers were taken out, change model.config (num_labels, number "
        "of layers, …) and build the model from it, or make a class of your own that builds it."
    )


def _is_saved(entry: Entry | None) -> bool:
    return entry is not None and entry.is_saved


def _check_shapes(
    model: PreTrainedModel, given: Mapping[str, Entry], wanted: Mapping[str, Entry]
) -> None:
    """Check that every saved tensor has the shape that the config says."""
    for name, entry in wanted.items():
        if not entry.is_saved:
            continue
        found, needed = list(given[name].tensor.shape), list(entry.tensor.shape)
        if found != needed:
            raise StructureError(
                f"{name}: has shape {found}, but {type(model).__name__} builds {needed} from its "
                "config, so that what is saved could not be loaded; "
                f"{_way_out(model, found, needed)}, then save and load the model once."
            )


def _way_out(model: PreTrainedModel, found: list[int], needed: list[int]) -> str:
    """Which key of the config would have to be set to what, as far as numbers tell."""
    changed = [(has, wants) for has, wants in zip(found, needed, strict=False) if has != wants]
    if len(found) == len(needed) and len(changed) == 1:
        has, wants = changed[0]
        if model.config.num_labels == wants:
            return f"set model.config.num_labels = {has}"
        for path, config in _configs(model.config):
            keys = [k for k, value in vars(config).items() if value is not True and value == wants]
            if "vocab_size" in keys:
                keys = ["vocab_size"]
            if keys:
                names = " or ".join(f"{path}.{key} = {has}" for key in keys[:SHOWN])
                return f"set {names} (whichever is meant; it says {wants} now)"
    return "set the keys of model.config that say so"


def _configs(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    yield "model.config", config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield f"model.config.{name}", value


# --- weights --------------------------------------------------------------------------------------


def _check_shared(
    model: PreTrainedModel, given: Mapping[str, Entry], wanted: Mapping[str, Entry]
) -> None:
    """Check that tensors share memory only where the class declares it."""
    declared = {  # as upstream's saving reads it
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        for key in (module._tied_weights_keys or {})
    }
    for names in _overlapping(given):
        owners = {id(wanted[name].tensor) for name in names}
        free = [name for name in names if not any(re.search(key, name) for key in declared)]
        if len(owners) > 1 or len(free) > 1:
            first, second, *_ = sorted(names)
            ties = ", ".join(sorted(declared)) or "none"
            raise StructureError(
                f"{first} and {second}: share their numbers, but {type(model).__name__} declares "
                f"no such tie for this config (it declares {ties}), "
                "so that a cut of one would change the other, and a load would not tie them "
                "again; give each its own (module.weight = nn.Parameter(module.weight.detach()"
                ".clone())), or set the config's tie_word_embeddings where that is meant."
            )


def _overlapping(given: Mapping[str, Entry]) -> Iterator[list[str]]:
    """Groups of names whose tensors have bytes in common; parts of one storage may lie apart."""
    spans = defaultdict(list)
    for name, entry in given.items():
        tensor = entry.tensor
        if entry.is_saved and tensor.numel():
            last = sum(
                (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = int(tensor.storage_offset()) * tensor.element_size()
            end = start + (last + 1) * tensor.element_size()
            storage = (tensor.device, tensor.untyped_storage().data_ptr())
            spans[storage].append((start, end, name))
    for found in spans.values():
        group: list[str] = []
        reach = 0
        for start, end, name in sorted(found):
            if group and start >= reach:
                if len(group) > 1:
                    yield group
                group, reach = [], 0
            group.append(name)
            reach = max(reach, end)
        if len(group) > 1:
            yield group


def _check_values(
    given: Mapping[str, Entry], wanted: Mapping[str, Entry], twin: PreTrainedModel
) -> None:
    """Check that every saved number would come back as it is."""
    seen: set[int] = set()
    for name, entry in given.items():
        tensor = entry.tensor.detach()
        if not entry.is_saved or id(entry.tensor) in seen or not tensor.is_floating_point():
            continue
        seen.add(id(entry.tensor))
        if tensor.isnan().any():
            raise StructureError(
                f"{name}: holds NaN, needed are numbers; load a checkpoint from before the "
                "training went wrong."
            )
        loaded = wanted[name].tensor
        if is_narrowed(name, tensor, loaded, twin) and not torch.equal(
            tensor, tensor.to(loaded.dtype)
        ):
            raise StructureError(
                f"{name}: is {tensor.dtype}, but most of the model is {loaded.dtype}, to which a "
                "load casts all of it, so that it would lose digits; cast the model to one type "
                f"first, model.to({tensor.dtype}) to keep them."
            )


# --- are weights plain numbers, and all there is? -------------------------------------------------


PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTISERS = (
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "gptqmodel",
    "hqq",
    "optimum",
    "quanto",
    "torch.ao",
    "torchao",
)
"""Libraries whose modules hold numbers of another kind."""


def check_plain(model: nn.Module) -> None:
    """Check that the weights of a module are plain floating-point numbers, and all there is.

    Args:
        model: Any module, unwrapped.

    Raises:
        StructureError: It holds adapters, quantised weights, pruning masks, tensors of
            ``torch.inference_mode`` or lazy ones.
    """
    check_no_adapters(model)
    _check_not_quantised(model)
    for path, module in model.named_modules():
        masks = [h for h in module._forward_pre_hooks.values() if isinstance(h, BasePruningMethod)]
        if masks:
            name = masks[0]._tensor_name
            raise StructureError(
                f"{path or 'model'}: its {name} is made from {name}_orig and {name}_mask by "
                "torch.nn.utils.prune at every forward, needed is a plain parameter; call "
                f"torch.nn.utils.prune.remove(module, {name!r}) on it first."
            )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):  # others are extra states
            _check_tensor(name, tensor)


def made_by(module: nn.Module) -> str:
    """What makes a weight of a module anew at every forward, in words; "" when nothing does."""
    if is_parametrized(module):
        chains = cast(nn.ModuleDict, module.parametrizations).values()
        kinds = [type(each).__name__ for chain in chains for each in chain.children()]
        return f"torch.nn.utils.parametrize ({', '.join(kinds)})"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            return f"torch.nn.utils.{'weight' if isinstance(hook, WeightNorm) else 'spectral'}_norm"
    return ""


def _check_not_quantised(model: nn.Module) -> None:
    """Check what says that a model is quantised, besides its numbers."""
    advice = "prune the model first, in 16 or 32 bits, and quantise the result"
    for path, module in model.named_modules():
        if vars(module).get("hf_quantizer") is not None:
            raise StructureError(
                f"{path or 'model'}: is quantised (by {type(module.hf_quantizer).__name__}), "
                f"needed are plain floating-point weights; {advice}."
            )
        library = type(module).__module__
        found = next((q for q in QUANTISERS if f"{library}.".startswith(f"{q}.")), None)
        if found is not None:
            raise StructureError(
                f"{path or 'model'}: is a {type(module).__name__} of {found}, needed are plain "
                f"floating-point weights; {advice}."
            )
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and vars(config).get("quantization_config"):
            raise StructureError(
                f"{path or 'model'}: its config has a quantization_config, so that what is saved "
                f"would be quantised when it is loaded; {advice}. If the weights were dequantised, "
                "take the key out: del model.config.quantization_config."
            )


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Check one parameter or buffer."""
    if isinstance(tensor, UninitializedBuffer | UninitializedParameter):
        raise StructureError(
            f"{name}: has no shape yet, needed is an initialised parameter; run the model once."
        )
    if tensor.is_inference():
        raise StructureError(
            f"{name}: was made under torch.inference_mode(), which forbids gradients and changes "
            "in place for good; build or load the model outside of it (torch.no_grad() will do)."
        )
    if not isinstance(tensor, nn.Parameter):
        return
    is_plain = isinstance(tensor, DTensor) or type(tensor.data) is torch.Tensor
    if is_partitioned(tensor) or (is_plain and tensor.dtype in PLAIN):
        return
    kind = type(tensor.data).__name__ if not is_plain else str(tensor.dtype).split(".")[-1]
    raise StructureError(
        f"{name}: holds numbers of kind {kind}, needed are plain floating-point weights (16, 32 or "
        "64 bits); prune the model first, and quantise the result."
    )
