"""What a checkpoint says of itself: outputs to be had again.

They are in ``gradnas.json`` (the output's root holds no safetensors but the weights, and a pushed
copy stays one folder of few files). No calibration data is among them: of the pruner's sample only
names, shapes, masks and special tokens are kept, the rest is drawn at random.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_labels

from ..errors import CheckpointError, GradNASWarning
from ..surgery.modeling_gradnas import auto_class_name
from .apply import largest_difference
from .replay import decode, encode, encode_uniform, run

DIGESTED = (".safetensors", ".py")
"""Suffixes of files that decide what the model computes, and that nobody edits by hand."""
SEED = 0
# Of outputs run again, relative to max(1, largest output). A checkpoint that loads wrongly differs
# by much more; other machines and kernels add up in another order.
TOLERANCES = {"float64": 1e-8, "float32": 1e-4}
ACROSS_DEVICES = 10
"""By how much more float32 and float64 may differ on another kind of device (TF32 among them)."""
HALF_STEPS = 8
"""The same for 16-bit and smaller types, in steps of the type at 1."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One forward of a saved checkpoint, ready for JSON.

    Attributes:
        model_class: Name of the class that it was loaded with.
        auto_class: Auto class that builds this class, or None.
        dtype: Of its weights, e.g. ``"float32"``.
        device: Kind of device that it ran on.
        attention: Its attention kernel.
        inputs: Encoded inputs by name (`replay.encode`); None where there are none.
        output: What `replay.run` made of them; None where there is none.
    """

    model_class: str
    auto_class: str | None
    dtype: str
    device: str
    attention: str
    inputs: Mapping[str, Any] | None
    output: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Reference:
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: The dictionary is no reference.
        """
        try:
            reference = cls(**data)
            texts = (reference.model_class, reference.dtype, reference.device, reference.attention)
            if not all(isinstance(text, str) for text in (*texts, reference.auto_class or "")):
                raise TypeError(f"a name is no text: {data!r:.80}")
            if not isinstance(getattr(torch, reference.dtype, None), torch.dtype):
                raise TypeError(f"dtype is {reference.dtype!r}")
            if reference.output is not None:
                _check_output(reference.output)
            if reference.output is not None and reference.inputs is not None:
                decode(reference.output["values"])
                for spec in reference.inputs.values():
                    decode(spec)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"gradnas.json: its reference cannot be read ({error}); it was changed, or comes "
                "from a newer hf_gradnas. Save the checkpoint again, or upgrade."
            ) from error
        return reference


def _check_output(output: Mapping[str, Any]) -> None:
    """Check that an output is what `replay.run` made.

    Raises:
        TypeError: It is not.
    """
    largest = output["largest"]
    is_amount = isinstance(largest, int | float) and not isinstance(largest, bool)
    if not isinstance(output["name"], str) or not isinstance(output["shape"], list):
        raise TypeError(f"output is {output!r:.80}")
    if not is_amount or not 0 <= largest < math.inf:
        raise TypeError(f"the largest output is {largest!r}")


# --- outputs --------------------------------------------------------------------------------------


def make_reference(reloaded: PreTrainedModel, sample: Mapping[str, Any] | None) -> Reference:
    """Run a reloaded checkpoint once, on inputs like `sample`.

    A model that cannot run such inputs, or a sample that JSON cannot hold, gives a warning and a
    reference without outputs.

    Args:
        reloaded: The model as ``from_pretrained`` gives it, in eval mode.
        sample: Batch for ``model(**sample)``; None: outputs are not kept.
    """
    inputs = output = None
    if sample is not None:
        try:
            inputs = reference_inputs(sample, reloaded)
            output = run(reloaded, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            warnings.warn(
                f"{type(reloaded).__name__}: no reference outputs are kept, as it cannot run "
                f"random inputs like the sample ({error}); hf-gradnas verify will check the "
                "weight files and that they load.",
                GradNASWarning,
                stacklevel=2,
            )
            inputs = None
    stock = vars(type(reloaded)).get("_gradnas_stock_class", type(reloaded))
    return Reference(
        model_class=stock.__name__,
        auto_class=auto_class_name(stock),
        dtype=str(reloaded.dtype).removeprefix("torch."),
        device=reloaded.device.type,
        attention=reloaded.config._attn_implementation,
        inputs=inputs,
        output=output,
    )


def reference_inputs(sample: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Encoded inputs like `sample`, with other tokens and other numbers.

    Tokens that the config names (end, padding, image) stay in their places, as forwards look for
    them; the others are drawn below the largest one of the sample. Labels are left out, but for
    those that a decoder takes its tokens from.

    Raises:
        TypeError: The sample holds what JSON cannot.
    """
    draw = np.random.RandomState(SEED)
    special = torch.tensor(sorted(special_tokens(model.config)), dtype=torch.long)
    labels = set(find_labels(type(model)))
    if model.config.is_encoder_decoder and "decoder_input_ids" not in sample:
        labels.discard("labels")
    inputs: dict[str, Any] = {}
    for name, value in sample.items():
        if name in labels:
            continue
        if not isinstance(value, Tensor):
            if not isinstance(value, bool | int | float | str | None):
                raise TypeError(f"{name} is a {type(value).__name__}")
            inputs[name] = {"value": value}
        elif value.is_floating_point():
            inputs[name] = encode_uniform(tuple(value.shape), SEED)
        elif name.endswith("input_ids") or (name == "labels" and value.ndim > 1):
            inputs[name] = encode(_redrawn(value.cpu(), special, draw))
        else:
            inputs[name] = encode(value)
    return inputs


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """Ids of all tokens that a config names, those of its sub-configs too."""
    return set(_named_tokens(config.to_dict()))


def _named_tokens(values: Mapping[Any, Any]) -> Iterator[int]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _named_tokens(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            ids = value if isinstance(value, list) else [value]
            yield from (token for token in ids if isinstance(token, int))


def _redrawn(ids: Tensor, special: Tensor, draw: np.random.RandomState) -> Tensor:
    """Token ids of the same shape, none of which tells what stood there."""
    allowed = torch.arange(int(ids.max()) + 1)
    allowed = allowed[~torch.isin(allowed, special)]
    if not len(allowed):
        return ids
    drawn = allowed[torch.from_numpy(draw.randint(0, len(allowed), tuple(ids.shape)))]
    stays = torch.isin(ids, special) | (ids < 0)  # labels that no loss counts are negative
    return torch.where(stays, ids, drawn.to(ids.dtype))


def output_limit(reference: Reference, device: str) -> float:
    """Largest difference from the reference outputs that is accepted on a kind of device."""
    scale = max(1.0, (reference.output or {}).get("largest", 0.0))
    tolerance = TOLERANCES.get(reference.dtype)
    if tolerance is None:
        return scale * HALF_STEPS * torch.finfo(getattr(torch, reference.dtype)).eps
    return scale * tolerance * (1 if device == reference.device else ACROSS_DEVICES)


def output_difference(wanted: Mapping[str, Any], found: Mapping[str, Any] | None) -> float:
    """Largest difference of two outputs of `replay.run`; nan if they cannot be compared."""
    if found is None or list(found["shape"]) != list(wanted["shape"]):
        return float("nan")
    before, after = (decode(output["values"]) for output in (wanted, found))
    if before.shape != after.shape:
        return float("nan")
    return largest_difference(after, before)
