"""Low-rank adapters of PEFT around a model for one training, merged into its weights at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._compat import peft_reads_an_old_name
from ..errors import RecipeError


def check_lora(lora: Any) -> None:
    """Check a rank or PEFT config, and that PEFT is installed, before anything expensive.

    Raises:
        RecipeError: PEFT is missing, or the rank is less than 1.
    """
    if lora is None:
        return
    if isinstance(lora, int) and lora < 1:
        raise RecipeError(f"lora={lora}: needed a rank of at least 1; None trains all weights.")
    if find_spec("peft") is None:
        raise RecipeError(
            f"lora={lora}: PEFT is not installed; install it with "
            "'pip install hf_gradnas[peft]', or leave lora (--recover-lora-rank) away to train "
            "all weights."
        )


@contextmanager
def adapted(model: PreTrainedModel, lora: Any) -> Iterator[Any]:
    """`model` with adapters, which are merged at the end; without `lora`, `model` itself.

    After an exception the adapters are taken off and the weights are as they were.

    Args:
        model: The model; its own modules are back in their places afterwards.
        lora: Rank, ``peft.PeftConfig``, or None.
    """
    check_lora(lora)
    if lora is None:
        yield model
        return
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - an optional package

    config = lora
    if isinstance(lora, int):
        targets = linear_paths(model)
        config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=targets)
    with peft_reads_an_old_name():
        wrapped = get_peft_model(model, config)
    try:
        yield wrapped
    except BaseException:
        wrapped.unload()
        raise
    wrapped.merge_and_unload()


def linear_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers that get an adapter: all that have weights, but the output table.

    A sub-layer that lost all its units has matrices without a row or column, and the output table
    may be tied to the input's.
    """
    table = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not table and module.weight.numel()
    ]
