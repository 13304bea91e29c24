"""Compares what a model computes with what its twin does, and says where they are different.

Hooks, replaced activations, a changed epsilon: none of them is in a checkpoint, and none can be
judged by looking at it. What counts is whether the outputs differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batches.batch import to_device
from ..batches.short import probe_inputs
from ..errors import StructureError, described
from .outputs import allowed_difference, largest_difference, outputs_of

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
