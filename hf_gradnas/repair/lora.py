"""Low-rank adapters of PEFT around a model for one training, merged into its weights at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Real
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._compat import peft_reads_an_old_name
from ..errors import RecipeError
from ..types import is_integer

Places = Mapping[nn.Module, Mapping[str, nn.Module]]


def check_lora(lora: Any) -> None:
    """Check a rank or PEFT config, and that PEFT is installed, before anything expensive.

    Raises:
        RecipeError: PEFT is missing, the rank is no whole number of 1 or more, or the config is of
            adapters that cannot be merged.
    """
    if lora is None:
        return
    if isinstance(lora, bool | str | Real) and not _is_rank(lora):
        raise RecipeError(
            f"lora={lora!r}: needed a rank of at least 1 (a whole number) or a peft.PeftConfig; "
            "None trains all weights."
        )
    if find_spec("peft") is None:
        raise RecipeError(
            f"lora={lora}: PEFT is not installed; install it with 'pip install peft', or omit lora "
            "(--recover-lora-rank) to train all weights."
        )
    if not _is_rank(lora):
        _check_config(lora)


def _is_rank(lora: Any) -> bool:
    return is_integer(lora) and bool(lora >= 1)


def _check_config(config: Any) -> None:
    from peft import PeftConfig  # noqa: PLC0415 - an optional package

    if not isinstance(config, PeftConfig):
        raise RecipeError(
            f"lora: is a {type(config).__name__}, needed a rank of at least 1 (a whole number) or "
            "a peft.PeftConfig; None trains all weights."
        )
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise RecipeError(
            f"lora: is a {type(config).__name__}, whose parameters cannot be merged into the "
            "model's weights; give a peft.LoraConfig, or a rank."
        )


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is one of PEFT's, with adapters of the caller's own."""
    if find_spec("peft") is None:
        return False
    from peft import PeftModel  # noqa: PLC0415 - an optional package

    return isinstance(model, PeftModel)


@contextmanager
def adapted(model: PreTrainedModel, lora: Any) -> Iterator[Any]:
    """`model` with adapters, which are merged at the end; without `lora`, `model` itself.

    After an exception the adapters are taken off and the weights are as they were.

    Args:
        model: The model; its own modules are back in their places afterwards, also those of which
            PEFT trains a copy (``modules_to_save``, and the head of most task types).
        lora: Rank, ``peft.PeftConfig``, or None.

    Raises:
        RecipeError: As for `check_lora`; or a copy would be trained of weights that another module
            has as well.
    """
    check_lora(lora)
    if lora is None:
        yield model
        return
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - an optional package

    config = lora
    if _is_rank(lora):
        targets = linear_paths(model)
        config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=targets)
    places = {module: dict(module.named_children()) for module in model.modules()}
    tied = _tied_modules(model)
    try:
        with peft_reads_an_old_name():
            wrapped = get_peft_model(model, config)
        _check_copies(wrapped, tied)
        yield wrapped
    except BaseException:
        _put_back(model, places)  # what is trained is in modules of PEFT's
        raise
    wrapped.merge_and_unload()
    for own, trained in _put_back(model, places):
        own.load_state_dict(trained)


def _put_back(model: nn.Module, places: Places) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Set every module back into its place; returns what stood there instead of the outermost."""
    replaced = []

    def visit(parent: nn.Module, *, is_inside: bool) -> None:
        for name, own in places[parent].items():
            found = parent.get_submodule(name)
            if found is not own:
                parent.set_submodule(name, own)
                if not is_inside:
                    replaced.append((own, found.state_dict()))
            visit(own, is_inside=is_inside or found is not own)

    visit(model, is_inside=False)
    return replaced


def _tied_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Modules with a parameter that another module holds as well, and the name of the first."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    holders: dict[nn.Parameter, list[nn.Module]] = {parameter: [] for parameter in names}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[parameter].append(module)
    return {
        module: names[parameter]
        for parameter, modules in holders.items()
        if len(modules) > 1
        for module in modules
    }


def _check_copies(wrapped: nn.Module, tied: Mapping[nn.Module, str]) -> None:
    """Check that no module of which PEFT trains a copy shares its weights with another."""
    from peft.utils import ModulesToSaveWrapper  # noqa: PLC0415 - an optional package

    for path, module in wrapped.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for part in module.original_module.modules():
                if part in tied:
                    raise RecipeError(
                        f"lora: modules_to_save copies {path}, whose weight is also that of "
                        f"{tied[part]}, so that the two would part; omit it there, or omit lora "
                        "to train all weights."
                    )


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
