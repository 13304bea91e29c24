"""A small frontier as data, for the tests of its file, tables and picture."""

import itertools

from hf_gradnas.types import Budget, Frontier, Point

TOTALS = {"flops": 200.0, "params": 50.0}
ORIGINAL = {"examples": 40, "loss": 0.5, "accuracy": 0.9}


def make_frontier(
    *,
    scores: tuple[str, ...] = ("fisher", "taylor"),
    seeds: tuple[int, ...] = (0, 1, 2),
    states: tuple[str, ...] = ("masked", "repaired"),
    budgets: tuple[str, ...] = ("flops=80%", "flops=60%", "flops=40%"),
    metric: str = "accuracy",
) -> Frontier:
    """Points that fall with the budget; `fisher` falls less than `taylor`, repaired ones least."""
    points = []
    for seed, score, budget, state in itertools.product(seeds, scores, budgets, states):
        cost, _, share = budget.partition("=")
        ratio = float(share.rstrip("%")) / 100
        lost = (1 - ratio) ** 2 * (1 + scores.index(score)) * (1 + 0.1 * seed)
        lost *= 0.3 if state == "repaired" else 1.0
        metrics = {"examples": 40, "loss": 0.5 + 2 * lost, "accuracy": 0.9 - lost / 2}
        if metric == "perplexity":
            metrics = {"examples": 40, "loss": 2 + 4 * lost, "perplexity": 20 * 10 ** (3 * lost)}
        limit = ratio * TOTALS[cost]
        points.append(
            Point(
                score,
                seed,
                Budget(cost, limit, TOTALS[cost]),
                state,
                {**dict.fromkeys(TOTALS, 1.0), cost: limit - 1.0},
                lost,
                metrics,
                loss_increase=lost,
                key=f"{seed}{score}{budget}{state}",
            )
        )
    original = ORIGINAL if metric == "accuracy" else {"examples": 40, "loss": 3, "perplexity": 20.0}
    return Frontier(
        "my-bert", "per_layer", TOTALS, original, tuple(points), {"evaluation": "dev.tsv"}
    )
