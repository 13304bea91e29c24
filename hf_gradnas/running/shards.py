"""Weights that are spread over processes (FSDP2, ZeRO-3), made whole.

Whatever gathers here must be called by all processes together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration


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
