"""Plans that the unmodified class can express: one width per kind for all layers of a group."""

import itertools

import numpy as np
import pytest
import search_spaces as small
from searching import check_budgets, find_plan, lowest_costs

from hf_gradnas.config.limits import Rule
from hf_gradnas.errors import BudgetError, PlanError
from hf_gradnas.search import STRATEGIES
from hf_gradnas.types import Kind, StockGroup, StockSpace

LAYERS = range(3)
KEYS = {"heads": "num_attention_heads", "kv_groups": "num_key_value_heads"}


def llama(heads=6, groups=3, neurons=5, tied=""):
    return [
        a
        for layer in LAYERS
        for a in (
            *small.attention(layer, heads, groups=groups, tied=tied),
            *small.ffn(layer, neurons),
        )
    ]


def names(axes, *kinds):
    return tuple(a.name for a in axes if a.kind in kinds)


def space_of(axes, *, allowed=None, allowed_neurons=None):
    return StockSpace(
        (
            StockGroup(names(axes, Kind.HEADS, Kind.KV_GROUPS), KEYS, allowed),
            StockGroup(names(axes, Kind.NEURONS), {"neurons": "size"}, allowed_neurons),
        )
    )


def widths(plan, axes):
    """The one width of each kind; fails where layers differ."""
    found = {}
    for a in axes:
        assert found.setdefault(a.kind, len(plan.kept[a.name])) == len(plan.kept[a.name])
    return found


def smallest_loss(axes, scores, costs, limits):
    """By brute force over all widths, every layer choosing its own units."""
    best: dict[str, dict[tuple[int, ...], float]] = {}
    for family in small.families(axes):
        table = best.setdefault(family[0].name, {})
        for kept in small.subsets(family):
            counts = tuple(len(kept[a.name]) for a in family)
            table[counts] = min(table.get(counts, np.inf), small.loss(family, scores, kept))
    attention = [f for f in small.families(axes) if len(f) == 2]
    ffns = [f for f in small.families(axes) if len(f) == 1]
    smallest = np.inf
    for pair, width in itertools.product(best[attention[0][0].name], best[ffns[0][0].name]):
        if min(*pair, *width) < 1:
            continue
        counts = {f[0].name: pair[0] for f in attention} | {f[1].name: pair[1] for f in attention}
        counts |= {f[0].name: width[0] for f in ffns}
        if all(costs[limit.cost].of(counts) <= limit.limit for limit in limits):
            value = sum(best[f[0].name][pair] for f in attention)
            smallest = min(smallest, value + sum(best[f[0].name][width] for f in ffns))
    return smallest


@pytest.mark.parametrize("ratios", [{"flops": 0.8}, {"params": 0.5}, {"flops": 0.6, "params": 0.6}])
@pytest.mark.parametrize("seed", range(8))
def test_lagrangian_is_optimal(seed, ratios):
    axes = llama()
    costs, scores = small.make_costs(axes), small.make_scores(axes, seed)
    limits = small.budgets(axes, costs, **ratios)
    plan = find_plan(axes, scores, costs, limits, layout="stock", stock=space_of(axes))
    assert plan.layout == "stock"
    widths(plan, axes)
    assert all(plan.costs[limit.cost] <= limit.limit for limit in limits)
    best = smallest_loss(axes, scores, costs, limits)
    assert plan.loss_increase == pytest.approx(best, rel=1e-9)
    if len(limits) == 1:
        assert limits[0].limit - plan.costs[limits[0].cost] < plan.steps[limits[0].cost]


@pytest.mark.parametrize("search", STRATEGIES)
def test_layers_choose_their_own_units(search):
    axes = llama(neurons=40)
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    limits = small.budgets(axes, costs, flops=0.6)
    plan = find_plan(
        axes, scores, costs, limits, search=search, layout="stock", stock=space_of(axes)
    )
    count = widths(plan, axes)[Kind.NEURONS]
    for a in axes:
        if a.kind == Kind.NEURONS:
            best = np.argsort(-scores.values[a.name])[:count]
            assert plan.kept[a.name] == tuple(sorted(best))
    assert len({plan.kept[name] for name in names(axes, Kind.NEURONS)}) > 1


def test_tied_axes_keep_the_same_units():
    axes = [a for n in LAYERS for a in (*small.attention(n, 5, tied="bias"), *small.ffn(n, 4))]
    costs, scores = small.make_costs(axes), small.make_scores(axes, 1)
    heads = names(axes, Kind.HEADS)
    stock = StockSpace((StockGroup(heads, {"heads": "num_heads"}),))
    limits = small.budgets(axes, costs, flops=0.7)
    plan = find_plan(axes, scores, costs, limits, layout="stock", stock=stock)
    together = np.sum([scores.values[name] for name in heads], axis=0)
    count = widths(plan, [a for a in axes if a.kind == Kind.HEADS])[Kind.HEADS]
    assert 0 < count < 5
    assert {plan.kept[name] for name in heads} == {
        tuple(sorted(np.argsort(-together)[:count].tolist()))
    }
    assert plan.loss_increase == pytest.approx(np.sort(together)[: 5 - count].sum())
    # The key binds in a stock checkpoint only.
    free = find_plan(axes, scores, costs, limits)
    assert len({free.kept[name] for name in heads}) > 1


def test_tied_nested_axes_keep_the_same_groups_and_heads():
    axes = llama(tied="bias")
    costs, scores = small.make_costs(axes), small.make_scores(axes, 2)
    limits = small.budgets(axes, costs, params=0.5)
    plan = find_plan(axes, scores, costs, limits, layout="stock", stock=space_of(axes))
    assert len({plan.kept[name] for name in names(axes, Kind.KV_GROUPS)}) == 1
    assert len({plan.kept[name] for name in names(axes, Kind.HEADS)}) == 1
    assert len({plan.kept[name] for name in names(axes, Kind.NEURONS)}) > 1


@pytest.mark.parametrize("search", STRATEGIES)
def test_only_allowed_counts_are_used(search):
    axes = llama(neurons=64)
    allowed = ({"heads": 3, "kv_groups": 3}, {"heads": 2, "kv_groups": 1})
    space = space_of(axes, allowed=allowed, allowed_neurons=({"neurons": 36}, {"neurons": 60}))
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    for ratio in (0.95, 0.8, 0.6):
        limits = small.budgets(axes, costs, flops=ratio)
        plan = find_plan(axes, scores, costs, limits, search=search, layout="stock", stock=space)
        found = widths(plan, axes)
        assert (found[Kind.HEADS], found[Kind.KV_GROUPS]) in {(6, 3), (3, 3), (2, 1)}
        # Neither is a multiple of 8, the default here.
        assert found[Kind.NEURONS] in {36, 60, 64}


def test_widths_follow_the_default_multiple_where_the_class_allows():
    axes = llama(neurons=128)
    even = tuple({"neurons": count} for count in range(2, 129, 2))
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    for space in (space_of(axes), space_of(axes, allowed_neurons=even)):
        for ratio in (0.9, 0.7, 0.5, 0.3):
            limits = small.budgets(axes, costs, flops=ratio)
            plan = find_plan(axes, scores, costs, limits, layout="stock", stock=space)
            assert widths(plan, axes)[Kind.NEURONS] % 8 == 0


def test_nothing_is_removed_altogether():
    axes = llama()
    costs = small.make_costs(axes)
    lowest = lowest_costs(axes, costs, layout="stock", stock=space_of(axes))
    counts = {a.name: 1 for a in axes}
    assert lowest == {name: cost.of(counts) for name, cost in costs.items()}


def test_axes_of_no_group_stay_whole():
    axes = llama()
    stock = StockSpace(space_of(axes).groups[1:], {})
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    limits = small.budgets(axes, costs, flops=0.9)
    plan = find_plan(axes, scores, costs, limits, layout="stock", stock=stock)
    assert widths(plan, axes)[Kind.HEADS] == 6
    assert widths(plan, axes)[Kind.KV_GROUPS] == 3
    assert widths(plan, axes)[Kind.NEURONS] < 5
    with pytest.raises(
        BudgetError, match=r"in layout 'stock'; the lowest is .*'per_layer' reaches"
    ):
        check_budgets(
            axes, costs, small.budgets(axes, costs, flops=0.2), layout="stock", stock=stock
        )


@pytest.mark.parametrize("kept_back", [Kind.HEADS, Kind.KV_GROUPS])
def test_heads_and_groups_of_which_one_has_no_key(kept_back):
    axes = llama(neurons=40)
    other = Kind.KV_GROUPS if kept_back == Kind.HEADS else Kind.HEADS
    neurons = StockGroup(names(axes, Kind.NEURONS), {"neurons": "size"})
    stock = StockSpace((StockGroup(names(axes, other), KEYS), neurons))
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    limits = small.budgets(axes, costs, flops=0.6)
    plan = find_plan(axes, scores, costs, limits, layout="stock", stock=stock)
    assert widths(plan, axes)[Kind.KV_GROUPS] == 3
    assert widths(plan, axes)[Kind.HEADS] in ({6} if kept_back == Kind.HEADS else {3, 6})


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"*.1.ffn": None}, {5}),
        ({"*.1.ffn": Rule(min=4)}, {4, 5}),
        ({"*.0.ffn": Rule(multiple=2), "*.1.ffn": Rule(multiple=4)}, {4, 5}),
        ({"*.1.ffn": Rule(min=9)}, {5}),
    ],
)
def test_the_strictest_rule_of_a_group_holds_for_all_its_layers(rules, expected):
    axes = llama()
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    stock = space_of(axes)
    lowest = lowest_costs(axes, costs, layout="stock", rules=rules, stock=stock)["flops"]
    for ratio in (0.9, 0.75, 0.6):
        limits = small.budgets(axes, costs, flops=ratio)
        if limits[0].limit >= lowest:
            plan = find_plan(axes, scores, costs, limits, layout="stock", rules=rules, stock=stock)
            assert widths(plan, axes)[Kind.NEURONS] in expected


def test_a_group_of_an_unknown_axis():
    axes = llama()
    costs = small.make_costs(axes)
    stock = StockSpace((StockGroup(("layers.9.ffn:neurons",), {"neurons": "size"}),))
    with pytest.raises(PlanError, match=r"'layers.9.ffn:neurons' is not among the 9 axes"):
        lowest_costs(axes, costs, layout="stock", stock=stock)


def test_a_group_of_different_sizes():
    axes = [*small.ffn(0, 4), *small.ffn(1, 5)]
    stock = StockSpace((StockGroup(names(axes, Kind.NEURONS), {"neurons": "size"}),))
    message = r"one width per kind .*layers.0.ffn:neurons: 4, layers.1.ffn:neurons: 5"
    with pytest.raises(PlanError, match=message):
        lowest_costs(axes, small.make_costs(axes), layout="stock", stock=stock)


@pytest.mark.parametrize("search", STRATEGIES)
def test_budgets_that_exclude_each_other(search):
    # Three heads in three groups need fewer FLOPs, four heads in two groups fewer parameters.
    axes = small.attention(0, 6, groups=3)
    costs, scores = small.make_costs(axes), small.make_scores(axes, 0)
    allowed = ({"heads": 3, "kv_groups": 3}, {"heads": 4, "kv_groups": 2})
    stock = StockSpace((StockGroup(names(axes, Kind.HEADS, Kind.KV_GROUPS), KEYS, allowed),))
    lowest = lowest_costs(axes, costs, layout="stock", stock=stock)
    whole = small.totals(axes, costs)
    limits = small.budgets(axes, costs, **{n: lowest[n] / whole[n] for n in lowest})
    with pytest.raises(BudgetError, match=r"flops=.* and params=.*no plan .* meets all"):
        find_plan(axes, scores, costs, limits, search=search, layout="stock", stock=stock)
