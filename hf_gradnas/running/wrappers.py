"""What is put around a model, and weights that are spread.

Knows DDP, torch.compile, adapters, offloading and sharding; a model that cannot be pruned as it is
gets an error that says what to do.

A model of sentence-transformers holds a Transformers model and runs it. That library is known by
the names of its modules and is never imported: it is no dependency.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration

from .._compat import taken_out
from ..errors import StructureError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, a DeepSpeed engine and ``torch.compile``, in any order.

    A forward that Accelerate patched for mixed precision stays patched.

    Raises:
        StructureError: It is no module, or FSDP1 has merged its parameters.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(
            f"model: found {model!r:.60}, needed a Transformers PreTrainedModel; pass the model "
            "itself, loaded with from_pretrained."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise StructureError(
            f"model: {type(model).__name__} is wrapped by FSDP1, which merges parameters into flat "
            "ones; use FSDP2 (fsdp_version: 2) for scoring, or a plain copy of the model."
        )
    inner = taken_out(model)
    return inner if inner is model else unwrapped(inner)


def check_no_adapters(model: nn.Module) -> None:
    """Check that no adapter of PEFT is in a model, or around it.

    Raises:
        StructureError: One does; it would not follow the cut.
    """
    for path, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise StructureError(
                f"model: found a {type(module).__name__} of PEFT (at {path or 'the top'}), needed "
                "is one without adapters, which would not follow the cut; merge them first "
                "(merge_and_unload), or prune the model and add adapters then. Adapters that "
                "add_adapter put in are merged by way of a folder: model.save_pretrained(folder), "
                "then peft.PeftModel.from_pretrained(base, folder).merge_and_unload()."
            )


@contextmanager
def uncompiled(context: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    """Run compiled code as plain Python within the block, since it does not see new hooks.

    Args:
        context: What puts the hooks on; None: nothing.
    """
    with torch.compiler.set_stance("force_eager"), context or nullcontext():
        yield


@contextmanager
def called_plainly(model: nn.Module) -> Iterator[None]:
    """Call the forwards of a model without the frames of ``torch.compile`` within the block.

    They stay around a call also where `uncompiled` has its code run as plain Python, and put the
    thread's dispatch keys back when it ends. A forward that waits in such a call would leave them
    to another one, after which no operation of torch works in this process.
    """
    with ExitStack() as stack:
        for module in model.modules():
            instance = vars(module)
            if instance.get("_compiled_call_impl") is not None:  # by module.compile()
                stack.callback(instance.update, _compiled_call_impl=module._compiled_call_impl)
                instance["_compiled_call_impl"] = None
            plain = _uncompiled_forward(module)
            if plain is not None:
                stack.callback(_put_back, instance, "forward", instance.get("forward"))
                instance["forward"] = plain
        yield


def _uncompiled_forward(module: nn.Module) -> Any:
    """The forward inside one that is compiled, in the instance or its class; None: it is plain."""
    forward: Any = module.forward
    is_bound = isinstance(forward, MethodType)
    function = forward.__func__ if is_bound else forward
    if not isinstance(function, FunctionType):  # of a script, or of another library
        return None
    inner = vars(function).get("_torchdynamo_orig_callable")
    return MethodType(inner, module) if is_bound and inner is not None else inner


def _put_back(instance: dict[str, Any], name: str, value: Any) -> None:
    """Give an instance an attribute again; None: it had none."""
    del instance[name]
    if value is not None:
        instance[name] = value


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Let a model run as it is saved, although accelerate has wrapped its forward for bf16 or fp16.

    Cause: ``Accelerator.prepare_model`` stores a wrapper in the instance, which no autocast context
    turns off, and can only take it away for good. Remove when it can be lifted for a while.
    """
    instance = vars(model)
    if "_original_forward" not in instance:
        yield
        return
    wrapped = instance["forward"]
    try:
        instance["forward"] = instance["_original_forward"]
        yield
    finally:
        instance["forward"] = wrapped


def check_parameters(
    model: nn.Module, what: str, *, shards: bool = False, offloaded: bool = False
) -> None:
    """Check that the weights of a model are where they can be read.

    Args:
        model: The model, unwrapped.
        what: What is to be done with it.
        shards: Whether shards of FSDP2 and ZeRO-3 will do.
        offloaded: Whether weights that Accelerate loads when they are needed will do.

    Raises:
        StructureError: They are not: compiled in part, offloaded, or sharded.
    """
    for name, module in model.named_modules():
        if is_compiled_module(module):
            raise StructureError(
                f"{what}: {name} is compiled on its own, which renames what is in it; prune the "
                "model before its parts are compiled."
            )
    for name, parameter in model.named_parameters():
        found, advice = _trouble(parameter, shards=shards, offloaded=offloaded)
        if found:
            raise StructureError(
                f"{what}: {name} is {found}, but its values are needed on this process; {advice}."
            )


def _trouble(parameter: nn.Parameter, *, shards: bool, offloaded: bool) -> tuple[str, str]:
    """What keeps a parameter from being read, and what to do; two empty texts if nothing does."""
    if parameter.is_meta and not offloaded:
        return (
            "offloaded (on the meta device)",
            "discover, score and plan take it so; for the rest, load the model with a device_map "
            "that leaves nothing to cpu offload or disk, or cut its checkpoint on the disk "
            "(hf-gradnas apply)",
        )
    if isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ()):
        return "split by tensor parallelism", "load the model without tp_plan"
    by = "partitioned by ZeRO-3" if is_partitioned(parameter) else "sharded by FSDP2"
    if shards or not (is_partitioned(parameter) or isinstance(parameter, DTensor)):
        return "", ""
    return by, "call discover(batch) before that; score and apply then work on the shards"


# --- weights that are spread over processes, made whole (FSDP2, ZeRO-3) ---------------------------


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds a part of it here; it then looks empty between forwards."""
    return "ds_id" in vars(parameter)  # DeepSpeed's mark


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of some parameter."""
    return any(isinstance(p, DTensor) or is_partitioned(p) for p in model.parameters())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    return tuple(vars(parameter).get("ds_shape", parameter.shape))


def whole(parameter: Tensor) -> Tensor:
    """A parameter with all its rows, detached."""
    if isinstance(parameter, DTensor):
        full: Tensor = parameter.full_tensor()
        return full.detach()
    if not is_partitioned(parameter):
        return parameter.detach()
    if tuple(parameter.shape) == shape_of(parameter):  # still gathered from a forward
        return parameter.detach().clone()
    from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415 - only where it is in use

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def gathered(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a sharded model, with all weights, on every process.

    It is on the shards' device and takes the memory of a whole model per process; the sharded
    one is left as it is.
    """
    weights = {name: whole(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    # fully_shard puts a class of its own before the model's.
    classes: tuple[type[Any], ...] = type(model).__mro__
    plain_class = next(c for c in classes if not issubclass(c, FSDPModule))
    with _unpartitioned():
        plain: PreTrainedModel = plain_class.from_pretrained(
            None, config=copy.deepcopy(model.config), state_dict=weights
        )
    _take(plain, weights)
    return plain.to(model.device).train(model.training)


def _take(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give parameters the values and number types of `weights`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = weights[name].clone()


@contextmanager
def _unpartitioned() -> Iterator[None]:
    """Let ``from_pretrained`` build a whole model although a config of DeepSpeed is in force.

    Cause: Transformers asks a module-level reference, and offers no argument. Remove when it does.
    """
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


# --- models that hold a Transformers model --------------------------------------------------------


LIBRARY = "sentence_transformers"
SENTENCE_CLASSES = ("SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder")
"""Classes of the library that load a folder, as its ``model_type`` names them."""
# What ends the name of a column that holds a text, picture or sound; the rest names the column.
_FEATURES = ("input_ids", "pixel_values", "input_features", "input_values")


def sentence_class(model: nn.Module) -> str | None:
    """Name of the class of sentence-transformers that a model is one of, or None."""
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] == LIBRARY and cls.__name__ in SENTENCE_CLASSES:
            return cls.__name__
    return None


def body_of(model: nn.Module) -> tuple[PreTrainedModel, Any]:
    """The Transformers model that can be pruned, and the model of sentence-transformers around it.

    Args:
        model: Either of them, also inside DDP or ``torch.compile``.

    Returns:
        The Transformers model, and the one around it or None.

    Raises:
        StructureError: It is neither, holds several Transformers models or none, or adapters.
    """
    inner = unwrapped(model)
    check_no_adapters(inner)
    if isinstance(inner, PreTrainedModel):
        return inner, None
    if sentence_class(inner) is None:
        raise StructureError(
            f"model: found a {type(inner).__name__}, needed a Transformers PreTrainedModel; "
            "pass the model itself."
        )
    bodies = list({id(body): body for body in _bodies(inner)}.values())
    if len(bodies) != 1:
        found = ", ".join(type(body).__name__ for body in bodies) or "none"
        raise StructureError(
            f"model: a {type(inner).__name__} with one Transformers model is needed, found "
            f"{found}; pass the Transformers model that is to be pruned."
        )
    return bodies[0], inner


def _bodies(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The outermost Transformers models in a module."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _bodies(child)


def save_owner(owner: Any, folder: Path) -> None:
    """Let a model of sentence-transformers write itself, and the Transformers model in it."""
    owner.save_pretrained(str(folder), create_model_card=False)


class Features:
    """Batches of a trainer of sentence-transformers, as batches of the Transformers model.

    Its collator gives the tokens of every column under the column's name; each column is a batch.

    Args:
        batches: Can be read more than once.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            yield from split_features(batch)


def split_features(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The batches of one text, picture or sound each that a batch consists of."""
    prefixes = [
        name.removesuffix(ending)
        for name in batch
        for ending in _FEATURES
        if name == ending or name.endswith(f"_{ending}")
    ]
    for prefix in dict.fromkeys(prefixes):
        columns = {
            name.removeprefix(prefix): value
            for name, value in batch.items()
            if name.startswith(prefix) and isinstance(value, Tensor)
        }
        yield {name: value for name, value in columns.items() if name not in ("label", "labels")}
