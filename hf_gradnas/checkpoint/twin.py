"""Builds what a plain load of a model would give, without writing or copying its weights.

The twin is built by the model's class, on the meta device, from the config as its file would say
it. It then takes the very parameters of the model, so that it costs next to no memory, and makes
what no checkpoint holds by itself, as loading does.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from ..batches.batch import to_device
from ..batches.longest import probe_inputs
from ..errors import CheckpointError, StructureError, described
from ..stock.trials import silence
from .apply import allowed_difference, largest_difference, outputs_of

ROUNDED = 2**-7
"""Largest relative change of a number that was cast to 16 bits and back on its way."""
SMALLEST = 1e-6


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter or buffer: where it is, and whether a checkpoint holds it."""

    tensor: Tensor
    module: nn.Module
    leaf: str
    is_saved: bool


def entries(model: nn.Module) -> dict[str, Entry]:
    """All parameters and buffers by each of their names."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        hidden = module._non_persistent_buffers_set
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                if tensor is not None:
                    name = f"{path}.{leaf}" if path else leaf
                    found[name] = Entry(tensor, module, leaf, leaf not in hidden)
    return found


def build_twin(model: PreTrainedModel) -> PreTrainedModel:
    """What the model's class builds from its config as it is saved and read back, on meta.

    Raises:
        CheckpointError: Its config or generation config cannot be saved or read back.
        StructureError: Its class builds nothing from its config alone.
    """
    config = _saved_config(model)
    try:
        with ExitStack() as stack:
            for context in (silence(), torch.random.fork_rng(devices=[]), _dtype(model.dtype)):
                stack.enter_context(context)
            with torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
                twin = type(model)(config)
            twin.tie_weights()
    except Exception as error:  # classes refuse in their own ways
        raise StructureError(
            f"{type(model).__name__}: cannot be built from its config, so that what is saved could "
            f"not be loaded ({described(error, whole=True)}); bring model.config in "
            "line with the model, and let the constructor of its class need the config alone."
        ) from error
    return twin


def fill_twin(twin: PreTrainedModel, model: PreTrainedModel) -> list[str]:
    """Give a twin that has the same names and shapes the tensors of a model.

    Parameters and saved buffers are shared with the model. What no checkpoint holds is made as
    loading makes it, and replaced by what the model has where a cast explains the difference.

    Returns:
        Tensors that a load would give other values or another type, in words.

    Raises:
        StructureError: What a load does to fill the model fails.
    """
    given, wanted = entries(model), entries(twin)
    for name, entry in wanted.items():
        if entry.is_saved:
            cast(Any, entry.tensor)._is_hf_initialized = True  # upstream's mark, on the twin's own
        else:
            device = given[name].tensor.device if name in given else model.device
            entry.module._buffers[entry.leaf] = _unfilled(entry.tensor, device)
    try:
        with silence(), torch.random.fork_rng(devices=[]):
            twin.initialize_weights()
    except Exception as error:  # classes refuse in their own ways
        raise StructureError(
            f"{type(model).__name__}: its _init_weights fails, so that what is saved could not be "
            f"loaded ({described(error, whole=True)}); mend it first."
        ) from error
    return [
        found for name, entry in entries(twin).items() if (found := _lend(name, entry, given, twin))
    ]


def _lend(name: str, entry: Entry, given: Mapping[str, Entry], twin: PreTrainedModel) -> str:
    """Put the model's tensor into the twin where a load would; else say why not."""
    has = given.get(name)
    is_parameter = entry.leaf in entry.module._parameters
    store = cast(Any, entry.module._parameters if is_parameter else entry.module._buffers)
    if entry.is_saved and has is not None:
        store[entry.leaf] = has.tensor
        if not is_narrowed(name, has.tensor, entry.tensor, twin):
            return ""
        store[entry.leaf] = has.tensor.detach().to(entry.tensor.dtype)
        return f"{name}, which a load casts to {entry.tensor.dtype}"
    if has is not None and _is_close(has.tensor, entry.tensor):
        store[entry.leaf] = has.tensor.detach().clone()
        return ""
    if entry.tensor.numel() and torch.equal(entry.tensor, _unfilled(entry.tensor, None)):
        return f"{name}, which no load fills (the _init_weights of its class has to)"
    return f"{name}, which a load gives other values"


def _unfilled(like: Tensor, device: torch.device | None) -> Tensor:
    """A tensor with values that show that nothing was written into it."""
    value = float("-inf") if like.is_floating_point() else -(2**7) * (like.dtype != torch.bool)
    return torch.full_like(like, value, device=device)


def kernels_of(config: PreTrainedConfig, of: str = "attn") -> Any:
    """Kernels of a config and the configs in it, as ``from_pretrained`` takes them.

    Args:
        config: The config.
        of: ``"attn"``, or ``"experts"``.
    """
    parts = {name: vars(config).get(name) for name in config.sub_configs}
    inside = {
        n: kernels_of(part, of) for n, part in parts.items() if isinstance(part, PreTrainedConfig)
    }
    own = getattr(config, f"_{of}_implementation", None)
    return {"": own, **inside} if any(kernel != own for kernel in inside.values()) else own


def is_narrowed(name: str, tensor: Tensor, loaded: Tensor, twin: PreTrainedModel) -> bool:
    """Whether loading casts a tensor to a type of fewer bits."""
    if not (tensor.is_floating_point() and loaded.is_floating_point()):
        return False
    if torch.finfo(loaded.dtype).bits >= torch.finfo(tensor.dtype).bits:
        return False
    wide = (*(twin._keep_in_fp32_modules or ()), *(twin._keep_in_fp32_modules_strict or ()))
    return not any(re.search(pattern.replace("*", ".*"), name) for pattern in wide)


def _saved_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config as `save_pretrained` writes it and `from_pretrained` reads it.

    Raises:
        CheckpointError: It, or the generation config, cannot be written or read.
    """
    what, advice = "config", "give the keys of model.config values that JSON can hold"
    try:
        with tempfile.TemporaryDirectory() as folder, silence():
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            if model.can_generate():
                what, advice = "generation_config", "set model.generation_config right"
                copy.deepcopy(cast(Any, model).generation_config).save_pretrained(folder)
            what, advice = "config", "give the model's class a config_class that reads it back"
            loaded = cast(Any, type(model).config_class).from_pretrained(folder)
    except Exception as error:  # config classes refuse in their own ways
        raise CheckpointError(
            f"{type(model).__name__}: its {what} cannot be saved and loaded, and so neither can "
            f"the pruned model ({described(error, whole=True)}); {advice} first."
        ) from error
    for each in (loaded, *(vars(loaded).get(name) for name in loaded.sub_configs)):
        if isinstance(each, PreTrainedConfig):
            each.dtype = model.dtype
    loaded._attn_implementation = cast(Any, kernels_of(model.config))
    loaded._experts_implementation = cast(Any, kernels_of(model.config, "experts"))
    return cast(PreTrainedConfig, loaded)


def _is_close(has: Tensor, makes: Tensor) -> bool:
    """Whether two tensors are the same but for a cast to fewer bits."""
    if has.shape != makes.shape or has.device != makes.device:
        return False
    if not (has.is_floating_point() and makes.is_floating_point()):
        return torch.equal(has, makes)
    numbers = has.cpu().double(), makes.cpu().double()
    return torch.allclose(*numbers, rtol=ROUNDED, atol=SMALLEST, equal_nan=True)


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default type inside the ``with``."""
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(previous)


# --- does the twin compute what the model does? ---------------------------------------------------


FOREIGN = ("transformers.", "accelerate.", "torch.", "hf_gradnas.")
"""Packages whose hooks a load puts on again, or that change no value."""
WRAPPED = frozenset(["_original_forward", "_old_forward"])
"""Attributes that Accelerate leaves beside a forward that it wrapped."""
SHOWN = 4
SHOWN_TEXT = 200


def check_outputs(
    model: PreTrainedModel, twin: PreTrainedModel, batch: Mapping[str, Any], others: list[str]
) -> None:
    """Check that the twin, which has the model's weights, computes what the model computes.

    Args:
        model: The model; it runs once or twice in eval mode, and is left as it was.
        twin: What a load of it would be (see `twin`).
        batch: Keyword arguments of the forward; the first tokens of two examples are run.
        others: Tensors that the twin has with other values, in words.

    Raises:
        StructureError: Outputs differ by more than rounding.
    """
    decoder = bool(model.config.is_encoder_decoder)
    sample: Mapping[str, Any] = probe_inputs(batch, decoder=decoder)
    try:
        before = outputs_of(model, ((), sample))
    except Exception:  # some models need more than the first tokens, or their own labels
        sample = to_device(batch, model)
        try:
            before = outputs_of(model, ((), sample))
        except Exception:
            return  # discovery says what the batch lacks
    try:
        after = outputs_of(twin, ((), sample))
    except Exception as error:
        difference = f"fails with {described(error, whole=True)[:SHOWN_TEXT]}"
    else:
        where = _differing(before, after)
        if not where or _differing(before, outputs_of(model, ((), sample))):
            return  # it may not be equal even to itself
        difference = f"gives other {where}"
    suspects = list(_suspects(model, twin, others))
    found = "; ".join(suspects[:SHOWN]) or "nothing that can be seen in its modules"
    raise StructureError(
        f"{type(model).__name__}: computes what a load would not restore: built again from its "
        f"config, with the same weights, it {difference}. Found in this model only: {found}. Take "
        "it out, or set the key of model.config that builds it, and save and load the model first."
    )


def _differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Place of the first output that is not the same; "" where all are."""
    for path in sorted(before.keys() | after.keys()):
        if path not in before or path not in after:
            return path
        has, loaded = before[path], after[path]
        if has.shape != loaded.shape:
            return path
        if not largest_difference(loaded, has) <= allowed_difference(has):  # catches nan too
            return path
    return ""


def _suspects(model: PreTrainedModel, twin: PreTrainedModel, others: list[str]) -> Iterator[str]:
    """What is in a model and not in its twin, in words; the likeliest first."""
    makes = dict(twin.named_modules(remove_duplicate=False))
    has = dict(model.named_modules(remove_duplicate=False))
    for path, module in has.items():
        if path not in makes:
            yield f"{path} (a {type(module).__name__})"
        elif type(module).__name__ != type(makes[path]).__name__:
            names = type(module).__name__, type(makes[path]).__name__
            yield f"{path} is a {names[0]}, the config builds a {names[1]}"
        yield from _put_on(path or "the model", module)
    yield from (f"no {path}" for path in makes if path not in has)
    yield from others
    for path in sorted(has.keys() & makes.keys()):
        yield from _set_by_hand(path or "model", vars(has[path]), vars(makes[path]))


def _put_on(path: str, module: nn.Module) -> Iterator[str]:
    """Hooks and forwards that were put on a module from outside."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function = getattr(hook, "func", hook)  # a partial
        if not str(getattr(function, "__module__", "")).startswith(FOREIGN):
            yield f"the hook {getattr(function, '__name__', type(function).__name__)} on {path}"
    if "forward" in vars(module) and not vars(module).keys() & WRAPPED:
        yield f"a forward of its own on {path}"


def _set_by_hand(path: str, has: Mapping[str, Any], makes: Mapping[str, Any]) -> Iterator[str]:
    """Numbers and names that differ among the attributes of a module."""
    for key in sorted(has.keys() & makes.keys() - {"training", "name_or_path"}):
        is_simple = isinstance(has[key], bool | int | float | str) and not key.startswith("_")
        if is_simple and has[key] != makes[key]:
            yield f"{path}.{key} is {has[key]!r}, the config gives {makes[key]!r}"
