"""What whole layers bring: quality and latency with heads and neurons, with layers, and with both.

    python examples/benchmarks/layers.py language --model DIR --train calib.txt --dev eval.txt
    python examples/benchmarks/layers.py classify --model DIR --train train.tsv --dev dev.tsv

One scoring serves all rows; each is repaired (`--repair`) and cut. A model that generates is timed
while it decodes at batch 1, the others in a forward of one example; the whole and the cut model run
in turn, and the ratio of the medians of their times is given.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from quality import limit_of
from tasks import PRESETS, READERS, Batch, measure
from transformers import AutoTokenizer, PreTrainedModel

from hf_gradnas import GradNASPruner
from hf_gradnas.config.limits import parse_rules
from hf_gradnas.repair.repairs import mended
from hf_gradnas.running.processes import Processes
from hf_gradnas.search.solver import find_plan
from hf_gradnas.types import Kind, Plan

WAYS: dict[str, dict[str, None]] = {
    "heads and neurons": {"*:layers": None},
    "layers": {f"*:{kind}": None for kind in Kind if kind is not Kind.LAYERS},
    "all three": {},
}


def timed(model: PreTrainedModel, batch: Batch, tokens: int) -> float:
    """Seconds of one run at batch 1: of so many tokens after a prompt, or of one forward."""
    first = {name: x[:1] for name, x in batch.items() if name != "labels"}
    start = time.perf_counter()
    with torch.no_grad():
        if model.can_generate():
            prompt = {name: x[:, :32] for name, x in first.items()}
            limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
            model.generate(**prompt, do_sample=False, **limits)
        else:
            for _ in range(tokens):
                model(**first)
    return time.perf_counter() - start


def speedup(whole: PreTrainedModel, cut: PreTrainedModel, batch: Batch, args: Any) -> float:
    """How many times faster the cut model is; the two run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.runs + 1):  # the first warms up
        for model, found in zip((whole, cut), times, strict=True):
            found.append(timed(model, batch, args.tokens))
    return statistics.median(times[0][1:]) / statistics.median(times[1][1:])


def layers_left(plan: Plan) -> str:
    """Layers that stay, of all."""
    found = [units for name, units in plan.kept.items() if name.endswith(":layers")]
    return f"{sum(map(len, found))} of {len(found)}"


def cut_by(
    model: PreTrainedModel, batches: Sequence[Batch], plan: Plan, repair: Any
) -> PreTrainedModel:
    """A copy of the model, cut."""
    twin = GradNASPruner(copy.deepcopy(model), layers=True, layout=plan.layout)
    twin.discover(batches[0])
    return twin.apply(plan, repair)


def main(argv: Sequence[str] | None = None) -> None:
    """Score once, then plan, repair, cut, measure and time every way at every budget."""
    args = parse(argv)
    preset = PRESETS[args.task]
    model = preset.auto.from_pretrained(args.model, dtype=torch.float32).eval()
    data = READERS[args.task](args, AutoTokenizer.from_pretrained(args.model))
    batches = data.subset(0, args)
    pruner = GradNASPruner(model, layers=True, layout="per_layer")
    scores = pruner.score(batches)
    evaluation = data.batches(data.evaluation, args.batch_size)
    (whole,) = measure(model, evaluation, [lambda: nullcontext(model)], metric=preset.metric)
    print(f"unpruned: {preset.metric} {whole['metric']:.4f}")
    print(f"| budget | units | {preset.metric} | KL | layers | FLOPs | faster |\n|{'---|' * 7}")
    for budget in args.budget:
        budgets = pruner.check(limit_of(budget, pruner))
        for way, rules in WAYS.items():
            plan = find_plan(pruner.prunable, scores, budgets, rules=parse_rules(rules))
            repair = None
            if args.repair:
                plan, repair = mended(plan, batches, None, pruner.repair, Processes())
            cut = cut_by(model, batches, plan, repair)
            variant: Callable[[], Any] = partial(nullcontext, cut)
            (row,) = measure(model, evaluation, [variant], metric=preset.metric)
            flops = plan.costs["flops"] / pruner.totals["flops"]
            cells: Mapping[str, str] = {
                "budget": budget,
                "units": way,
                "metric": f"{row['metric']:.4f}",
                "kl": f"{row['kl']:.3f}",
                "layers": layers_left(plan),
                "flops": f"{flops:.1%}",
                "faster": f"{speedup(model, cut, batches[0], args):.2f}x",
            }
            print(f"| {' | '.join(cells.values())} |", flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, with those of the task where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("task", choices=PRESETS)
    parser.add_argument("--model", required=True, help="folder of the unpruned model")
    parser.add_argument("--train", required=True, help="calibration data")
    parser.add_argument("--dev", required=True, help="evaluation data")
    parser.add_argument("--budget", nargs="+", metavar="NAME=VALUE", help="flops, params, blocks")
    parser.add_argument("--no-repair", dest="repair", action="store_false")
    parser.add_argument("--examples", type=int, help="calibration examples")
    parser.add_argument("--eval-examples", type=int)
    parser.add_argument("--eval-from", default="start", choices=("start", "end"))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--length", type=int, help="most tokens of a sentence, or of a block")
    parser.add_argument("--tokens", type=int, default=32, help="tokens, or forwards, of a timing")
    parser.add_argument("--runs", type=int, default=5, help="timings of each model")
    args = parser.parse_args(argv)
    for name in ("examples", "eval_examples", "batch_size", "length", "budget"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(PRESETS[args.task], name))
    return args


if __name__ == "__main__":
    main()
