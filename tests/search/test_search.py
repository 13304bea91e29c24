"""Plans against brute force, what budgets they meet, and every complaint."""

from dataclasses import replace

import numpy as np
import pytest
import search_spaces as small
from searching import check_budgets, find_plan, find_plans, lowest_costs

from hf_gradnas.config.limits import Rule
from hf_gradnas.errors import BudgetError, PlanError, ScoresError
from hf_gradnas.search import STRATEGIES
from hf_gradnas.types import Budget, CostModel, Kind, Scores

AXES = [
    *small.attention(0, 3),
    *small.ffn(0, 5),
    *small.attention(1, 4, groups=2),
    *small.ffn(1, 4),
    *small.attention(2, 6, groups=3),
]
SEEDS = range(12)


def check_plan(plan, axes, scores, costs, limits):
    """What holds for every plan: it meets its limits and says of itself what is true."""
    assert list(plan.kept) == [a.name for a in axes]
    assert plan.sizes == {a.name: a.size for a in axes}
    for name, cost in costs.items():
        assert plan.costs[name] == cost.of(plan.counts())
    for limit in limits:
        assert plan.costs[limit.cost] <= limit.limit
    for units in plan.kept.values():
        assert list(units) == sorted(set(units))
        assert all(type(unit) is int for unit in units)
    by_hand = sum(small.loss(family, scores, plan.kept) for family in small.families(axes))
    assert plan.loss_increase == pytest.approx(by_hand, rel=1e-9)
    for family in small.families(axes):
        if len(family) > 1:
            per_group = family[1].size // family[0].size
            groups = [unit // per_group for unit in plan.kept[family[1].name]]
            assert tuple(sorted(set(groups))) == plan.kept[family[0].name]
            assert len({groups.count(group) for group in groups}) <= 1


@pytest.mark.parametrize("ratio", [0.95, 0.7, 0.45, 0.2])
@pytest.mark.parametrize("seed", SEEDS)
def test_lagrangian_is_optimal_for_one_budget(seed, ratio):
    costs, scores = small.make_costs(AXES, seed), small.make_scores(AXES, seed)
    limits = small.budgets(AXES, costs, flops=ratio)
    plan = find_plan(AXES, scores, costs, limits)
    check_plan(plan, AXES, scores, costs, limits)
    best = small.smallest_loss(AXES, scores, costs, limits)
    assert plan.loss_increase == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("flops", "params"), [(0.8, 0.8), (0.6, 0.7), (0.5, 0.45), (0.3, 0.3)])
@pytest.mark.parametrize("seed", SEEDS)
def test_lagrangian_is_optimal_for_two_budgets(seed, flops, params):
    costs, scores = small.make_costs(AXES, seed), small.make_scores(AXES, seed)
    limits = small.budgets(AXES, costs, flops=flops, params=params)
    plan = find_plan(AXES, scores, costs, limits)
    check_plan(plan, AXES, scores, costs, limits)
    best = small.smallest_loss(AXES, scores, costs, limits)
    assert plan.loss_increase == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_lagrangian_is_optimal_under_rules(seed):
    costs, scores = small.make_costs(AXES, seed), small.make_scores(AXES, seed)
    rules = {
        "*": Rule(min=1),
        "*ffn": Rule(multiple=2),
        "*.0.attention": None,
        "*.2.attention": Rule(min=2, multiple=2),
    }
    sizes = {a.name: a.size for a in AXES}

    def permitted(kept):
        for name, units in kept.items():
            count, whole = len(units), len(units) == sizes[name]
            if name.startswith("layers.0.attention") and not whole:
                return False
            least = 2 if name.startswith("layers.2.attention") else 0 if "ffn" in name else 1
            even = "ffn" in name or name.startswith("layers.2.attention")
            if count < least or (even and count % 2 and not whole):
                return False
        return True

    limits = small.budgets(AXES, costs, flops=0.65, params=0.7)
    plan = find_plan(AXES, scores, costs, limits, rules=rules)
    check_plan(plan, AXES, scores, costs, limits)
    assert permitted(plan.kept)
    best = small.smallest_loss(AXES, scores, costs, limits, permitted=permitted)
    assert plan.loss_increase == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("search", STRATEGIES)
@pytest.mark.parametrize("factor", [1e-30, 1e-300, 1e200])
def test_the_unit_of_the_scores_does_not_matter(search, factor):
    costs, scores = small.make_costs(AXES, 0), small.make_scores(AXES, 0)
    limits = small.budgets(AXES, costs, flops=0.6, params=0.6)
    plan = find_plan(AXES, scores, costs, limits, search=search)
    same = find_plan(AXES, small.scaled(scores, factor), costs, limits, search=search)
    assert same.kept == plan.kept
    assert same.loss_increase == pytest.approx(factor * plan.loss_increase)


def test_sums_of_huge_scores_do_not_overflow():
    costs, scores = small.make_costs(AXES, 0), small.make_scores(AXES, 0)
    limits = small.budgets(AXES, costs, flops=0.2)
    plan = find_plan(AXES, scores, costs, limits)
    assert find_plan(AXES, small.scaled(scores, 1e306), costs, limits).kept == plan.kept


@pytest.mark.parametrize("search", STRATEGIES)
def test_the_unit_of_the_costs_does_not_matter(search):
    costs, scores = small.make_costs(AXES, 0), small.make_scores(AXES, 0)
    whole = small.totals(AXES, costs)["flops"]
    plan = find_plan(AXES, scores, costs, [Budget("flops", 0.5 * whole, whole)], search=search)
    flops = costs["flops"]
    larger = type(flops)(
        "flops", 2.0**40 * flops.constant, {k: 2.0**40 * v for k, v in flops.per_unit.items()}
    )
    limit = Budget("flops", 2.0**39 * whole, 2.0**40 * whole)
    assert find_plan(AXES, scores, {"flops": larger}, [limit], search=search).kept == plan.kept


@pytest.mark.parametrize("search", STRATEGIES)
@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.35])
def test_equal_scores_prune_no_more_than_needed_and_not_all_in_one_place(search, value, ratio):
    axes = [a for layer in range(6) for a in (*small.attention(layer, 8), *small.ffn(layer, 32))]
    costs = small.make_costs(axes)
    scores = Scores({a.name: np.full(a.size, value) for a in axes})
    limits = small.budgets(axes, costs, flops=ratio)
    plan = find_plan(axes, scores, costs, limits, search=search)
    check_plan(plan, axes, scores, costs, limits)
    # Without scores the cheapest unit, a neuron, fills up; else the costliest, a head, goes first.
    assert limits[0].limit - plan.costs["flops"] < (7.0 if value else 2.0)
    for kind in (Kind.HEADS, Kind.NEURONS):
        counts = [len(plan.kept[a.name]) for a in axes if a.kind == kind]
        if value == 0.0:
            assert max(counts) - min(counts) <= 1


def test_units_without_score_go_first_but_only_as_many_as_needed():
    axes = [*small.ffn(0, 40), *small.ffn(1, 40)]
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    for values in scores.values.values():
        values[::2] = 0.0
    limits = small.budgets(axes, costs, flops=0.8)
    plan = find_plan(axes, scores, costs, limits)
    assert plan.loss_increase == 0.0
    assert limits[0].limit - plan.costs["flops"] < 2.0
    assert all(set(range(1, 40, 2)) <= set(units) for units in plan.kept.values())


@pytest.mark.parametrize("search", STRATEGIES)
@pytest.mark.parametrize("seed", range(3))
def test_per_layer_plans_stay_within_a_point_and_a_half_of_their_budget(search, seed):
    axes = [a for n in range(6) for a in (*small.attention(n, 8, groups=4), *small.ffn(n, 704))]
    costs, scores = small.make_costs(axes), small.make_scores(axes, seed)
    for ratio in (0.9, 0.7, 0.5):
        limits = small.budgets(axes, costs, params=ratio)
        plan = find_plan(axes, scores, costs, limits, search=search)
        check_plan(plan, axes, scores, costs, limits)
        assert plan.costs["params"] > (ratio - 0.015) * limits[0].total
        assert 0 <= limits[0].limit - plan.costs["params"] < plan.steps["params"]


@pytest.mark.parametrize("search", STRATEGIES)
def test_a_budget_of_100_percent_keeps_everything(search):
    costs, scores = small.make_costs(AXES), small.make_scores(AXES, 0)
    limits = small.budgets(AXES, costs, flops=1.0, params=1.0)
    plan = find_plan(AXES, scores, costs, limits, search=search)
    assert plan.counts() == plan.sizes
    assert plan.loss_increase == 0.0
    # One neuron is the least that a block can do without.
    assert plan.steps == {"flops": 2.0, "params": 3.0}


@pytest.mark.parametrize("search", STRATEGIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_lowest_costs_can_be_planned_for(search, seed):
    costs, scores = small.make_costs(AXES, seed), small.make_scores(AXES, seed)
    rules = {"*ffn": Rule(min=2), "*.1.attention": Rule(min=1)}
    lowest = lowest_costs(AXES, costs, rules=rules)
    limits = [Budget(name, lowest[name], small.totals(AXES, costs)[name]) for name in lowest]
    check_budgets(AXES, costs, limits, rules=rules)
    plan = find_plan(AXES, scores, costs, limits, search=search, rules=rules)
    assert plan.costs == lowest


def test_lowest_costs_without_rules_are_the_constants():
    costs = small.make_costs(AXES)
    assert lowest_costs(AXES, costs) == small.CONSTANTS
    limits = small.budgets(AXES, costs, params=0.5)
    assert lowest_costs(AXES, costs, budgets=limits) == {"params": small.CONSTANTS["params"]}


def test_many_budgets_give_the_same_plans_as_one_by_one():
    costs, scores = small.make_costs(AXES, 3), small.make_scores(AXES, 3)
    many = [
        small.budgets(AXES, costs, **ratios)
        for ratios in ({"flops": 0.8}, {"params": 0.5}, {"flops": 0.5, "params": 0.6})
    ]
    plans = find_plans(AXES, scores, costs, many)
    assert plans == [find_plan(AXES, scores, costs, limits) for limits in many]
    assert [plan.budgets for plan in plans] == [tuple(limits) for limits in many]


@pytest.mark.parametrize("search", STRATEGIES)
def test_a_plan_says_how_it_was_made_and_survives_json(search, tmp_path):
    costs, scores = small.make_costs(AXES), small.make_scores(AXES, 0)
    limits = small.budgets(AXES, costs, flops=0.5)
    plan = find_plan(AXES, scores, costs, limits, search=search)
    assert (plan.search, plan.score, plan.layout) == (search, "drawn", "per_layer")
    plan.save(tmp_path / "plan.json")
    assert type(plan).load(tmp_path / "plan.json") == plan


def test_a_model_without_axes_is_whole():
    costs = {"flops": small.make_costs([])["flops"]}
    plan = find_plan([], Scores({}), costs, [Budget("flops", 11.0, 11.0)])
    assert plan.kept == {}
    assert plan.steps == {"flops": 0.0}
    with pytest.raises(BudgetError, match=r"the lowest is 100.00% \(11 of 11\)"):
        find_plan([], Scores({}), costs, [Budget("flops", 10.0, 11.0)])


# -- binary ------------------------------------------------------------------------------------


def cheapest_within(family, scores, threshold, price):
    """By hand: the plan of one block with a degradation of at most the threshold."""
    within = [k for k in small.subsets(family) if small.loss(family, scores, k) <= threshold]
    names = [a.name for a in family]
    return min(
        within,
        key=lambda k: (sum(price[n] * len(k[n]) for n in names), small.loss(family, scores, k)),
    )


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_binary_is_the_smallest_threshold_on_the_sum_of_an_axis(seed, ratio):
    """Without filling up, the plan is the threshold's own, nested axes and all."""
    costs, scores = small.make_costs(AXES, seed), small.make_scores(AXES, seed)
    limits = small.budgets(AXES, costs, flops=ratio)
    plan = find_plan(AXES, scores, costs, limits, search="binary", fill=False)
    check_plan(plan, AXES, scores, costs, limits)
    families = small.families(AXES)

    def plan_at(threshold):
        kept = {}
        for family in families:
            price = costs["flops"].per_unit
            kept |= cheapest_within(family, scores, threshold, price)
        return kept

    threshold = max(small.loss(family, scores, plan.kept) for family in families)
    smaller = max(
        loss
        for family in families
        for kept in small.subsets(family)
        if (loss := small.loss(family, scores, kept)) < threshold * (1 - 1e-9)
    )
    assert plan.kept == plan_at(threshold * (1 + 1e-9))
    too_dear = {name: len(units) for name, units in plan_at(smaller).items()}
    assert costs["flops"].of(too_dear) > limits[0].limit


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_filling_up_keeps_more_within_the_threshold(seed, ratio):
    costs, scores = small.make_costs(AXES, seed), small.make_scores(AXES, seed)
    limits = small.budgets(AXES, costs, flops=ratio)
    bare, full = (
        find_plan(AXES, scores, costs, limits, search="binary", fill=fill) for fill in (False, True)
    )
    check_plan(full, AXES, scores, costs, limits)
    assert full.loss_increase <= bare.loss_increase
    degradation = [
        max(small.loss(family, scores, plan.kept) for family in small.families(AXES))
        for plan in (bare, full)
    ]
    assert degradation[1] <= degradation[0]


def test_binary_spares_an_axis_of_many_small_scores():
    """Eight neurons of 1 degrade their FFN by more than one head of 5 its attention."""
    axes = [*small.attention(0, 2), *small.ffn(0, 8)]
    scores = Scores({axes[0].name: np.array([5.0, 9.0]), axes[1].name: np.ones(8)})
    costs = {"flops": CostModel("flops", 0.0, {axes[0].name: 8.0, axes[1].name: 1.0})}
    limits = small.budgets(axes, costs, flops=0.5)
    plan = find_plan(axes, scores, costs, limits, search="binary", fill=False)
    assert plan.counts() == {axes[0].name: 1, axes[1].name: 3}


# -- choices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("search", sorted(STRATEGIES))
def test_explicit_choices_bind_the_plan_and_what_can_be_reached(search):
    axes = [*small.attention(0, 4), *small.ffn(0, 100)]
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    choices = {axes[1].name: [33, 77]}
    limits = small.budgets(axes, costs, flops=0.7)
    plan = find_plan(axes, scores, costs, limits, search=search, choices=choices)
    check_plan(plan, axes, scores, costs, limits)
    assert len(plan.kept[axes[1].name]) in (33, 77)
    lowest = lowest_costs(axes, costs, choices=choices)
    assert lowest["flops"] == costs["flops"].of({axes[0].name: 0, axes[1].name: 33})
    check_budgets(axes, costs, limits, choices=choices)
    with pytest.raises(BudgetError, match="cannot be reached"):
        check_budgets(axes, costs, small.budgets(axes, costs, flops=0.3), choices=choices)
    check_budgets(axes, costs, small.budgets(axes, costs, flops=0.3))


def test_choices_of_an_unknown_axis():
    axes = small.ffn(0, 4)
    with pytest.raises(PlanError, match="no such axis among the 1 of the model"):
        lowest_costs(axes, small.make_costs(axes), choices={"nowhere:neurons": [1]})


# -- complaints --------------------------------------------------------------------------------


def test_unreachable_budgets_say_what_can_be_reached():
    costs, scores = small.make_costs(AXES), small.make_scores(AXES, 0)
    rules = {"*ffn": Rule(min=3), "*attention": None}
    limits = small.budgets(AXES, costs, flops=0.5)
    lowest = lowest_costs(AXES, costs, rules=rules)["flops"]
    percent = np.ceil(1e4 * lowest / limits[0].total) / 100
    message = rf"budget flops: 50% .* layout 'per_layer'; the lowest is {percent:.2f}% \({lowest:g}"
    with pytest.raises(BudgetError, match=message):
        check_budgets(AXES, costs, limits, rules=rules)
    with pytest.raises(BudgetError, match=message):
        find_plan(AXES, scores, costs, limits, rules=rules)


def test_no_budget():
    costs, scores = small.make_costs(AXES), small.make_scores(AXES, 0)
    with pytest.raises(BudgetError, match="found none, needed at least one limit"):
        find_plan(AXES, scores, costs, [])


def test_a_budget_on_an_unknown_cost():
    costs, scores = small.make_costs(AXES), small.make_scores(AXES, 0)
    with pytest.raises(BudgetError, match="latency: unknown cost, known are flops, params"):
        find_plan(AXES, scores, costs, [Budget("latency", 1.0, 2.0)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"search": "greedy"}, "search 'greedy': unknown strategy, known are binary, lagrangian"),
        ({"layout": "auto"}, "layout 'auto': unknown; use 'per_layer' or 'stock'"),
        ({"layout": "stock"}, "layout 'stock': found no group in the stock space"),
    ],
)
def test_unknown_choices(changed, message):
    costs, scores = small.make_costs(AXES), small.make_scores(AXES, 0)
    limits = small.budgets(AXES, costs, flops=0.5)
    with pytest.raises(PlanError, match=message):
        find_plan(AXES, scores, costs, limits, **changed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "layers.0.ffn:neurons: the scores hold no such axis, only 6 others"),
        (np.ones(4), r"layers.0.ffn:neurons: scores have the shape \(4,\), needed \(5,\)"),
        ([1, np.nan, 1, np.nan, 1], "neurons: 2 of 5 scores are not finite, the first for unit 1"),
        ([1, 1, np.inf, 1, 1], "neurons: 1 of 5 scores are not finite, the first for unit 2"),
        ([1, 1, 1, 1, -1e-9], "neurons: 1 of 5 scores are negative, the first for unit 4"),
    ],
)
def test_scores_that_do_not_fit(values, message):
    costs, scores = small.make_costs(AXES), small.make_scores(AXES, 0)
    changed = dict(scores.values)
    del changed["layers.0.ffn:neurons"]
    if values is not None:
        changed["layers.0.ffn:neurons"] = np.asarray(values, dtype=float)
    limits = small.budgets(AXES, costs, flops=0.5)
    with pytest.raises(ScoresError, match=message):
        find_plan(AXES, Scores(changed), costs, limits)


def test_a_module_that_cannot_go_altogether_keeps_one_unit():
    axes = [replace(axis, minimum=1) for axis in small.attention(0, 4)]
    costs = small.make_costs(axes)
    lowest = lowest_costs(axes, costs, layout="per_layer")
    assert lowest["params"] == costs["params"].of({axes[0].name: 1})
