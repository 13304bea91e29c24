"""How close a budget in milliseconds comes to what the pruned model takes.

    python examples/benchmarks/latency_budget.py --model DIR [--phase decode] [--batch-size 8]

Measures the table of a model, plans with it, cuts copies, and times each in turn with a copy of the
whole model. Scores are random: they say nothing here. Beside the prediction is what a budget
of FLOPs of the same share would promise. ``--cpu`` counts seconds of the processor, for a machine
that does other things, too; shares of the whole model's time are compared, both measured in turn.
"""

import argparse
import copy
import time

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_gradnas import GradNASPruner
from hf_gradnas.batches.longest import flops_inputs
from hf_gradnas.costs.measured import PHASES, in_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--phase", choices=PHASES, default="prefill")
    parser.add_argument("--layout", choices=["per_layer", "stock"], default="per_layer")
    parser.add_argument("--budget", nargs="+", default=["70%", "50%", "30%"])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    timing = {
        "clock": time.process_time if arguments.cpu else time.perf_counter,
        "seconds": arguments.seconds,
    }
    causal = "CausalLM" in (AutoConfig.from_pretrained(arguments.model).architectures or [""])[0]
    cls = AutoModelForCausalLM if causal else AutoModel
    model = cls.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = torch.randint(5, 1000, (2, 32), generator=torch.Generator().manual_seed(0))
    pruner = GradNASPruner(model, score="random", layout=arguments.layout)
    batch = {"input_ids": ids}
    pruner.discover(batch, flops_length=arguments.length)
    pruner.score([{**batch, "labels": ids} if causal else batch], labels="data")
    began = time.process_time()
    options = {"batch_size": arguments.batch_size, "length": arguments.length}
    table = pruner.measure_latency(batch, phase=arguments.phase, **options, **timing)
    print(f"{table.total_ms:.2f} {table.said}")
    print(f"measured in {time.process_time() - began:.0f} CPU s")
    print(f"constant {table.rest_ms:.2f} ms, widths of each layer's own {table.uneven_ms:.2f} ms")
    for timed in table.timed:
        points = zip(timed.curve.widths, timed.curve.values, strict=True)
        print(f"{len(timed.axes)} x {timed.axes[0]}:", *(f"{w:g}: {v:.3f}" for w, v in points))
    inputs = flops_inputs(batch, arguments.length, decoder=False)
    inputs = {name: value.repeat(arguments.batch_size, 1) for name, value in inputs.items()}
    whole = copy.deepcopy(model)
    print("budget   predicted   measured      error   FLOPs kept")
    for budget in arguments.budget:
        plan = pruner.plan({"latency_ms": budget})
        smaller = GradNASPruner(copy.deepcopy(model), score="random", layout=arguments.layout)
        smaller.discover(batch)
        smaller.apply(plan)
        before, after = in_turn((whole, smaller.model), inputs, phase=arguments.phase, **timing)
        predicted, found = plan.costs["latency_ms"] / table.total_ms, after / before
        flops = plan.costs["flops"] / pruner.totals["flops"]
        error = predicted / found - 1
        print(f"{budget:>6}{predicted:11.1%}{found:11.1%}{error:+11.1%}{flops:13.1%}", flush=True)


if __name__ == "__main__":
    main()
