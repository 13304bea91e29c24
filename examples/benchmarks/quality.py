"""Quality of pruned models without training: methods × budgets × calibration subsets.

A fine-tuned classifier on ``text<TAB>label`` files, and a language model on text:
    python examples/benchmarks/quality.py classify --model DIR --train train.tsv --dev dev.tsv
    python examples/benchmarks/quality.py language --model DIR --train calib.txt --dev eval.txt
Calibrated on the front of a text and measured on its end:
    python examples/benchmarks/quality.py language --model DIR --train text.txt --dev text.txt \
        --eval-from end --length 512 --examples 64 --eval-examples 20 --batch-size 4

Scores are this package's (`--score`) and those of other papers' rules (`--peer`, module `peers`).
Subset 0 is the first so many calibration examples, subset 1 the next; a table gives the mean and
the standard deviation over them. Pruned models are run masked, which equals the cut (`--cut` cuts).
With `--results FILE` every row is kept as a line of JSON, and what is in the file is not measured
again: remove it when the code has changed. The calibration examples alone reach scores and repair.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, Method, Pruned
from tasks import PRESETS, READERS, Batch, Data, Variant, measure
from transformers import AutoTokenizer, PreTrainedModel

from hf_gradnas import GradNASPruner
from hf_gradnas.config.defaults import AUTO
from hf_gradnas.repair.repairs import CHOICES, mended
from hf_gradnas.running.processes import Processes
from hf_gradnas.scores import METHODS
from hf_gradnas.types import Plan

Row = dict[str, Any]
UNPRUNED = {"method": "unpruned"}
SCORES = [AUTO, *METHODS]
MEASURED = ("metric", "kl", "achieved", "score", "scoring_s", "repair_s")
"""Fields of a row that are results; all others say what was measured."""


def limit_of(budget: str, pruner: GradNASPruner) -> dict[str, Any]:
    """A budget ``NAME=VALUE``; `blocks` are the parameters without those of the embeddings.

    Raises:
        ValueError: A share of the blocks is no percentage.
    """
    cost, _, value = budget.partition("=")
    if cost != "blocks":
        return {cost: value}
    model, total = pruner.model, pruner.totals["params"]
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    own = {id(p): p.numel() for table in tables if table is not None for p in table.parameters()}
    share = float(value.removesuffix("%")) / 100
    return {"params": total - (1 - share) * (total - sum(own.values()))}


@dataclass(frozen=True)
class Bench:
    """What all methods share: options, examples, the unpruned model, and the rows so far."""

    args: argparse.Namespace
    data: Data
    model: PreTrainedModel
    rows: list[Row]

    @property
    def sizes(self) -> Row:
        """What all rows of one call have in common."""
        args = self.args
        names = {"model": Path(args.model).name, "data": Path(args.train).name}
        sizes = {"examples": args.examples, "length": args.length}
        return {**names, **sizes, "evaluated": len(self.data.evaluation)}

    def missing(self, settings: Iterable[Row]) -> list[Row]:
        """Settings of which there is no row, in full."""
        have = [{k: v for k, v in row.items() if k not in MEASURED} for row in self.rows]
        return [row for setting in settings if (row := {**self.sizes, **setting}) not in have]

    def finish(self, trials: Sequence[tuple[Row, Variant]]) -> None:
        """Measure pruned models on the evaluation data, and keep their rows."""
        batches = self.data.batches(self.data.evaluation, self.args.batch_size)
        metric = PRESETS[self.args.task].metric
        found = measure(self.model, batches, [v for _, v in trials], metric=metric)
        for (row, _), result in zip(trials, found, strict=True):
            self.rows.append({**row, **result})
            if self.args.results is not None:
                with self.args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self.rows[-1]) + "\n")


def run(bench: Bench, name: str, method: Method) -> None:
    """Measure a method on every subset and budget of which there is no row yet."""
    args = bench.args
    repaired: bool | str = args.repair != "none"
    if name in PEERS:
        repaired = repaired and method.repair is not None
    elif args.repair == "swap" or (args.repair == "auto" and args.task == "language"):
        repaired = "swap"
    told = {"method": name, "search": method.search, "layout": args.layout}
    told |= {"repair": repaired, "cut": args.cut}
    pruner = GradNASPruner(
        bench.model, score=method.score, search=method.search, layout=args.layout
    )
    for subset in range(args.subsets):
        settings = [{**told, "subset": subset, "budget": budget} for budget in args.budget]
        if rows := bench.missing(settings):
            batches = bench.data.subset(subset, args)
            pruner.discover(batches[0], flops_length=args.length)
            file = scores_file(args, method, subset)
            bench.finish(list(trials(pruner, method, batches, rows, file)))


def trials(
    pruner: GradNASPruner,
    method: Method,
    batches: Sequence[Batch],
    rows: Iterable[Row],
    file: Path | None,
) -> Iterator[tuple[Row, Variant]]:
    """Score once; then plan and repair what each row asks for, and say how it is run."""
    start = time.perf_counter()
    if method.values is None:
        pruner.score(batches, file=file)
    values = method.values(pruner, batches) if method.values else {}
    scored = time.perf_counter() - start
    for row in rows:
        limit = limit_of(row["budget"], pruner)
        plan = method.choose(pruner, values, limit) if method.choose else pruner.plan(limit)
        start = time.perf_counter()
        variant = pruned_by(pruner, method, plan, batches, row)
        repaired = time.perf_counter() - start if row["repair"] else 0.0
        achieved = max(plan.costs[cost] / pruner.totals[cost] for cost in limit)
        seconds = {"scoring_s": scored, "repair_s": repaired}
        yield {**row, "achieved": achieved, "score": plan.score, **seconds}, variant


def pruned_by(
    pruner: GradNASPruner, method: Method, plan: Plan, batches: Sequence[Batch], row: Row
) -> Variant:
    """The model as a row asks for it: masked or a copy that is cut, repaired or not."""
    own = []
    if row["repair"] and method.repair is None:
        swap = pruner.swap if row["repair"] == "swap" else None
        plan, found = mended(plan, batches, swap, pruner.repair, Processes())
        if found is None:
            raise SystemExit(f"{row['method']} at {row['budget']}: there is no repair, see above.")
        own = [found]
    if row["cut"]:
        twin = GradNASPruner(copy.deepcopy(pruner.model), layout=pruner.layout)
        twin.discover(batches[0])
        return partial(nullcontext, twin.apply(plan, *own))
    if row["repair"] and method.repair is not None:
        return partial(within, pruner.model, method.repair(pruner, plan, batches))
    return partial(within, pruner.model, partial(pruner.masked, plan, *own))


@contextmanager
def within(model: PreTrainedModel, pruned: Pruned) -> Iterator[PreTrainedModel]:
    """The model, in a block in which it runs pruned."""
    with pruned():
        yield model


def scores_file(args: argparse.Namespace, method: Method, subset: int) -> Path | None:
    """Where scores are kept for other runs; the seconds of a row are then those of reading it."""
    if args.scores is None or method.values is not None:
        return None
    sizes = f"{args.examples}x{args.length}"
    return args.scores / f"{Path(args.model).name}-{method.score}-{sizes}-{subset}.safetensors"


def report(bench: Bench) -> None:
    """Print the tables of all rows with the sizes and the layout of this call."""
    args = bench.args
    common = {**bench.sizes, "layout": args.layout, "cut": args.cut}.items()
    rows = [row for row in bench.rows if common <= row.items()]
    (whole,) = (row for row in bench.rows if {**bench.sizes, **UNPRUNED}.items() <= row.items())
    metric = PRESETS[args.task].metric
    print(f"\n{metric} (unpruned {whole['metric']:.4f}), layout {args.layout}\n")
    print(table(rows, args.budget, "metric", digits=4 if metric == "accuracy" else 2))
    print("\nKL to the unpruned model, nats per label\n")
    print(table(rows, args.budget, "kl", digits=3))


def table(rows: Sequence[Row], budgets: Sequence[str], value: str, *, digits: int) -> str:
    """Markdown: a line a method, a column a budget, mean ± standard deviation over subsets."""
    methods = dict.fromkeys((row["method"], row["search"], row["repair"]) for row in rows)
    lines = [["method", "search", "repair", *budgets, "scoring s", "repair s"]]
    lines.append(["---"] * len(lines[0]))
    for name, search, repair in methods:
        told = {"method": name, "search": search, "repair": repair}.items()
        own = [row for row in rows if told <= row.items()]
        cells = [
            spread([row[value] for row in own if row["budget"] == budget], digits)
            for budget in budgets
        ]
        seconds = [spread([row[key] for row in own], 1) for key in ("scoring_s", "repair_s")]
        said = repair if repair == "swap" else ("yes" if repair else "no")
        lines.append([name, search, said, *cells, *seconds])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, with the defaults of each task."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=PRESETS)
    parser.add_argument("--model", required=True, help="folder of the unpruned model")
    parser.add_argument("--train", required=True, help="calibration data")
    parser.add_argument("--dev", required=True, help="evaluation data")
    parser.add_argument("--budget", nargs="+", metavar="NAME=VALUE", help="flops, params, blocks")
    parser.add_argument("--score", nargs="*", default=SCORES, choices=SCORES)
    parser.add_argument("--search", default="lagrangian")
    parser.add_argument("--layout", default="per_layer", choices=("per_layer", "stock"))
    parser.add_argument("--repair", default="auto", choices=CHOICES)
    parser.add_argument("--peer", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--subsets", type=int, default=5, help="calibration subsets")
    parser.add_argument("--examples", type=int, help="calibration examples of a subset")
    parser.add_argument("--eval-examples", type=int)
    parser.add_argument("--eval-from", default="start", choices=("start", "end"))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--length", type=int, help="most tokens of a sentence, or of a block")
    parser.add_argument("--cut", action="store_true", help="cut copies in place of masking")
    parser.add_argument("--results", type=Path, help="file of rows, a line of JSON each")
    parser.add_argument("--scores", type=Path, help="folder to keep scores in")
    args = parser.parse_args(argv)
    for name, value in vars(PRESETS[args.task]).items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)
    if args.cut and args.peer and args.repair != "none":
        parser.error("--cut: a peer's repair is run masked only; give --peer without a name")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure what is missing, print the tables, and give the rows."""
    args = parse(argv)
    preset = PRESETS[args.task]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = READERS[args.task](args, tokenizer)
    if len(data.calibration) < args.subsets * args.examples:
        raise SystemExit(
            f"--train: {args.subsets} subsets of {args.examples} examples need "
            f"{args.subsets * args.examples}, but there are {len(data.calibration)}; lower one."
        )
    model = preset.auto.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = []
    if args.results is not None and args.results.exists():
        rows = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    bench = Bench(args, data, model, rows)
    bench.finish([(row, partial(nullcontext, model)) for row in bench.missing([UNPRUNED])])
    for name in args.score:
        run(bench, name, Method(name, args.search))
    for name in args.peer:
        run(bench, name, PEERS[name])
    report(bench)
    return rows


if __name__ == "__main__":
    main()
