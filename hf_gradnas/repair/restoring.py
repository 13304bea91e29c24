"""What a training changes besides weights, and how it is put back.

Knows what the Trainer, Accelerate and PEFT leave on a model and in the process; knows no losses.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import PreTrainedModel

from .._compat import configs_of

_HALF_BYTES = 2
# What activation checkpointing sets on modules, in all versions of Transformers 5.
_CHECKPOINTING = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    "_require_grads_hooks",
)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def only_weights_change(model: PreTrainedModel) -> Iterator[None]:
    """Train in 32 bits inside the ``with``, and put back all that a training changes besides.

    That is flags, gradients, number types, configs, activation checkpointing, hooks and the device.
    """
    with ExitStack() as stack:
        stack.callback(_put_back_device, model, model.device)
        stack.enter_context(_in_single_precision(model))
        stack.callback(_put_back_flags, *_flags(model))
        for module in model.modules():
            stack.callback(_put_back_hooks, module, _hooks(module))
            stack.callback(_put_back_checkpointing, module, _checkpointing(module))
        # The Trainer writes use_cache and the tokenizer's special tokens into configs; Accelerate
        # marks the model and, for mixed precision, gives it another forward.
        owners = [model, *configs_of(model), vars(model).get("generation_config")]
        for owner in owners:
            if owner is not None:
                stack.callback(_put_back_attributes, owner, dict(vars(owner)))
        yield


@contextmanager
def accelerate_state_kept() -> Iterator[None]:
    """Give the caller's Accelerator its settings back after the ``with``.

    Cause: all objects of a state class of Accelerate share one dict, which TrainingArguments
    empties (``AcceleratorState._reset_state``) and the Trainer's Accelerator fills anew, so that
    another Accelerator in the process would go on with its mixed precision and accumulation steps.
    """
    shared: list[dict[str, Any]] = [
        state._shared_state for state in (PartialState, AcceleratorState, GradientState)
    ]
    before = [{key: _copied(value) for key, value in state.items()} for state in shared]
    try:
        yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give Python, numpy and torch their random states back after the ``with``."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_initialized():  # else nothing was drawn there
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        if torch.backends.mps.is_available():
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield


@contextmanager
def _in_single_precision(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers of 16 bits in 32; batch norm wants its statistics in its input's."""
    dtypes = {
        tensor: tensor.dtype
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.is_floating_point() and tensor.element_size() <= _HALF_BYTES
    }
    try:
        for tensor in dtypes:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in dtypes.items():
            tensor.data = tensor.data.to(dtype)


def _copied(value: Any) -> Any:
    """Settings in a dict and references in a list are changed in place."""
    return copy.copy(value) if isinstance(value, dict | list) else value


def _put_back_device(model: PreTrainedModel, device: torch.device) -> None:
    if "hf_device_map" not in vars(model):
        model.to(device)


def _flags(model: nn.Module) -> tuple[dict[nn.Module, bool], dict[nn.Parameter, bool]]:
    return (
        {module: module.training for module in model.modules()},
        {parameter: parameter.requires_grad for parameter in model.parameters()},
    )


def _put_back_flags(training: dict[nn.Module, bool], wanting: dict[nn.Parameter, bool]) -> None:
    for module, flag in training.items():
        module.training = flag
    for parameter, wants in wanting.items():
        parameter.requires_grad_(wants)
        parameter.grad = None


def _hooks(module: nn.Module) -> dict[str, set[int]]:
    return {name: set(vars(module)[name]) for name in _HOOKS if name in vars(module)}


def _put_back_hooks(module: nn.Module, before: dict[str, set[int]]) -> None:
    for name, known in before.items():
        hooks = vars(module)[name]
        for key in set(hooks) - known:
            del hooks[key]


def _checkpointing(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _CHECKPOINTING if name in vars(module)}


def _put_back_checkpointing(module: nn.Module, before: dict[str, Any]) -> None:
    for name in _CHECKPOINTING:
        vars(module).pop(name, None)
    vars(module).update(before)


def _put_back_attributes(owner: Any, values: dict[str, Any]) -> None:
    vars(owner).clear()
    vars(owner).update(values)
