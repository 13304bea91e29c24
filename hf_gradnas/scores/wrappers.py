"""What other libraries put around a model, and what they do to its weights.

Knows DDP, torch.compile, offloading and sharding; a model that cannot be pruned as it is gets an
error that says what to do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import StructureError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, a DeepSpeed engine and ``torch.compile``, in any order.

    A forward that Accelerate patched for mixed precision stays patched.

    Raises:
        StructureError: FSDP1 has merged its parameters.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise StructureError(
            f"model: {type(model).__name__} is wrapped by FSDP1, which merges parameters into flat "
            "ones; use FSDP2 (fsdp_version: 2) for scoring, or a plain copy of the model."
        )
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner if inner is model else unwrapped(inner)


@contextmanager
def uncompiled(context: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    """Run compiled code as plain Python within the block, since it does not see new hooks.

    Args:
        context: What puts the hooks on; None: nothing.
    """
    with torch.compiler.set_stance("force_eager"), context or nullcontext():
        yield


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of some parameter (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows; of a sharded one, all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a model that FSDP2 has sharded, with all weights, on every process.

    All processes must call it together. It stands on the shards' device, in memory for a whole
    model per process; the sharded one is left as it is.
    """
    options = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=options)
    # fully_shard puts a class of its own before the model's.
    classes: tuple[type[Any], ...] = type(model).__mro__
    plain_class = next(c for c in classes if not issubclass(c, FSDPModule))
    plain: PreTrainedModel = plain_class.from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=weights, dtype=model.dtype
    )
    return plain.to(model.device).train(model.training)


def check_parameters(model: nn.Module, what: str, *, shards: bool = False) -> None:
    """Check that the weights of a model are where they can be read.

    Args:
        model: The model, unwrapped.
        what: What is to be done with it.
        shards: Whether FSDP2's shards will do.

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
        found, advice = _trouble(parameter, shards=shards)
        if found:
            raise StructureError(
                f"{what}: {name} is {found}, but its values are needed on this process; {advice}."
            )


def _trouble(parameter: nn.Parameter, *, shards: bool) -> tuple[str, str]:
    """What keeps a parameter from being read, and what to do; two empty texts if nothing does."""
    if "ds_id" in vars(parameter):  # DeepSpeed's mark
        return "partitioned by ZeRO-3", "use ZeRO-2 or less, or a plain copy of the model"
    if parameter.is_meta:
        return (
            "offloaded (on the meta device)",
            "load the model with a device_map that leaves nothing to cpu offload or disk",
        )
    if not isinstance(parameter, DTensor):
        return "", ""
    names = parameter.device_mesh.mesh_dim_names or ()
    if "tp" in names:
        return "split by tensor parallelism", "load the model without tp_plan"
    if shards:
        return "", ""
    return (
        "sharded by FSDP2",
        "call discover(batch) before sharding; score and apply then work on the sharded model",
    )
