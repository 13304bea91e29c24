"""A batch of random input for a model, made of what its config and its processor say.

Structure and costs depend on the sizes of an input, not on its values.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.reference import special_tokens
from ..errors import RecipeError
from .loading import Source
from .tasks import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES = 2
_SECONDS = 1


def random_batch(
    source: Source, model: PreTrainedModel, *, max_length: int, seed: int = 0
) -> dict[str, Any]:
    """Two examples of random tokens, pixels or noise, as the model's forward takes them.

    Args:
        source: Config, processor and task of the model.
        model: The model.
        max_length: Tokens per example, of a decoder's labels too.
        seed: Of what is drawn.

    Raises:
        RecipeError: The model takes images or audio, and nothing says of which size.
    """
    draw = np.random.default_rng(seed)
    makers = {"text": _text, "image": _image, "audio": _audio}
    batch = makers[source.input](source, max_length, draw)
    if source.input == "text":
        _prepare_for_head(source, model, batch["input_ids"])
    if source.config.is_encoder_decoder:
        ids = _tokens(source, max_length, draw, decoder=True)
        if source.task.head is Head.SEQ2SEQ:
            batch["labels"] = ids
        elif source.task.head is Head.BASE:
            batch["decoder_input_ids"] = ids
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in names}


def _prepare_for_head(source: Source, model: PreTrainedModel, ids: Tensor) -> None:
    """Give a head that classifies what it looks for: the end, or where the padding begins."""
    config = model.config.get_text_config()
    if source.task.head is not Head.CLASS:
        return
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = 0 if end is None else end
    if end is not None and end < config.vocab_size:
        ids[:, -1] = end


def _text(source: Source, max_length: int, draw: np.random.Generator) -> dict[str, Any]:
    ids = _tokens(source, max_length, draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tokens(
    source: Source, length: int, draw: np.random.Generator, *, decoder: bool = False
) -> Tensor:
    """Token ids of shape (examples, length), none of them special."""
    size = int(source.config.get_text_config(decoder=decoder).vocab_size)
    special = special_tokens(source.config)
    if source.tokenizer is not None:
        special |= set(source.tokenizer.all_special_ids)
    plain = [token for token in range(size) if token not in special]
    if len(plain) < size // 2:  # a tokenizer that came without a vocabulary knows little else
        plain = list(range(size))
    return torch.from_numpy(draw.choice(plain, (EXAMPLES, length)))


def _image(source: Source, _: int, draw: np.random.Generator) -> dict[str, Any]:
    if source.processor is not None:
        pixels = draw.integers(0, 256, (EXAMPLES, 256, 256, 3), dtype=np.uint8)
        return dict(source.processor(images=list(pixels), return_tensors="pt"))
    config = source.config.to_dict()
    size, channels = config.get("image_size"), config.get("num_channels", 3)
    if not size:
        raise _no_size(source, "image processor")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (EXAMPLES, channels, height, width)
    return {"pixel_values": torch.from_numpy(draw.standard_normal(shape)).float()}


def _audio(source: Source, _: int, draw: np.random.Generator) -> dict[str, Any]:
    if source.processor is None:
        raise _no_size(source, "feature extractor")
    extractor = source.processor
    if source.tokenizer is not None:
        extractor = source.processor.feature_extractor
    rate = extractor.sampling_rate
    noise = draw.standard_normal((EXAMPLES, _SECONDS * rate)).astype(np.float32)
    return dict(extractor(list(0.1 * noise), sampling_rate=rate, return_tensors="pt"))


def _no_size(source: Source, what: str) -> RecipeError:
    return RecipeError(
        f"--model: {source.cls.__name__} takes {source.input}, but the folder has no {what} that "
        "says of which size; save one beside the model with save_pretrained(folder)."
    )
