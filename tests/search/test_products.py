"""Plans where costs are products of widths, against brute force and the separable search."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import search_spaces as small
from searching import check_budgets, find_plan, find_plans, lowest_costs

from hf_gradnas.errors import BudgetError
from hf_gradnas.search import STRATEGIES
from hf_gradnas.types import CostModel, Kind, Product, Scores, StockGroup, StockSpace

SEEDS = range(15)


def channels(index, size):
    return replace(small.axis(f"convs.{index}", Kind.CHANNELS, size), minimum=1)


def dim(constant, *axes):
    return float(constant), tuple({a.name: 1.0 for a in axes}.items())


def network(seed, count=5, sizes=(4, 6)):
    """A chain of convolutions with branches, concatenations and one square convolution."""
    rng = np.random.default_rng(seed)
    axes = [channels(i, int(rng.integers(sizes[0], sizes[1] + 1))) for i in range(count)]
    costs = {}
    for name in ("flops", "params"):
        products = [
            Product(float(rng.integers(1, 30)), (dim(0, a), dim(0, b), dim(3)))
            for a, b in itertools.pairwise(axes)
        ]
        for _ in range(count // 2):
            out, left, right = (axes[i] for i in rng.integers(0, count, 3))
            sides = dim(rng.integers(0, 3), out), dim(0, left, right)
            products.append(Product(float(rng.integers(1, 10)), sides))
        linear = {a.name: float(rng.integers(1, 10)) for a in axes}
        costs[name] = CostModel(name, 5.0, linear, {}, tuple(products))
    values = {a.name: rng.lognormal(0.0, 1.0, a.size) * rng.lognormal(0.0, 0.7) for a in axes}
    return axes, costs, Scores(values)


def every_plan(axes, scores):
    """Loss and kept counts of the best plan for every combination of counts."""
    tables = [np.append(0, np.cumsum(np.sort(scores.values[a.name])))[::-1] for a in axes]
    for counts in itertools.product(*(range(a.minimum, a.size + 1) for a in axes)):
        loss = sum(table[count] for table, count in zip(tables, counts, strict=True))
        yield loss, {a.name: count for a, count in zip(axes, counts, strict=True)}


def smallest_loss(axes, costs, scores, limits):
    smallest = np.inf
    for loss, kept in every_plan(axes, scores):
        if loss < smallest and all(costs[x.cost].of(kept) <= x.limit for x in limits):
            smallest = loss
    return smallest


def check_plan(plan, costs, scores, limits):
    for name, cost in costs.items():
        assert plan.costs[name] == cost.of(plan.counts())
    assert all(plan.costs[limit.cost] <= limit.limit for limit in limits)
    pruned = sum(np.delete(values, plan.kept[name]).sum() for name, values in scores.values.items())
    assert plan.loss_increase == pytest.approx(pruned, rel=1e-9)


@pytest.mark.parametrize("ratios", [{"flops": 0.75}, {"params": 0.5}, {"flops": 0.25}])
def test_lagrangian_is_near_the_optimum(ratios):
    gaps = []
    for seed in SEEDS:
        axes, costs, scores = network(seed)
        limits = small.budgets(axes, costs, **ratios)
        plan = find_plan(axes, scores, costs, limits)
        check_plan(plan, costs, scores, limits)
        gaps.append(plan.loss_increase / smallest_loss(axes, costs, scores, limits) - 1)
    assert min(gaps) > -1e-9
    assert np.median(gaps) < 1e-9
    assert max(gaps) < 0.05


def test_lagrangian_is_near_the_optimum_of_two_budgets():
    gaps = []
    for seed in SEEDS:
        axes, costs, scores = network(seed)
        limits = small.budgets(axes, costs, flops=0.5, params=0.4)
        plan = find_plan(axes, scores, costs, limits)
        check_plan(plan, costs, scores, limits)
        gaps.append(plan.loss_increase / smallest_loss(axes, costs, scores, limits) - 1)
    assert min(gaps) > -1e-9
    assert np.median(gaps) < 0.02


@pytest.mark.parametrize("ratio", [0.8, 0.4])
@pytest.mark.parametrize("seed", SEEDS)
def test_binary_is_the_smallest_threshold(seed, ratio):
    axes, costs, scores = network(seed)
    limits = small.budgets(axes, costs, flops=ratio)
    plan = find_plan(axes, scores, costs, limits, search="binary", fill=False)
    check_plan(plan, costs, scores, limits)
    sums = {n: np.append(0, np.cumsum(np.sort(v))) for n, v in scores.values.items()}

    def counts_at(threshold):
        # At least one channel of each stays.
        return {n: max(1, s.size - int((s <= threshold).sum())) for n, s in sums.items()}

    # Rounded, because the search scales the scores: exact, but for their order of summation.
    every = np.unique(np.concatenate([s[:-1] for s in sums.values()]))
    fitting = (t for t in every if costs["flops"].of(counts_at(t * (1 + 1e-9))) <= limits[0].limit)
    assert plan.counts() == counts_at(next(fitting) * (1 + 1e-9))
    full = find_plan(axes, scores, costs, limits, search="binary")
    check_plan(full, costs, scores, limits)
    assert full.loss_increase <= plan.loss_increase
    assert find_plan(axes, scores, costs, limits).loss_increase <= full.loss_increase * (1 + 1e-9)


def as_products(cost):
    """The same cost, but written as products of one changeable dimension."""
    products = tuple(
        Product(unit / 2, ((0.0, ((name, 1.0),)), (2.0, ())))
        for name, unit in cost.per_unit.items()
    )
    return replace(cost, per_unit={}, products=products)


@pytest.mark.parametrize("ratios", [{"flops": 0.7}, {"flops": 0.4}, {"flops": 0.5, "params": 0.6}])
@pytest.mark.parametrize("seed", SEEDS)
def test_without_coupling_the_plans_are_those_of_the_separable_search(seed, ratios):
    axes = [
        *small.attention(0, 4),
        *small.ffn(0, 9),
        *small.attention(1, 6, groups=3),
        channels(0, 7),
    ]
    rng = np.random.default_rng(seed)
    costs = {
        name: CostModel(name, 11.0, {a.name: float(rng.integers(1, 12)) for a in axes}, once)
        for name, once in (("flops", {}), ("params", {axes[0].name: 3.0}))
    }
    disguised = {name: as_products(cost) for name, cost in costs.items()}
    scores, limits = small.make_scores(axes, seed), small.budgets(axes, costs, **ratios)
    assert lowest_costs(axes, disguised) == lowest_costs(axes, costs)
    for search, tolerance in (("binary", 1e-9), ("lagrangian", 0.01)):
        separable = find_plan(axes, scores, costs, limits, search=search)
        coupled = find_plan(axes, scores, disguised, limits, search=search)
        assert all(coupled.costs[x.cost] <= x.limit for x in limits)
        assert coupled.loss_increase <= separable.loss_increase * (1 + tolerance)
        if search == "binary":
            assert coupled.loss_increase == pytest.approx(separable.loss_increase, rel=1e-9)


@pytest.mark.parametrize("search", sorted(STRATEGIES))
@pytest.mark.parametrize("seed", SEEDS)
def test_the_lowest_costs_can_be_planned_for(search, seed):
    axes, costs, scores = network(seed)
    lowest = lowest_costs(axes, costs)
    ones = {a.name: 1 for a in axes}
    assert lowest == {name: cost.of(ones) for name, cost in costs.items()}
    whole = small.totals(axes, costs)
    limits = small.budgets(axes, costs, flops=lowest["flops"] / whole["flops"])
    check_budgets(axes, costs, limits)
    plan = find_plan(axes, scores, costs, limits, search=search)
    assert plan.counts() == ones
    lower = small.budgets(axes, costs, flops=0.99 * lowest["flops"] / whole["flops"])
    with pytest.raises(BudgetError, match="cannot be reached in layout 'per_layer'"):
        check_budgets(axes, costs, lower)


@pytest.mark.parametrize("search", sorted(STRATEGIES))
def test_heads_neurons_and_channels_in_one_model(search):
    """A stream of channels that an attention in KV groups and an FFN read and write."""
    stream = channels(0, 12)
    axes = [stream, *small.attention(0, 6, groups=3), *small.ffn(0, 10)]
    _, groups, heads, neurons = axes
    products = tuple(
        Product(weight, (dim(0, stream), dim(0, other)))
        for weight, other in ((8.0, groups), (8.0, heads), (2.0, neurons))
    )
    cost = CostModel("flops", 9.0, {a.name: 1.0 for a in axes}, {heads.name: 5.0}, products)
    scores = small.make_scores(axes, 0)
    plans = find_plans(
        axes,
        scores,
        {"flops": cost},
        [small.budgets(axes, {"flops": cost}, flops=ratio) for ratio in (1.0, 0.7, 0.3, 0.1)],
        search=search,
    )
    assert plans[0].counts() == {a.name: a.size for a in axes}
    for plan in plans:
        kept = plan.counts()
        assert plan.costs["flops"] == cost.of(kept) <= plan.budgets[0].limit
        assert kept[stream.name] >= 1
        assert len({h // 2 for h in plan.kept[heads.name]}) == kept[groups.name]


def test_a_stock_group_shares_one_width():
    axes, costs, scores = network(3, sizes=(6, 6))
    stock = StockSpace(
        (
            StockGroup(tuple(a.name for a in axes[:2]), {"channels": "stem"}),
            StockGroup(tuple(a.name for a in axes[2:4]), {"channels": "body"}),
        )
    )
    limits = small.budgets(axes, costs, flops=0.6)
    for search in STRATEGIES:
        plan = find_plan(axes, scores, costs, limits, search=search, layout="stock", stock=stock)
        check_plan(plan, costs, scores, limits)
        first, second, third, fourth, whole = plan.counts().values()
        assert (first, third, whole) == (second, fourth, 6)


def test_the_step_of_a_plan_is_the_cheapest_unit_beside_the_others():
    axes, costs, scores = network(1)
    plan = find_plan(axes, scores, costs, small.budgets(axes, costs, flops=0.5))
    counts = plan.counts()
    steps = [
        costs["flops"].of(counts | {a.name: count}) - plan.costs["flops"]
        for a in axes
        for count in range(counts[a.name] + 1, a.size + 1)
    ]
    assert plan.steps == {"flops": min(steps)}
    assert plan.costs["flops"] + plan.steps["flops"] > plan.budgets[0].limit


@pytest.mark.parametrize("search", sorted(STRATEGIES))
def test_choices_and_scores_of_zero(search):
    axes, costs, scores = network(2)
    nothing = Scores({name: np.zeros_like(v) for name, v in scores.values.items()})
    limits = small.budgets(axes, costs, flops=0.5)
    choices = {a.name: [1, 3] for a in axes}
    plan = find_plan(axes, nothing, costs, limits, search=search, choices=choices)
    check_plan(plan, costs, nothing, limits)
    for axis in axes:
        assert len(plan.kept[axis.name]) in (1, 3, axis.size)
    # Nothing more fits: zeros are no reason to prune.
    assert plan.costs["flops"] + plan.steps["flops"] > limits[0].limit


@pytest.mark.parametrize("search", sorted(STRATEGIES))
def test_budgets_that_exclude_each_other(search):
    axes = [channels(0, 2), *small.attention(0, 2)]
    conv, heads = axes
    costs = {
        "flops": CostModel("flops", 0.0, {}, {}, (Product(1.0, (dim(0, conv), dim(1, heads))),)),
        "params": CostModel("params", 6.0, {conv.name: -3.0, heads.name: 0.0}),
    }
    # A made-up cost that falls with the channels: no plan has few of both.
    limits = small.budgets(axes, costs, flops=1 / 6)
    limits.append(replace(limits[0], cost="params", limit=1.0, total=6.0))
    with pytest.raises(BudgetError, match="no plan was found that meets all of them"):
        find_plan(axes, small.make_scores(axes, 0), costs, limits, search=search)


def test_a_deep_network_uses_its_budget_and_beats_binary():
    axes, costs, scores = network(0, count=60, sizes=(24, 48))
    limits = small.budgets(axes, costs, flops=0.5)
    plan, binary = (
        find_plan(axes, scores, costs, limits, search=s) for s in ("lagrangian", "binary")
    )
    check_plan(plan, costs, scores, limits)
    assert plan.costs["flops"] > 0.999 * limits[0].limit
    assert plan.loss_increase < 0.9 * binary.loss_increase


def test_products_of_axes_that_stay_whole_are_constant():
    axes, costs, scores = network(0)
    neurons = small.ffn(0, 5)
    both = {
        name: replace(c, per_unit={**c.per_unit, neurons[0].name: 40.0})
        for name, c in costs.items()
    }
    values = {**scores.values, neurons[0].name: np.arange(5.0)}
    limits = small.budgets([*axes, *neurons], both, flops=0.99)
    plan = find_plan([*axes, *neurons], Scores(values), both, limits, rules={"convs.*": None})
    check_plan(plan, both, Scores(values), limits)
    assert len(plan.kept[neurons[0].name]) < 5
    assert all(len(plan.kept[a.name]) == a.size for a in axes)
