"""Encoders of images and audio, through the model's own processor."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .examples import Example, Examples, Feed, limited, row_getter
from .labels import Labels, class_labels

_WIDTHS = {1: np.uint8, 2: np.int16, 4: np.int32}


def encode_image(feed: Feed) -> Examples:
    """Pixels, with a label per image if the data has it."""
    column = feed.columns.image or ""
    labels, count = _labels(feed)
    row = row_getter(feed, [column])

    def encode(index: int) -> Example:
        image = _open_image(row(index)[column], feed, index)
        encoded = feed.source.processor(images=image, return_tensors="pt")
        example: Example = {name: value[0] for name, value in encoded.items()}
        if labels is not None:
            example["labels"] = labels.values[index]
        return example

    return Examples(count, encode, *_read(labels))


def encode_audio(feed: Feed) -> Examples:
    """Input features, with the transcript's tokens or a class as the label."""
    column, target = feed.columns.audio or "", feed.columns.target
    labels, count = _labels(feed)
    dataset_row = row_getter(feed, [column, target])
    processor, tokenizer = feed.source.processor, feed.source.tokenizer
    extractor = processor if tokenizer is None else processor.feature_extractor
    start = feed.source.config.to_dict().get("decoder_start_token_id")

    def encode(index: int) -> Example:
        row = dataset_row(index)
        sound = _open_audio(row[column], extractor.sampling_rate, feed, index)
        encoded = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        example: Example = {name: value[0] for name, value in encoded.items()}
        if target is not None:
            ids = tokenizer(row[target], truncation=True, max_length=feed.max_length)["input_ids"]
            # The model puts the start token there itself when it shifts the labels.
            example["labels"] = ids[1:] if ids[:1] == [start] else ids
        if labels is not None:
            example["labels"] = labels.values[index]
        return example

    return Examples(count, encode, *_read(labels))


def read_wave(data: bytes, rate: int) -> np.ndarray:
    """Samples of a WAV file as float32 in [-1, 1], one channel, at `rate` per second.

    Raises:
        ValueError: Not a WAV file of 8, 16 or 32 bits.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(str(error)) from error
    if width not in _WIDTHS:
        raise ValueError(f"{8 * width} bits per sample")
    samples = np.frombuffer(frames, dtype=_WIDTHS[width]).astype(np.float32)
    scaled = samples / 128 - 1 if width == 1 else samples / float(2 ** (8 * width - 1))
    return _resampled(scaled.reshape(-1, channels).mean(axis=1), found, rate)


def _resampled(samples: np.ndarray, found: int, rate: int) -> np.ndarray:
    """Band-limited resampling: the spectrum is cut or padded with zeros."""
    from scipy.signal import resample

    if found == rate or not len(samples):
        return samples
    return resample(samples, round(len(samples) * rate / found)).astype(np.float32)


def _read(labels: Labels | None) -> tuple[str | None, Mapping[str, int]]:
    return (None, {}) if labels is None else (labels.note, labels.names)


def _labels(feed: Feed) -> tuple[Labels | None, int]:
    count = limited(feed, len(feed.rows.dataset))
    if not feed.labelled or feed.columns.label is None:
        return None, count
    labels = class_labels(
        feed.rows.dataset.select(range(count)),
        feed.columns.label,
        feed.source.config,
        origin=feed.rows.origin,
        label_map=feed.label_map,
    )
    return labels, count


def _open_image(value: Any, feed: Feed, index: int) -> Any:
    from PIL import Image

    try:
        if isinstance(value, str):
            value = Image.open(_path(value, feed))
        if isinstance(value, Image.Image):
            return value.convert("RGB")
    except OSError as error:
        raise DataError(
            f"{feed.rows.origin}: the image of row {index} cannot be opened ({error}); check "
            "--image-column, or remove the row."
        ) from error
    raise DataError(
        f"{feed.rows.origin}: column {feed.columns.image!r} holds {type(value).__name__} in row "
        f"{index}, needed an image or the path of one; check --image-column."
    )


def _open_audio(value: Any, rate: int, feed: Feed, index: int) -> np.ndarray:
    """Samples of one row: an array with its rate, or a file."""
    where = f"{feed.rows.origin}: the audio of row {index}"
    advice = "check --audio-column; give WAV files, or arrays as {'array', 'sampling_rate'}"
    try:
        if isinstance(value, dict) and "array" in value:
            samples = np.asarray(value["array"], dtype=np.float32)
            return _resampled(samples, int(value["sampling_rate"]), rate)
        if isinstance(value, dict):
            value = value["bytes"] or value["path"]
        data = value if isinstance(value, bytes) else _path(str(value), feed).read_bytes()
        return read_wave(data, rate)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{where} cannot be read as WAV ({error}); {advice}.") from error


def _path(value: str, feed: Feed) -> Path:
    path = Path(value)
    return path if path.is_absolute() or feed.rows.folder is None else feed.rows.folder / path
