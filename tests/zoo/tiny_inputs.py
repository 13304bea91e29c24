"""A batch for every type: what its forward takes, drawn from a seed.

`of_model` reads the signature of the forward and the config; `SPECIAL` has what a type needs
besides.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sizes import BATCH, TARGETS, TOKENS, VOCABULARY
from special_inputs import SPECIAL
from tiny_configs import value_of
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Batch = dict[str, Any]
_CLASSIFIES = (
    "sequence_classification",
    "image_classification",
    "video_classification",
    "audio_classification",
)


class Draw:
    """Random tensors of one seed.

    Args:
        seed: The seed.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + 1)

    def normal(self, *shape: int) -> Tensor:
        """Normal values."""
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Values from 0 to 1."""
        return torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers below `high`."""
        return torch.randint(low, high, shape, generator=self.generator)

    def ids(self, vocabulary: int, *shape: int) -> Tensor:
        """Token ids, none of them special where there is room for others."""
        high = max(6, min(vocabulary, VOCABULARY) - 24) if vocabulary > 60 else vocabulary
        return self.integers(5 if high > 10 else 0, high, *shape)


def of_model(model: PreTrainedModel, name: str, task: str, seed: int = 0) -> Batch:
    """A batch for a model of type `name`."""
    draw, config = Draw(seed), model.config
    names = inspect.signature(model.forward).parameters
    batch = _tokens(config, names, task, draw)
    main = model.main_input_name
    answers = task in ("multimodal_lm", "speech_seq2seq", "causal_lm")
    is_text = "input_ids" in names and answers and not config.is_encoder_decoder
    if is_text:
        main = "input_ids"
    packed = "grid_thw" if "grid_thw" in names else "image_grid_thw"
    if "grid_thw" in names or ("image_grid_thw" in names and "input_ids" not in names):
        batch, main = _packed(config, names, packed, draw), ""
    elif _takes_pixels(model, names, task, main):
        batch["pixel_values"] = draw.normal(*_image(config, task))
    if main == "pixel_values_videos":
        frames = _first(config, "num_frames", "frames_per_clip") or 4
        shape = (BATCH, frames, _channels(config), *_height_width(config))
        batch = {"pixel_values_videos": draw.normal(*shape)}
    if main == "input_values" or (main and "input_values" in names and "input_ids" not in names):
        batch = _without_tokens(batch) | {"input_values": draw.normal(BATCH, 2000)}
    takes_features = "input_features" in names and "input_ids" not in names
    if main == "input_features" or (takes_features and "input_values" not in batch):
        batch = _without_tokens(batch) | _features(model, names, draw)
    if "decoder_input_ids" in names and ("labels" not in names or task == "base"):
        batch["decoder_input_ids"] = draw.ids(_vocabulary(config), BATCH, TARGETS)
    if "bbox" in names:
        boxes = draw.integers(0, 40, BATCH, TOKENS, 4)
        boxes[..., 2:] = boxes[..., :2] + 10
        batch["bbox"] = boxes
    if "labels" in names:
        batch |= _labels(config, batch, task, draw, is_text=is_text)
    return SPECIAL[name](model, batch, draw) if name in SPECIAL else batch


def _tokens(config: PreTrainedConfig, names: Any, task: str, draw: Draw) -> Batch:
    if "input_ids" not in names or task in ("image_classification", "audio_classification", "ctc"):
        return {}
    ids = draw.ids(_vocabulary(config), BATCH, TOKENS)
    return {"input_ids": ids} | (
        {"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {}
    )


def _without_tokens(batch: Batch) -> Batch:
    return {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}


def _takes_pixels(model: PreTrainedModel, names: Any, task: str, main: str) -> bool:
    """Whether the main input is an image, or one beside the text of a model that compares both."""
    compares = "logit_scale" in type(model).__init__.__code__.co_names
    return (
        main in ("pixel_values", "images")
        or ("pixel_values" in names and "input_ids" not in names)
        or (task == "base" and "pixel_values" in names and main == "input_ids" and compares)
    )


def _packed(config: PreTrainedConfig, names: Any, grid: str, draw: Draw) -> Batch:
    """Patches of one image of 4 x 4, all in one row."""
    known = [key for key in ("hidden_states", "pixel_values") if key in names]
    size = _first(config, "patch_size") or 8
    size = size if isinstance(size, int) else size[0]
    values = _channels(config) * size * size * (_first(config, "temporal_patch_size") or 1)
    key = known[0] if known else next(iter(names))
    return {key: draw.normal(16, values), grid: torch.tensor([[1, 4, 4]])}


def _features(model: PreTrainedModel, names: Any, draw: Draw) -> Batch:
    """Spectrograms, in the order of dimensions that the class has."""
    config = model.config
    keys = ("audio_config", "encoder_config", "encoder", "audio_encoder_config")
    audio = next(
        (v for k in keys if isinstance(v := value_of(config, k), PreTrainedConfig)), config
    )
    sizes = (
        "feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel", "n_mels",
        "input_dim", "feature_size",
    )  # fmt: skip
    bins = next(filter(None, (_first(part, *sizes) for part in (audio, config))), 80)
    frames = _first(audio, "max_source_positions")
    has_stem = any("conv1" in path for path, _ in model.named_modules())
    is_fixed = frames and not _first(config, "input_feat_per_channel") and has_stem
    shape = (BATCH, bins, 2 * frames) if is_fixed else (BATCH, 64, bins)
    batch = {"input_features": draw.normal(*shape)}
    for key in ("input_features_mask", "feature_attention_mask"):
        if key in names and names[key].default is inspect.Parameter.empty:
            batch[key] = torch.ones(BATCH, shape[2 if is_fixed else 1], dtype=torch.long)
    return batch


def _labels(
    config: PreTrainedConfig, batch: Batch, task: str, draw: Draw, *, is_text: bool
) -> Batch:
    if task in ("causal_lm", "masked_lm", "multimodal_lm") or is_text:
        return {"labels": batch["input_ids"].clone()} if "input_ids" in batch else {}
    if task in ("seq2seq_lm", "speech_seq2seq"):
        return {"labels": draw.ids(_vocabulary(config), BATCH, TARGETS)}
    if task == "ctc":
        return {"labels": draw.ids(_vocabulary(config), BATCH, 2)}
    if task in _CLASSIFIES:
        return {"labels": draw.integers(0, value_of(config, "num_labels") or 2, BATCH)}
    if task == "semantic_segmentation":
        return {"labels": draw.integers(0, 2, BATCH, *_height_width(config))}
    return {}


# --- what a config says of its inputs -------------------------------------------------------------


def _first(config: PreTrainedConfig, *names: str) -> Any:
    """The first of some values that the config has."""
    return next((v for name in names if (v := value_of(config, name)) is not None), None)


def _with_vision(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    names = (
        "vision_config", "backbone_config", "vision_encoder_config", "image_config", "vit_config",
        "encoder",
    )  # fmt: skip
    parts = [value_of(config, name) for name in names]
    return [config, *[part for part in parts if isinstance(part, PreTrainedConfig)][:1]]


def _height_width(config: PreTrainedConfig) -> tuple[int, int]:
    """Of an image."""
    for part in _with_vision(config):
        for name in ("image_size", "img_size", "input_image_size", "crop_size"):
            found = value_of(part, name)
            if isinstance(found, int) and found > 0:
                return found, found
            if isinstance(found, list | tuple) and len(found) >= 2:
                return int(found[-2]), int(found[-1])
            if isinstance(found, dict) and "height" in found:
                return found["height"], found["width"]
    return 32, 32


def _channels(config: PreTrainedConfig) -> int:
    """Of an image."""
    names = ("num_channels", "in_channels", "in_chans", "input_channels", "num_input_channels")
    for part in _with_vision(config):
        for name in names:
            if isinstance(found := value_of(part, name), int):
                return found
    return 3


def _image(config: PreTrainedConfig, task: str) -> tuple[int, ...]:
    frames = value_of(config, "num_frames")
    is_video = isinstance(frames, int) and task == "video_classification"
    shape = (_channels(config), *_height_width(config))
    return (BATCH, frames, *shape) if is_video else (BATCH, *shape)


def _vocabulary(config: PreTrainedConfig) -> int:
    names = ("text_config", "encoder", "decoder", "text_encoder")
    for part in (config, *(value_of(config, name) for name in names)):
        if isinstance(found := value_of(part, "vocab_size"), int):
            return found
    try:
        return int(config.get_text_config().vocab_size)
    except Exception:  # has no text, or several
        return VOCABULARY
