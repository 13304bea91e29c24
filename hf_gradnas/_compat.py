"""Everything that depends on the version of Transformers, each with its removal condition."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers import PreTrainedConfig


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config object that a module of `model` holds, each once."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        config = vars(config).get("_base", config) if config is not None else None  # a live view
        if isinstance(config, PreTrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Run the modules of `model` with the attention kernel `name`.

    Cause: ``set_attn_implementation`` needs a whole ``PreTrainedModel`` and cannot be asked for
    the value to go back to, config by config; modules read ``config._attn_implementation`` at every
    forward. Remove when Transformers offers this as a context manager.
    """
    with ExitStack() as stack:
        for config in configs_of(model):
            previous = config._attn_implementation_internal
            stack.callback(setattr, config, "_attn_implementation_internal", previous)
            config._attn_implementation_internal = name
        yield


@contextmanager
def peft_reads_an_old_name() -> Iterator[None]:
    """Wrap a model in adapters without a warning that no user can act on.

    Cause: PEFT up to 0.21 asks a model for ``is_gradient_checkpointing``, which Transformers 5.23
    renamed. Remove when the oldest supported PEFT asks for ``is_activation_checkpointing``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield
