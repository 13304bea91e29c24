"""What scoring costs on top of the forward and backward that it cannot do without.

Side by side in one run: (a) forward and backward to activations only, with frozen parameters and
the same lowest point, and (b) `collect_scores`, over the same batches. Peak memory is that of one
process each.

    python examples/benchmarks/scoring.py
    python examples/benchmarks/scoring.py --model DIRECTORY --data FILE.tsv

With `--order`, instead: the same examples, padded per batch, in the order of the file and in that
of their lengths; and the score `balanced` beside `fisher`.

    python examples/benchmarks/scoring.py --model DIRECTORY --data FILE.tsv --order
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
)

from hf_gradnas.batches.steps import by_length
from hf_gradnas.scores import collect_scores
from hf_gradnas.types import Axis
from hf_gradnas.verification import find_structure

EXAMPLES, BATCH, LENGTH = 512, 32, 64
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}

Batches = list[dict[str, torch.Tensor]]


def build(arguments: argparse.Namespace) -> tuple[Any, Batches]:
    """A model in eval mode and its batches; random ones where no files are given."""
    torch.manual_seed(0)
    if arguments.model is None:
        model = BertForSequenceClassification(BertConfig(**MINILM)).eval()
        return model, random_batches(model.config.vocab_size)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model).eval()
    if arguments.data is None:
        return model, random_batches(model.config.vocab_size)
    return model, read_batches(arguments.data, AutoTokenizer.from_pretrained(arguments.model))


def random_batches(vocabulary: int) -> Batches:
    ids = torch.randint(1000, vocabulary, (EXAMPLES, LENGTH))
    labels = torch.randint(0, 2, (EXAMPLES,))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [{k: v[i : i + BATCH] for k, v in columns.items()} for i in range(0, EXAMPLES, BATCH)]


def read_batches(file: Path, tokenizer: Any) -> Batches:
    """First examples of a file of text<TAB>label, padded to the full length."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[:EXAMPLES]]
    batches = []
    for start in range(0, len(rows), BATCH):
        texts, labels = zip(*rows[start : start + BATCH], strict=True)
        columns = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        batches.append({**columns, "labels": torch.tensor([int(label) for label in labels])})
    return batches


def backward_only(model: Any, axes: tuple[Axis, ...], batches: Batches) -> None:
    """Forward and backward as far down as the lowest out-projection, and nothing else."""
    handles = [
        model.get_submodule(axis.taps[0].module).register_forward_pre_hook(make_leaf)
        for axis in axes
    ]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for batch in batches:
        model(**batch).loss.backward()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for handle in handles:
        handle.remove()


def make_leaf(module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
    x = args[0]
    return None if x.requires_grad else (x.detach().requires_grad_(), *args[1:])


def scoring(model: Any, axes: tuple[Axis, ...], batches: Batches) -> None:
    collect_scores(model, axes, batches)


PASSES: dict[str, Callable[[Any, tuple[Axis, ...], Batches], None]] = {
    "backward_only": backward_only,
    "scoring": scoring,
}


def timed(name: str, model: Any, axes: tuple[Axis, ...], batches: Batches) -> tuple[float, float]:
    """Seconds on the clock, and seconds of all cores, which other processes disturb less."""
    clock, cores = time.perf_counter(), time.process_time()
    PASSES[name](model, axes, batches)
    return time.perf_counter() - clock, time.process_time() - cores


def peak_live_bytes(name: str, model: Any, axes: tuple[Axis, ...], batches: Batches) -> int:
    """Largest sum of tensors alive at once during two batches, the parameters included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        PASSES[name](model, axes, batches[:2])
    events = measured.profiler.kineto_results.events()
    live = peak = sum(p.numel() * p.element_size() for p in model.parameters())
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure_memory(name: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Run this file anew for one pass: its peak resident set, and its peak of live tensors."""
    command = [sys.executable, __file__, "--memory-of", name]
    for option in ("model", "data"):
        value = getattr(arguments, option)
        command += [] if value is None else [f"--{option}", str(value)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def print_memory(name: str, arguments: argparse.Namespace) -> None:
    model, batches = build(arguments)
    # One example, so that discovery does not set the peak.
    axes = find_structure(model, {key: value[:1] for key, value in batches[0].items()}).axes
    PASSES[name](model, axes, batches[:4])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    live = peak_live_bytes(name, model, axes, batches)
    print(json.dumps({"resident": resident, "live tensors": live}))


# -- the order of examples -------------------------------------------------------------------------


def read_loader(file: Path, tokenizer: Any) -> DataLoader[Any]:
    """First examples of a file of text<TAB>label, padded to the longest of each batch."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[:EXAMPLES]]
    examples = [
        {**tokenizer(text, truncation=True, max_length=LENGTH), "label": int(label)}
        for text, label in rows
    ]
    collate = DataCollatorWithPadding(tokenizer)
    return DataLoader(examples, batch_size=BATCH, collate_fn=collate)  # type: ignore[arg-type]


def show_order(arguments: argparse.Namespace) -> None:
    """Seconds of a pass in both orders and for both scores, round by round in turn."""
    model, _ = build(arguments)
    model = model.double() if arguments.double else model
    loader = read_loader(arguments.data, AutoTokenizer.from_pretrained(arguments.model))
    axes = find_structure(model, next(iter(loader))).axes
    found: dict[tuple[str, str], Any] = {}
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.rounds + 1):
        for method in ("fisher", "balanced"):
            for order in ("file", "length"):
                batches = loader if order == "file" else by_length(loader, method)
                began = time.process_time()  # of all cores: others disturb it less
                found[method, order] = collect_scores(model, axes, batches, method=method)
                taken.setdefault((method, order), []).append(time.process_time() - began)
    for (method, order), seconds in taken.items():
        each = ", ".join(f"{second:.2f}" for second in seconds[1:])
        plain, ours = found[method, "file"].values, found[method, order].values
        apart = max(abs(ours[n] - v).max() / v.max() for n, v in plain.items())
        median = statistics.median(seconds[1:])
        share = median / statistics.median(taken["fisher", "file"][1:])
        print(
            f"{method:9} in order of {order:7} {median:6.2f} s of all cores, {share:.3f} x "
            f"(rounds {each}); scores {apart:.1g} from those in order of file"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a sequence classifier; default: a random BERT")
    parser.add_argument("--data", type=Path, help="text<TAB>label lines; default: random tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--order", action="store_true", help="measure orders and scores instead")
    parser.add_argument("--double", action="store_true", help="in float64, for `--order`")
    parser.add_argument("--memory-of", choices=PASSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_memory(arguments.memory_of, arguments)
        return
    if arguments.order:
        if arguments.model is None or arguments.data is None:
            parser.error("--order needs --model and --data")
        show_order(arguments)
        return
    # First, since a new process takes over the peak of the one that starts it.
    show_memory(arguments)
    show_time(arguments)


def show_time(arguments: argparse.Namespace) -> None:
    model, batches = build(arguments)
    axes = find_structure(model, batches[0]).axes
    for name in PASSES:
        timed(name, model, axes, batches[:2])
    rounds = [
        {name: timed(name, model, axes, batches) for name in PASSES}
        for _ in range(arguments.rounds)
    ]
    for index, kind in enumerate(("clock", "all cores")):
        ratios = [taken["scoring"][index] / taken["backward_only"][index] for taken in rounds]
        ours, base = (
            statistics.median(taken[name][index] for taken in rounds)
            for name in ("scoring", "backward_only")
        )
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(
            f"time, {kind:12} {statistics.median(ratios):.3f} x "
            f"({ours:.2f} / {base:.2f} s for {EXAMPLES} examples; rounds {each})"
        )


def show_memory(arguments: argparse.Namespace) -> None:
    memory = {name: measure_memory(name, arguments) for name in PASSES}
    for kind in ("resident", "live tensors"):
        ours, base = (memory[name][kind] for name in ("scoring", "backward_only"))
        print(f"peak, {kind:12} {ours / base:.3f} x ({ours >> 20} / {base >> 20} MiB)")


if __name__ == "__main__":
    main()
