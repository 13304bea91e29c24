"""Time of discovery with proof, beside a plain forward of the same model.

    python examples/benchmarks/structure.py bert llama whisper

The models have random weights: BERT-base, a Llama of 1.1 billion parameters (22 layers), and
Whisper-small (12 + 12 layers, 30 seconds of sound). CPU seconds of one thread, the median of
`--rounds`; the ratio is to the forward of the batch that the model is discovered with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_gradnas.verification import find_structure


def bert() -> tuple[nn.Module, dict[str, Any]]:
    """BERT-base and eight sentences of 64 tokens."""
    batch = {"input_ids": torch.randint(0, 30000, (8, 64)), "attention_mask": torch.ones(8, 64)}
    return BertForSequenceClassification(BertConfig()), batch


def llama() -> tuple[nn.Module, dict[str, Any]]:
    """A Llama of 22 layers with grouped queries and two sequences of 64 tokens."""
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=5632,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 32000, (2, 64))}


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    """Whisper-small, 30 seconds of sound and eight tokens."""
    config = WhisperConfig(
        d_model=768,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    )
    ids = torch.randint(0, 50000, (1, 8))
    return WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(1, 80, 3000),
        "decoder_input_ids": ids,
    }


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "bert": bert,
    "llama": llama,
    "whisper": whisper,
}


def cpu_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median CPU time of a call."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    """Measure each model, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "axes", "discovery and proof", "forward", "ratio")
    for name in args.models:
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        model.eval()
        with torch.no_grad():
            forward = cpu_seconds(lambda m=model, b=batch: m(**b), args.rounds)
        axes = len(find_structure(model, batch).axes)
        took = cpu_seconds(lambda m=model, b=batch: find_structure(m, b), args.rounds)
        cells = (f"{took:.2f} s", f"{forward:.2f} s", f"{took / forward:.1f}")
        table.add_row(name, str(axes), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
