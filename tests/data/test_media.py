"""Images and audio through the model's own processor."""

import numpy as np
import pytest
import transformers as tf
from cli_cases import save_vit, save_whisper, write_images, write_wave
from datasets import Dataset
from PIL import Image

from hf_gradnas.config.recipe import Recipe
from hf_gradnas.data.columns import Columns
from hf_gradnas.data.examples import Feed
from hf_gradnas.data.files import Rows
from hf_gradnas.data.loading import open_source
from hf_gradnas.data.media import encode_audio, encode_image, read_wave
from hf_gradnas.errors import DataError


def _feed(folder, data, columns, **options):
    rows = Rows(Dataset.from_dict(data), "data", folder=folder)
    source = open_source(Recipe(model="m"), str(folder))
    return Feed(rows, columns, source, 12, labelled=True, **options)


def test_images_are_read_from_paths_and_labelled(tmp_path):
    save_vit(tmp_path)
    write_images(tmp_path / "x", 1)
    data = {"file": ["x/cat/0.png", "x/dog/0.png"], "label": [1, 0]}
    examples = encode_image(_feed(tmp_path, data, Columns(image="file", label="label")))
    pixels = tf.AutoImageProcessor.from_pretrained(tmp_path)(
        Image.open(tmp_path / "x/cat/0.png"), return_tensors="pt"
    )["pixel_values"][0]
    assert examples[0]["pixel_values"].equal(pixels)
    assert [example["labels"] for example in examples] == [1, 0]


def test_bad_images_are_refused(tmp_path):
    save_vit(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    feed = _feed(tmp_path, {"file": ["bad.png"]}, Columns(image="file"))
    with pytest.raises(DataError, match="the image of row 0 cannot be opened"):
        encode_image(feed)[0]
    feed = _feed(tmp_path, {"file": [3]}, Columns(image="file"))
    with pytest.raises(DataError, match="holds int in row 0, needed an image"):
        encode_image(feed)[0]


def test_speech_has_its_transcript_as_labels(tmp_path):
    save_whisper(tmp_path)
    write_wave(tmp_path / "a.wav")
    sine = np.sin(np.arange(1600) / 10)
    data = {
        "audio": [{"path": "a.wav", "bytes": None}],
        "text": ["good film"],
    }
    (example,) = encode_audio(_feed(tmp_path, data, Columns(audio="audio", target="text")))
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    assert example["labels"] == tokenizer("good film")["input_ids"]
    assert example["input_features"].shape == (8, 100)
    data["audio"] = [{"array": sine.tolist(), "sampling_rate": 16000}]
    (example,) = encode_audio(_feed(tmp_path, data, Columns(audio="audio", target="text")))
    assert example["input_features"].shape == (8, 100)


def test_the_decoders_start_token_is_left_to_the_model(tmp_path):
    save_whisper(tmp_path)
    write_wave(tmp_path / "a.wav")
    data = {"audio": ["a.wav"], "text": ["<s> good"]}
    (example,) = encode_audio(_feed(tmp_path, data, Columns(audio="audio", target="text")))
    assert len(example["labels"]) == 1


def test_a_wave_is_resampled(tmp_path):
    data = write_wave(tmp_path / "a.wav", rate=8000, hertz=1000).read_bytes()
    samples = read_wave(data, 16000)
    times = np.arange(1600) / 16000
    expected = np.sin(2 * np.pi * 1000 * times) * 16000 / 2**15
    np.testing.assert_allclose(samples, expected, atol=1e-3)


def test_bad_audio_is_refused(tmp_path):
    save_whisper(tmp_path)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    feed = _feed(tmp_path, {"audio": ["bad.wav"]}, Columns(audio="audio"))
    with pytest.raises(DataError, match="the audio of row 0 cannot be read"):
        encode_audio(feed)[0]
    with pytest.raises(ValueError, match="24 bits per sample"):
        read_wave(_wave_of_24_bits(tmp_path), 16000)


def _wave_of_24_bits(folder):
    import wave

    with wave.open(str(folder / "b.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(3)
        out.setframerate(16000)
        out.writeframes(b"\0" * 30)
    return (folder / "b.wav").read_bytes()
