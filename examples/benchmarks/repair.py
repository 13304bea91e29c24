"""What a repair takes beside the scoring: time on a classifier, memory on one wide FFN.

    python examples/benchmarks/repair.py time --model DIR --train train.tsv --budget 60% 30%
    python examples/benchmarks/repair.py memory --examples 10 --length 256 --budget 97%

`time` scores and repairs in turn, examples in order of length as the command has them, on one
thread by its CPU time, so that other jobs on the machine count little. `memory` repairs one layer
of a Llama with random weights, and tells the peak of the process above what it held before; states
of waiting forwards are bounded by `--states`, beyond which they go to disk. It needs Linux.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_gradnas import GradNASPruner
from hf_gradnas.repair.least_squares import find_repair

STATUS = Path("/proc/self/status")


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this thread, and the result."""
    start = time.thread_time()
    result = run()
    return time.thread_time() - start, result


def sentences(args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Batches of the first sentences of a headerless tsv file, the longest first."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with Path(args.train).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[: args.examples]
    rows.sort(key=lambda row: len(row[0]), reverse=True)
    batches = []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        sizes: dict[str, Any] = {"truncation": True, "max_length": args.length, "padding": True}
        columns = tokenizer([row[0] for row in part], return_tensors="pt", **sizes)
        batches.append({**columns, "labels": torch.tensor([int(row[1]) for row in part])})
    return batches


def measure_time(args: argparse.Namespace) -> None:
    """Print CPU seconds of scoring and of a repair per budget, in turn."""
    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    batches = sentences(args)
    pruner = GradNASPruner(model)
    pruner.discover(batches[0], flops_length=args.length)
    for number in range(args.rounds):
        scoring, _ = seconds(lambda: pruner.score(batches))
        for budget in args.budget:
            plan = pruner.plan({"flops": budget})
            took, _ = seconds(lambda plan=plan: pruner.repair(plan, batches))
            print(
                f"round {number}, {budget} of the FLOPs: scoring {scoring:.1f} s, repair "
                f"{took:.1f} s, {took / scoring:.2f} times",
                flush=True,
            )


def gibibytes(name: str) -> float:
    """A field of the process's status, such as ``VmHWM``: the peak of its memory."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def measure_memory(args: argparse.Namespace) -> None:
    """Print by how much a repair raises the memory of the process."""
    torch.manual_seed(0)
    heads = args.hidden // 128
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=args.length,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(256, (args.examples, args.length))
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    pruner = GradNASPruner(model, score="magnitude", layout="per_layer")
    pruner.discover(batches[0], flops_length=args.length)
    pruner.score(batches)
    plan = pruner.plan({"params": args.budget[0]})
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = gibibytes("VmRSS")
    bound = args.states * 2**20
    repair = find_repair(model, pruner.structure.axes, plan, batches, memory_bytes=bound)
    widest = max(site.columns for site in repair.sites)
    peak = gibibytes("VmHWM") - before
    print(f"{widest:,} inputs of {args.hidden:,} outputs: {peak:.2f} GiB above {before:.2f} GiB")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("--model", help="time: folder of a fine-tuned classifier")
    parser.add_argument("--train", help="time: its data, text<TAB>label")
    parser.add_argument("--budget", nargs="+", default=["60%"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=11008)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--states", type=int, default=256, help="memory: MiB of waiting states")
    args = parser.parse_args(argv)
    measure_time(args) if args.what == "time" else measure_memory(args)


if __name__ == "__main__":
    main()
