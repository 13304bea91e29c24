"""Prune a Whisper with `GradNASPruner`: heads and neurons of encoder and decoder.

    python examples/speech_recognition.py --model my-whisper --data speech.jsonl

The file has one object per line: ``audio``, the path of a WAV file of 16 bits, and ``text``. With
``--hub`` instead of ``--data``, a few sentences of LibriSpeech are loaded from the Hub.
"""

from __future__ import annotations

import argparse
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from hf_gradnas import GradNASPruner

IGNORED = -100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="openai/whisper-tiny.en")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="jsonl file with audio and text")
    source.add_argument("--hub", action="store_true", help="a small part of LibriSpeech")
    parser.add_argument("--output", default="whisper-pruned")
    parser.add_argument("--params", default="80%", help="share of the parameters that is kept")
    parser.add_argument("--batch-size", type=int, default=4)
    return parser.parse_args()


def load_speech(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs of samples, at the rate of the files, and text."""
    if args.hub:
        name = "hf-internal-testing/librispeech_asr_dummy"
        data = load_dataset(name, "clean", split="validation")
        return [{"samples": row["audio"]["array"], "text": row["text"]} for row in data]
    lines = Path(args.data).read_text(encoding="utf-8").splitlines()
    return [
        {"samples": read_wav(row["audio"]), "text": row["text"]} for row in map(json.loads, lines)
    ]


def read_wav(file: str) -> np.ndarray:
    with wave.open(file) as opened:
        frames = opened.readframes(opened.getnframes())
    return np.frombuffer(frames, dtype=np.int16).astype(np.float32) / 2**15


def main() -> None:
    args = parse_arguments()
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(args.model).eval()
    rate = processor.feature_extractor.sampling_rate

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        samples = [row["samples"] for row in rows]
        features = processor.feature_extractor(samples, sampling_rate=rate, return_tensors="pt")
        tokens = processor.tokenizer([row["text"] for row in rows])["input_ids"]
        labels = [torch.tensor(ids) for ids in tokens]
        padded = torch.nn.utils.rnn.pad_sequence(labels, True, IGNORED)
        return {"input_features": features["input_features"], "labels": padded}

    loader = DataLoader(load_speech(args), batch_size=args.batch_size, collate_fn=collate)
    pruner = GradNASPruner(model)
    plan = pruner.prune(loader, {"params": args.params})
    folder = pruner.save_pretrained(args.output, processor)
    kept = plan.costs["params"] / pruner.totals["params"]
    print(f"{kept:.1%} of the parameters are kept; saved in {folder}")


if __name__ == "__main__":
    main()
