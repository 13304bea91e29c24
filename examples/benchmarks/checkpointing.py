"""What gradient checkpointing saves and costs while scoring.

Side by side in one run: scores of a decoder without it and with it. Memory is the largest sum of
tensors that are alive at once, beyond the parameters; time is that of all cores, in turn.

    python examples/benchmarks/checkpointing.py
    python examples/benchmarks/checkpointing.py --model DIRECTORY
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_gradnas.scores import collect_scores
from hf_gradnas.verification import find_structure

LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def peak_bytes(run: Any) -> int:
    """Largest sum of tensors that `run` has made and that are alive at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    live = peak = 0
    events = measured.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a causal language model; default: a Llama")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.model is None:
        model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    ids = torch.randint(3, model.config.vocab_size, (arguments.batch, arguments.length))
    batch = {"input_ids": ids, "labels": ids}
    axes = find_structure(model, {name: value[:1, :16] for name, value in batch.items()}).axes

    def score(checkpointing: bool) -> Any:
        return collect_scores(model, axes, [batch], checkpointing=checkpointing)

    scores = {state: score(state) for state in (False, True)}
    apart = max(
        np.abs(scores[False].values[n] - scores[True].values[n]).max() for n in scores[True].values
    )
    memory = {state: peak_bytes(lambda state=state: score(state)) for state in (False, True)}
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for state, seconds in taken.items():
            began = time.process_time()
            score(state)
            seconds.append(time.process_time() - began)
    median = {state: statistics.median(seconds) for state, seconds in taken.items()}
    print(f"scores differ by {apart:g}")
    print(
        f"beyond the parameters {memory[False] >> 20} MiB without, {memory[True] >> 20} MiB with "
        f"({memory[True] / memory[False]:.2f} x)"
    )
    print(
        f"time {median[False]:.2f} s without, {median[True]:.2f} s with "
        f"({median[True] / median[False]:.2f} x)"
    )


if __name__ == "__main__":
    main()
