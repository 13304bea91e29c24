"""Plan for a 70B Llama at 20 budgets, without it: memory of the plans, time, and size on disk.

    python examples/benchmarks/plans.py [--layers 80] [--neurons 28672]

Scores are drawn, as in planning.py; no model is loaded. The memory of the plans is what is freed
when they go, beside that of as many tuples of Python integers, as they were before.
"""

import argparse
import gc
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import planning

from hf_gradnas import Plan, Scores
from hf_gradnas.planning import make_plans
from hf_gradnas.types import Basis, Prunable, Structure

MIB = 2**20


def make_scores(layers: int, neurons: int) -> Scores:
    """Scores of 64 heads in 8 groups and of all neurons of each layer, with their basis."""
    planning.HIDDEN, planning.NUM_HEADS, planning.NEURONS = 8192, 64, neurons
    axes = planning.make_axes(layers, 8)
    costs = planning.make_costs(axes)
    sizes = {axis.name: axis.size for axis in axes}
    totals = {name: cost.of(sizes) for name, cost in costs.items()}
    basis = Basis.of([Prunable(Structure(axes), costs, totals)], {})
    drawn = planning.make_scores(axes, seed=0)
    return Scores(drawn.values, {"method": "fisher", "complete": "true"}, basis=basis)


def plans_of(scores: Scores, budgets: list[dict[str, str]]) -> list[Plan]:
    return make_plans(scores, budgets, layout="per_layer")


def held_by(plans: list[Plan]) -> float:
    """MiB of memory that is freed with these plans, the only ones of their kind."""
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    plans.clear()
    gc.collect()
    return (before - tracemalloc.get_traced_memory()[0]) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--neurons", type=int, default=28_672)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scores.safetensors")
        make_scores(arguments.layers, arguments.neurons).save(file)
        print(f"scores with their basis: {file.stat().st_size / MIB:.1f} MiB")
        began = time.process_time()
        scores = Scores.load(file)
        print(f"read in {time.process_time() - began:.2f} CPU seconds")
    budgets = [{"flops": f"{100 * ratio:.1f}%"} for ratio in planning.BUDGET_RATIOS]
    for asked in (budgets[9:10], budgets):
        began = time.process_time()
        plans_of(scores, asked)
        print(f"{len(asked)} budgets: planned in {time.process_time() - began:.2f} CPU seconds")
    tracemalloc.start()
    small = held_by(plans_of(scores, budgets))
    print(f"memory of {len(budgets)} plans: {small:.1f} MiB (limit: 100)")
    units = sum(len(kept) for plan in plans_of(scores, budgets) for kept in plan.kept.values())
    before = units * (sys.getsizeof(10**6) + np.dtype(object).itemsize) / MIB
    print(f"as tuples of integers: {before:.0f} MiB")
    assert small < 100 or arguments.layers > 80, small


if __name__ == "__main__":
    main()
