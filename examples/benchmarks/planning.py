"""Time planning for a 7B-size model: 32 layers of 32 heads and 11,008 neurons, 20 budgets.

    python examples/benchmarks/planning.py [--layers 32] [--kv-groups 8] [--cost flops params]

Scores are drawn (log-normal, each layer with its own scale, as measured scores look); no model is
loaded. Beside the time stands the predicted loss of both strategies, as a share of all scores.
"""

import argparse
import time

import numpy as np

from hf_gradnas.search import STRATEGIES, find_plans
from hf_gradnas.types import Axis, Budget, CostModel, Kind, Prunable, Scores, Structure, Tap

HIDDEN, NEURONS, NUM_HEADS, LENGTH, VOCABULARY = 4096, 11_008, 32, 2048, 32_000
BUDGET_RATIOS = np.linspace(0.95, 0.25, 20)


def make_axes(num_layers: int, num_groups: int) -> tuple[Axis, ...]:
    axes = []
    for layer in range(num_layers):
        attention, ffn = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        parent = f"{attention}:kv_groups" if num_groups < NUM_HEADS else None
        if parent:
            axes.append(_axis(attention, Kind.KV_GROUPS, num_groups))
        axes.append(_axis(attention, Kind.HEADS, NUM_HEADS, parent))
        axes.append(_axis(ffn, Kind.NEURONS, NEURONS))
    return tuple(axes)


def _axis(module: str, kind: Kind, size: int, parent: str | None = None) -> Axis:
    name = f"{module}:{kind}"
    return Axis(
        name, module, kind, size, slices=(), taps=(Tap(module, "input", -1),), parent=parent
    )


def make_costs(axes: tuple[Axis, ...]) -> dict[str, CostModel]:
    head_dim = HIDDEN // NUM_HEADS
    nested = any(axis.parent for axis in axes)
    params = {
        Kind.HEADS: (2 if nested else 4) * HIDDEN * head_dim,
        Kind.KV_GROUPS: 2 * HIDDEN * head_dim,
        Kind.NEURONS: 3 * HIDDEN,
    }
    flops = {kind: 2 * LENGTH * count for kind, count in params.items()}
    flops[Kind.HEADS] += 4 * LENGTH**2 * head_dim
    head = HIDDEN * VOCABULARY
    return {
        name: CostModel(name, float(rest), {axis.name: float(unit[axis.kind]) for axis in axes})
        for name, unit, rest in (("flops", flops, 2 * LENGTH * head), ("params", params, 2 * head))
    }


def make_scores(axes: tuple[Axis, ...], seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    unit = {Kind.HEADS: 2e-3, Kind.KV_GROUPS: 2e-3, Kind.NEURONS: 1e-5}
    return Scores(
        {
            axis.name: unit[axis.kind] * rng.lognormal(0, 0.7) * rng.lognormal(0, 1.5, axis.size)
            for axis in axes
        },
        {"method": "drawn"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-groups", type=int, default=NUM_HEADS)
    parser.add_argument("--cost", nargs="+", default=["flops"], choices=["flops", "params"])
    arguments = parser.parse_args()
    axes = make_axes(arguments.layers, arguments.kv_groups)
    costs = make_costs(axes)
    scores = make_scores(axes, seed=0)
    total_score = sum(values.sum() for values in scores.values.values())
    totals = {
        name: cost.of({axis.name: axis.size for axis in axes}) for name, cost in costs.items()
    }
    prunable = Prunable(Structure(axes), costs, totals)
    budgets = [
        [Budget(name, ratio * totals[name], totals[name]) for name in arguments.cost]
        for ratio in BUDGET_RATIOS
    ]
    plans = {}
    for search in STRATEGIES:
        start = time.perf_counter()
        plans[search] = find_plans(prunable, scores, budgets, search=search)
        seconds = time.perf_counter() - start
        print(f"{search}: {len(budgets)} budgets planned in {seconds:.2f} s")
    print("budget   " + "".join(f"{search + ': kept':>20}{'loss':>8}" for search in STRATEGIES))
    for index, ratio in enumerate(BUDGET_RATIOS):
        row = f"{100 * ratio:6.1f} % "
        for search in STRATEGIES:
            plan = plans[search][index]
            kept = plan.costs[arguments.cost[0]] / totals[arguments.cost[0]]
            row += f"{100 * kept:18.2f} %{plan.loss_increase / total_score:8.4f}"
        print(row)


if __name__ == "__main__":
    main()
