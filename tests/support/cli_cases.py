"""Tiny checkpoints and data files for the tests of the command line, made from configs."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = "the a film book is was good bad dull fine very not and plot cast of new old long story"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", "<s>"]
SENTINELS = [f"<extra_id_{index}>" for index in range(4)]
VOCABULARY = 48


def word_tokenizer(*, pad: str | None = "[PAD]", pair: bool = True, **special: str):
    """A word tokenizer over `WORDS`; what `special` names is all it has beside the pad token."""
    words = [*SPECIAL, *SENTINELS, *WORDS.split()]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
    if pad is not None:
        special["pad_token"] = pad
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=10**30, **special
    )


BERT_TOKENS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def save_bert(folder: Path, cls: str = "BertForSequenceClassification", **config: object) -> Path:
    """A BERT of two layers with its tokenizer."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    _save(getattr(tf, cls), tf.BertConfig(**{**values, **config}), folder)
    word_tokenizer(**BERT_TOKENS).save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, pad: str | None = None, **config: object) -> Path:
    """A Llama of two layers with grouped queries; its tokenizer has no pad token."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "bos_token_id": 6,
        "eos_token_id": 5,
        "pad_token_id": None,
    }
    _save(tf.LlamaForCausalLM, tf.LlamaConfig(**{**values, **config}), folder)
    tokenizer = word_tokenizer(pad=pad, pair=False, eos_token="</s>", bos_token="<s>")
    tokenizer.save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """A T5 of two layers on each side, with sentinel tokens."""
    config = tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=5,
        decoder_start_token_id=0,
    )
    _save(tf.T5ForConditionalGeneration, config, folder)
    tokenizer = word_tokenizer(pair=False, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


def save_vit(folder: Path, cls: str = "ViTForImageClassification") -> Path:
    """A ViT of two layers on images of 16 x 16, with its processor."""
    config = tf.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=2,
    )
    _save(getattr(tf, cls), config, folder)
    size = {"height": 16, "width": 16}
    tf.ViTImageProcessorPil(size=size).save_pretrained(folder)
    try:
        tf.AutoImageProcessor.from_pretrained(folder)
    except ImportError:
        pytest.skip("this version of Transformers reads images with torchvision only")
    return folder


def save_whisper(folder: Path) -> Path:
    """A Whisper of one layer on each side that hears one second."""
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=6,
        eos_token_id=5,
        decoder_start_token_id=6,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    _save(tf.WhisperForConditionalGeneration, config, folder)
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    tokenizer = word_tokenizer(pair=False, eos_token="</s>", bos_token="<s>")
    tf.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def _save(cls: type[tf.PreTrainedModel], config: tf.PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)


def sentences(count: int) -> list[str]:
    """Sentences of 3 to 8 known words."""
    words = WORDS.split()
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(words, draw.integers(3, 9))) for _ in range(count)]


def write_tsv(file: Path, count: int = 24, *, header: str | None = None) -> Path:
    """Sentences with a label 0 or 1, without a header unless one is given."""
    lines = [f"{text}\t{index % 2}" for index, text in enumerate(sentences(count))]
    file.write_text("\n".join([*([header] if header else []), *lines]) + "\n", encoding="utf-8")
    return file


def write_text(file: Path, count: int = 60) -> Path:
    """Running text, a sentence a line."""
    file.write_text("\n".join(sentences(count)) + "\n", encoding="utf-8")
    return file


def write_jsonl(file: Path, records: list[dict[str, object]]) -> Path:
    """One object per line."""
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return file


def write_images(folder: Path, count: int = 4) -> Path:
    """One folder of images for each of two classes."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def write_wave(file: Path, *, rate: int = 16000, seconds: float = 0.1, hertz: float = 440) -> Path:
    """A sine of 16 bits on one channel."""
    times = np.arange(int(rate * seconds)) / rate
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.sin(2 * np.pi * hertz * times) * 16000).astype("<i2").tobytes())
    return file
