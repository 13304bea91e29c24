"""Batches of types whose forward takes what no signature tells: one function each, in `SPECIAL`."""

from __future__ import annotations

from typing import Any

import torch
from sizes import BATCH, TARGETS, TOKENS
from tiny_configs import value_of

Batch = dict[str, Any]


def _without_cache(model: Any, batch: Batch, draw: Any) -> Batch:
    return {**batch, "use_cache": False}


def _perceiver(model: Any, batch: Batch, draw: Any) -> Batch:
    ids = draw.ids(model.config.vocab_size, BATCH, model.config.max_position_embeddings)
    return {"inputs": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _own_targets(model: Any, batch: Batch, draw: Any) -> Batch:
    return {**batch, "decoder_input_ids": batch["labels"].clone()}


def _spectrogram(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    return {**batch, "input_values": draw.normal(BATCH, config.max_length, config.num_mel_bins)}


def _image_tokens(model: Any, batch: Batch, draw: Any) -> Batch:
    return {"input_ids": draw.ids(model.config.vocab_size, BATCH, 16)}


def _size(config: Any) -> tuple[int, int]:
    parts = (config, value_of(config, "vision_config"), value_of(config, "backbone_config"))
    for part in parts:
        for name in ("image_size", "img_size", "input_size"):
            found = value_of(part, name)
            if isinstance(found, list | tuple):
                return found[-2], found[-1]
            if isinstance(found, int):
                return found, found
    return 32, 32


def _with_pixels(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    vision = value_of(config, "vision_config") or config
    return {
        **batch,
        "pixel_values": draw.normal(BATCH, value_of(vision, "num_channels") or 3, *_size(config)),
    }


def _with_frames(model: Any, batch: Batch, draw: Any) -> Batch:
    frames = model.config.vision_config.num_frames
    return {**batch, "pixel_values": draw.normal(BATCH, frames, 3, *_size(model.config))}


def _lxmert(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    return {
        **batch,
        "visual_feats": draw.normal(BATCH, 5, config.visual_feat_dim),
        "visual_pos": draw.uniform(BATCH, 5, config.visual_pos_dim),
    }


def _patches(model: Any, batch: Batch, draw: Any) -> Batch:
    vision = value_of(model.config, "vision_config") or model.config
    made = {
        "pixel_values": draw.normal(BATCH, 16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
    }
    classifies = type(model).__name__.endswith("ImageClassification")
    return {**made, "labels": torch.tensor([0, 1])} if classifies else made


def _series(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    past, future, known = (
        config.context_length + max(config.lags_sequence),
        config.prediction_length,
        config.num_time_features,
    )
    has_classes = config.num_static_categorical_features
    return {
        "past_values": draw.normal(BATCH, past),
        "past_time_features": draw.normal(BATCH, past, known),
        "past_observed_mask": torch.ones(BATCH, past),
        "static_categorical_features": (
            torch.zeros(BATCH, 1, dtype=torch.long) if has_classes else None
        ),
        "future_values": draw.normal(BATCH, future),
        "future_time_features": draw.normal(BATCH, future, known),
    }


def _channels_of_series(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    return {"past_values": draw.normal(BATCH, config.context_length, config.num_input_channels)}


def _padded_series(model: Any, batch: Batch, draw: Any) -> Batch:
    length = model.config.context_length
    return {
        "past_values": draw.normal(BATCH, length),
        "past_values_padding": torch.zeros(BATCH, length),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    }


def _list_of_series(model: Any, batch: Batch, draw: Any) -> Batch:
    return {"past_values": [draw.normal(model.config.context_length) for _ in range(BATCH)]}


def _decisions(model: Any, batch: Batch, draw: Any) -> Batch:
    config, steps = model.config, 5
    return {
        "states": draw.normal(BATCH, steps, config.state_dim),
        "actions": draw.normal(BATCH, steps, config.act_dim),
        "rewards": draw.normal(BATCH, steps, 1),
        "returns_to_go": draw.normal(BATCH, steps, 1),
        "timesteps": torch.arange(steps)[None].repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, steps),
    }


def _placed_patches(model: Any, batch: Batch, draw: Any) -> Batch:
    """Patches of 16 pixels behind their row and column, which count from 1."""
    patches = draw.normal(BATCH, 16, 2 + 3 * 16 * 16)
    patches[..., 0] = torch.arange(16) // 4 + 1
    patches[..., 1] = torch.arange(16) % 4 + 1
    labels = batch.get("labels")
    return {
        "flattened_patches": patches,
        "attention_mask": torch.ones(BATCH, 16),
        "labels": draw.ids(100, BATCH, TARGETS) if labels is None else labels,
    }


def _picture_to_text(model: Any, batch: Batch, draw: Any) -> Batch:
    labels = draw.ids(model.config.decoder.vocab_size, BATCH, TARGETS)
    size = model.config.encoder.image_size
    return {"pixel_values": draw.normal(BATCH, 3, size, size), "labels": labels}


def _sound_to_text(model: Any, batch: Batch, draw: Any) -> Batch:
    labels = draw.ids(model.config.decoder.vocab_size, BATCH, TARGETS)
    return {"input_values": draw.normal(BATCH, 2000), "labels": labels}


def _codebooks(model: Any, batch: Batch, draw: Any) -> Batch:
    rows = BATCH * model.config.decoder.num_codebooks
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "decoder_input_ids": draw.integers(0, 30, rows, 6),
    }


def _kosmos(model: Any, batch: Batch, draw: Any) -> Batch:
    size = model.config.vision_config.image_size
    places = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    places[:, : model.config.latent_query_num] = True
    pixels = draw.normal(BATCH, 3, size, size)
    return {**batch, "pixel_values": pixels, "image_embeds_position_mask": places}


def _one_channel(model: Any, batch: Batch, draw: Any) -> Batch:
    return {"input_values": draw.normal(BATCH, 1, 1920)}


def _small_boxes(model: Any, batch: Batch, draw: Any) -> Batch:
    return {**batch, "bbox": batch["bbox"].float() / 100}


def _idefics(model: Any, batch: Batch, draw: Any) -> Batch:
    size = model.config.vision_config.image_size
    return {
        **batch,
        "pixel_values": draw.normal(BATCH, 1, 3, size, size),
        "image_attention_mask": torch.ones(BATCH, TOKENS, 1, dtype=torch.long),
    }


def _queries(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    return {
        "query_embeds": draw.normal(BATCH, 8, config.hidden_size),
        "encoder_hidden_states": draw.normal(BATCH, 6, config.encoder_hidden_size),
    }


def _gemma_vision(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    values = (value_of(config, "num_channels") or 3) * config.patch_size**2
    places = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], -1)
    pixels = draw.uniform(BATCH, 16, values)
    return {"pixel_values": pixels, "pixel_position_ids": places[None].repeat(BATCH, 1, 1)}


def _long_features(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    features = draw.normal(BATCH, 40, config.feature_projection_input_dim)
    if config.model_type == "wav2vec2-bert":
        return {"input_features": features, "labels": torch.tensor([0, 1])}
    labels = draw.ids(config.vocab_size, BATCH, TARGETS)
    return {"input_features": features, "labels": labels}


def _text_only(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    ids = draw.ids(config.get_text_config().vocab_size, BATCH, TOKENS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _mask_of_frames(model: Any, batch: Batch, draw: Any) -> Batch:
    mask = torch.ones(batch["input_features"].shape[:2], dtype=torch.bool)
    return {**batch, "attention_mask": mask}


def _long_mask(model: Any, batch: Batch, draw: Any) -> Batch:
    frames = batch["input_features"].shape[-1]
    return {**batch, "input_features_mask": torch.ones(BATCH, frames, dtype=torch.long)}


def _reformer(model: Any, batch: Batch, draw: Any) -> Batch:
    model.train()  # its backward works in no other mode
    return batch


def _dialogue(model: Any, batch: Batch, draw: Any) -> Batch:
    channels = model.config.decoder_config.num_channels
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": draw.integers(0, 30, BATCH, 6, channels),
    }


def _blip(model: Any, batch: Batch, draw: Any) -> Batch:
    config = model.config
    size, queries = config.vision_config.image_size, config.num_query_tokens
    image = torch.full((BATCH, queries), config.image_token_id)
    ids = torch.cat([image, batch["input_ids"]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": draw.normal(BATCH, 3, size, size),
        "labels": ids.clone(),
    }


def _instructed_blip(model: Any, batch: Batch, draw: Any) -> Batch:
    ids = batch["input_ids"]
    more = {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    return {**_blip(model, batch, draw), **more}


def _clap(model: Any, batch: Batch, draw: Any) -> Batch:
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "input_features": draw.normal(BATCH, 1, 64, 64),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    }


def _qwen_audio(model: Any, batch: Batch, draw: Any) -> Batch:
    frames = model.config.n_window * 2
    return {
        "input_features": draw.normal(BATCH, model.config.num_mel_bins, frames),
        "input_features_mask": torch.ones(BATCH, frames, dtype=torch.long),
    }


def _fun_audio(model: Any, batch: Batch, draw: Any) -> Batch:
    features = draw.normal(BATCH, 20, 560)
    return {
        "input_features": features,
        "input_features_mask": torch.ones(BATCH, 20, dtype=torch.long),
    }


def _packed_patches(model: Any, batch: Batch, draw: Any) -> Batch:
    size = model.config.patch_size
    return {**batch, "pixel_values": draw.normal(16, 3, size, size)}


def _merge_sizes(model: Any, batch: Batch, draw: Any) -> Batch:
    return {**batch, "merge_sizes": torch.tensor([1])}


def _two_frames(model: Any, batch: Batch, draw: Any) -> Batch:
    key = next(iter(batch))
    return {**batch, key: draw.normal(16, batch[key].shape[1] * 2)}


def _half_images(model: Any, batch: Batch, draw: Any) -> Batch:
    height, width = model.config.image_size
    shape = (BATCH, 3, height // 2, width)
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: draw.normal(*shape) for name in names}


def _pair_of_images(model: Any, batch: Batch, draw: Any) -> Batch:
    return {"pixel_values": draw.normal(1, 2, 3, 64, 64)}


def _gemma_audio(model: Any, batch: Batch, draw: Any) -> Batch:
    features = draw.normal(BATCH, 64, 128)
    return {
        "input_features": features,
        "input_features_mask": torch.ones(BATCH, 64, dtype=torch.bool),
    }


def _bins_first(model: Any, batch: Batch, draw: Any) -> Batch:
    return {**batch, "input_features": draw.normal(BATCH, model.config.num_mel_bins, 64)}


def _granite_audio(model: Any, batch: Batch, draw: Any) -> Batch:
    size = next(
        parameter.shape[1]
        for name, parameter in model.named_parameters()
        if name.endswith("input_linear.weight")
    )
    return {**batch, "input_features": draw.normal(BATCH, 40, size)}


SPECIAL = {
    "align": _with_pixels,
    "altclip": _with_pixels,
    "audio-spectrogram-transformer": _spectrogram,
    "audioflamingo3": _text_only,
    "audioflamingo3_encoder": _long_mask,
    "autoformer": _series,
    "blip": _with_pixels,
    "blip-2": _blip,
    "blip_2_qformer": _queries,
    "bridgetower": _with_pixels,
    "chinese_clip": _with_pixels,
    "clap": _clap,
    "clip": _with_pixels,
    "dac": _one_channel,
    "decision_transformer": _decisions,
    "dia": _dialogue,
    "encodec": _one_channel,
    "flava": _with_pixels,
    "fsmt": _own_targets,
    "fun_asr_nano": _text_only,
    "fun_asr_nano_encoder": _fun_audio,
    "gemma4_audio": _gemma_audio,
    "gemma4_vision": _gemma_vision,
    "git": _with_pixels,
    "glmasr": _text_only,
    "glmasr_encoder": _bins_first,
    "granite_speech": _text_only,
    "granite_speech5_ctc": _granite_audio,
    "granite_speech5_encoder": _granite_audio,
    "granite_speech_plus": _text_only,
    "grounding-dino": _with_pixels,
    "groupvit": _with_pixels,
    "idefics": _idefics,
    "imagegpt": _image_tokens,
    "informer": _series,
    "instructblip": _instructed_blip,
    "kimi_k25_vision": _packed_patches,
    "kosmos-2": _kosmos,
    "lasr_ctc": _mask_of_frames,
    "layoutlmv3": _with_pixels,
    "lightglue": _pair_of_images,
    "lxmert": _lxmert,
    "mimi": _one_channel,
    "mimi_encoder": _one_channel,
    "mm-grounding-dino": _with_pixels,
    "moss_transcribe_diarize": _text_only,
    "muse_glimmer_vision": _two_frames,
    "muse_spark_vision": _two_frames,
    "musicflamingo": _text_only,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "nemo_speechlm": _text_only,
    "nemotron3_5_asr": _mask_of_frames,
    "nemotron_asr_streaming": _mask_of_frames,
    "nemotron_asr_streaming_encoder": _mask_of_frames,
    "owlvit": _with_pixels,
    "parakeet_ctc": _mask_of_frames,
    "patchtsmixer": _channels_of_series,
    "patchtst": _channels_of_series,
    "pe_audio_encoder": _one_channel,
    "perceiver": _perceiver,
    "pix2struct": _placed_patches,
    "qwen2_audio": _text_only,
    "qwen3_asr": _text_only,
    "qwen3_asr_encoder": _qwen_audio,
    "reformer": _reformer,
    "rwkv": _without_cache,
    "seamless_m4t": _long_features,
    "seamless_m4t_v2": _long_features,
    "seggpt": _half_images,
    "siglip2": _patches,
    "siglip2_vision_model": _patches,
    "speech-encoder-decoder": _sound_to_text,
    "superglue": _pair_of_images,
    "time_series_transformer": _series,
    "timesfm": _padded_series,
    "timesfm2_5": _list_of_series,
    "tvp": _with_pixels,
    "udop": _small_boxes,
    "video_llama_3_vision": _merge_sizes,
    "videoprism": _with_pixels,
    "vilt": _with_pixels,
    "vision-encoder-decoder": _picture_to_text,
    "voxtral": _text_only,
    "voxtral_realtime_encoder": _bins_first,
    "wav2vec2-bert": _long_features,
    "xclip": _with_frames,
    "xcodec": _one_channel,
}
"""What changes the batch of a type that `tiny_inputs` made by the signature."""
