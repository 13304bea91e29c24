"""What is around scoring: counting FLOPs, saving, and the memory of the whole command.

    python examples/benchmarks/overheads.py count MODEL --lengths 512,4096,131072
    python examples/benchmarks/overheads.py save MODEL
    python examples/benchmarks/overheads.py peak MODEL DATA -- --repair none

MODEL is a folder or an id of the Hub of a language model, or ``bert`` for a BERT-base with random
weights. Each figure is beside what it is compared with: a forward at that length,
``save_pretrained`` of the same cut model, the bytes of the model. CPU seconds of one process, the
median of `--rounds`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from hf_gradnas import GradNASPruner
from hf_gradnas.costs.flops import count_flops

CONSOLE = Console(width=100, highlight=False)
LONGEST_FORWARD = 4096
TOKENS = 128


def loaded(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and two sequences for it."""
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (2, TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "bert":
        return BertForSequenceClassification(BertConfig()).eval(), {
            **batch,
            "labels": torch.tensor([0, 1]),
        }
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager")
    return model.eval(), {**batch, "labels": ids}


def cpu_seconds(run: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """What a call returns, and its median CPU time."""
    found, times = None, []
    for _ in range(rounds):
        began = time.process_time()
        found = run()
        times.append(time.process_time() - began)
    return found, statistics.median(times)


def count(options: argparse.Namespace) -> None:
    """FLOPs by shapes beside those of a forward."""
    model, _ = loaded(options.model)
    for length in map(int, options.lengths.split(",")):
        ids = torch.ones(1, length, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        (flops, _), seconds = cpu_seconds(partial(count_flops, model, inputs), options.rounds)
        said = f"{length:>7} tokens: {flops:.6g} FLOPs in {seconds:.3f} s"
        if length <= LONGEST_FORWARD:
            counted, real = cpu_seconds(partial(flops_of_forward, model, inputs), 1)
            same = "the same" if counted == flops else "OTHERS"
            said += f"; a forward: {same} in {real:.2f} s ({real / seconds:.0f} x)"
        CONSOLE.print(said)


def flops_of_forward(model: PreTrainedModel, inputs: Mapping[str, Any]) -> int:
    """FLOPs that are counted while the model runs."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**inputs)
    return counter.get_total_flops()


def save(options: argparse.Namespace) -> None:
    """Saving a cut model beside ``save_pretrained`` of it."""
    model, batch = loaded(options.model)
    pruner = GradNASPruner(model)
    pruner.discover(batch)
    pruner.score([batch])
    pruner.apply(pruner.plan({"params": options.params}))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"

        def emptied() -> Path:
            shutil.rmtree(target, ignore_errors=True)
            return target

        def flushed() -> None:
            model.save_pretrained(emptied())
            for file in target.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())

        ways: dict[str, Callable[[], Any]] = {
            "save_pretrained, flushed to the disk": flushed,
            "save_pretrained": lambda: model.save_pretrained(emptied()),
            "checked, without pictures": lambda: pruner.save_pretrained(emptied(), report=False),
            "checked, with pictures": lambda: pruner.save_pretrained(emptied()),
        }
        for run in ways.values():
            run()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, run in ways.items():  # in turn: what else the machine does slows all alike
                emptied()
                cpu, wall = time.process_time(), time.perf_counter()
                run()
                found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        plain = None
        for name, pairs in found.items():
            cpu, wall = (statistics.median(values) for values in zip(*pairs, strict=True))
            plain = plain or (cpu, wall)
            CONSOLE.print(
                f"{name}: {cpu:.2f} CPU s ({cpu / plain[0]:.1f} x), "
                f"{wall:.2f} s ({wall / plain[1]:.1f} x)"
            )


def peak(options: argparse.Namespace) -> None:
    """Anonymous memory of the command, beyond its imports, in bytes of the model."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "pruned")
        words = ["--model", options.model, "--dataset", options.data, "--output", output]
        size = sum(file.stat().st_size for file in Path(options.model).glob("*.safetensors"))
        imports = ["-c", "import hf_gradnas.flow, hf_gradnas.cli.prune, matplotlib.figure, torch"]
        before = _peak_of([*imports])
        found = _peak_of(["-m", "hf_gradnas.prune", *words, *options.more])
    above = found - before
    CONSOLE.print(
        f"peak {found / 2**20:.0f} MiB, imports {before / 2**20:.0f} MiB: {above / 2**20:.0f} MiB "
        f"are {above / size:.2f} x the {size / 2**20:.0f} MiB of the model"
    )


def _peak_of(words: list[str]) -> int:
    """Largest anonymous memory of a Python process, looked at every 10 ms (Linux)."""
    largest = 0
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            _, _, found = status.partition("RssAnon:")
            largest = max(largest, int(found.split()[0]) * 1024 if found else 0)
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{words} ended with {process.returncode}")
    return largest


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for run in (count, save, peak):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("model")
        command.set_defaults(run=run)
        if run is peak:
            command.add_argument("data")
            command.add_argument("more", nargs="*", help="further options, after --")
        else:
            command.add_argument("--rounds", type=int, default=5)
        if run is count:
            command.add_argument("--lengths", default="512,4096,131072")
        if run is save:
            command.add_argument("--params", default="70%")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.run(options)


if __name__ == "__main__":
    main()
