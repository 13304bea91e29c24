"""Options of a block against explicit enumeration of every subset."""

from dataclasses import replace

import numpy as np
import pytest
import search_spaces as small
from searching import prunable_of

from hf_gradnas.config.limits import Rule
from hf_gradnas.errors import PlanError
from hf_gradnas.search.choices import (
    choose_counts,
    default_multiple,
    step_ratios_of,
)
from hf_gradnas.search.options import make_block, make_members
from hf_gradnas.search.space import build_space
from hf_gradnas.types import CostModel, Kind, Product, Scores, StockGroup


def block_of(axes, scores, rules=None, choices=None):
    costs = list(small.make_costs(axes).values())
    ratios = step_ratios_of(axes, costs)
    counts = choose_counts(axes, None, rules=rules or {}, step_ratios=ratios, choices=choices)
    members = make_members(axes, scores.values, tie=False)
    return make_block(axes, members=members, counts=counts, costs=costs)


def options_of(block):
    """Kept counts per option, axis by axis."""
    return [
        tuple(int(block.counts[a.kind][option]) for a in block.axes)
        for option in range(block.num_options)
    ]


@pytest.mark.parametrize(("heads", "groups"), [(5, 0), (6, 3), (6, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("seed", range(8))
def test_every_option_is_the_best_of_all_subsets_with_its_counts(heads, groups, seed):
    axes = small.attention(0, heads, groups=groups)
    scores = small.make_scores(axes, seed)
    best: dict[tuple[int, ...], float] = {}
    for kept in small.subsets(axes):
        counts = tuple(len(kept[a.name]) for a in axes)
        best[counts] = min(best.get(counts, np.inf), small.loss(axes, scores, kept))
    block = block_of(axes, scores)
    found = options_of(block)
    assert sorted(found) == sorted(best)
    for option, counts in enumerate(found):
        kept = block.kept(option)
        assert tuple(len(kept[a.name]) for a in axes) == counts
        assert block.losses.total[option] == pytest.approx(best[counts], rel=1e-12)
        assert small.loss(axes, scores, kept) == pytest.approx(best[counts], rel=1e-12)
        assert block.losses.degradation[option] == block.losses.total[option]


def test_the_degradation_of_a_block_is_that_of_its_most_degraded_member():
    axes = [*small.attention(0, 3), *small.attention(1, 3)]
    scores = {axes[0].name: np.array([1.0, 2.0, 9.0]), axes[1].name: np.array([4.0, 0.5, 0.25])}
    members = make_members(axes, scores, tie=False)
    block = make_block(
        axes,
        members=members,
        counts={Kind.HEADS: np.arange(4)},
        costs=[small.make_costs(axes)["flops"]],
    )
    assert block.losses.total.tolist() == [0, 1.25, 3.75, 16.75]
    assert block.losses.degradation.tolist() == [0, 1, 3, 12]


def test_costs_are_those_of_the_closed_form():
    axes = small.attention(0, 6, groups=3)
    block = block_of(axes, small.make_scores(axes, 0))
    for option, (groups, heads) in enumerate(options_of(block)):
        for row, name in enumerate(("flops", "params")):
            unit, once = small.UNIT_COSTS[name], 2 * small.WHILE_KEPT[name]
            expected = groups * unit["kv_groups"] + heads * unit["heads"] + once * (heads > 0)
            assert block.costs[row, option] == expected


def test_options_go_from_everything_to_nothing():
    axes = small.attention(0, 6, groups=3)
    block = block_of(axes, small.make_scores(axes, 0))
    assert options_of(block)[0] == (3, 6)
    assert options_of(block)[-1] == (0, 0)
    assert block.kept(0) == {a.name: tuple(range(a.size)) for a in axes}
    assert block.losses.total[0] == 0.0


def test_among_equal_scores_the_first_units_stay():
    for axes in (small.attention(0, 6), small.attention(0, 6, groups=3)):
        block = block_of(axes, Scores({a.name: np.ones(a.size) for a in axes}))
        for option, counts in enumerate(options_of(block)):
            kept = block.kept(option)
            assert kept[axes[0].name] == tuple(range(counts[0]))


def test_a_joint_score_can_be_worth_less_than_its_heads():
    # Group 1's heads cancel: alone each matters, together they do not.
    axes = small.attention(0, 4, groups=2)
    scores = Scores({axes[0].name: np.array([3.0, 0.1]), axes[1].name: np.array([1.0, 2, 5, 6])})
    block = block_of(axes, scores)
    option = options_of(block).index((1, 2))
    assert block.kept(option) == {axes[0].name: (0,), axes[1].name: (0, 1)}
    assert block.losses.total[option] == 0.1


@pytest.mark.parametrize(
    ("axes", "rule", "expected"),
    [
        (small.attention(0, 5), Rule(), [5, 4, 3, 2, 1, 0]),
        (small.attention(0, 5), Rule(min=2), [5, 4, 3, 2]),
        (small.attention(0, 5), Rule(multiple=2), [5, 4, 2, 0]),
        (small.attention(0, 5), Rule(min=9), [5]),
        (small.attention(0, 5), None, [5]),
        (small.ffn(0, 20), Rule(multiple=8), [20, 16, 8, 0]),
        (small.ffn(0, 20), Rule(multiple=8, min=1), [20, 16, 8]),
        (small.ffn(0, 20), Rule(multiple=64), [20, 0]),
        (small.ffn(0, 3), Rule(), [3, 2, 1, 0]),
        (small.ffn(0, 84), Rule(), [84, *range(80, -1, -8)]),
    ],
)
def test_rules_of_one_axis(axes, rule, expected):
    block = block_of(axes, small.make_scores(axes, 0), {"*": rule})
    assert [count for (count,) in options_of(block)] == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(), {(k, k * r) for k in (1, 2, 3) for r in (1, 2, 3)} | {(0, 0)}),
        (Rule(min=1), {(k, k * r) for k in (1, 2, 3) for r in (1, 2, 3)}),
        (Rule(min=3), {(3, 3), (3, 6), (3, 9)}),
        (Rule(multiple=2), {(0, 0), (2, 2), (2, 4), (2, 6), (3, 6), (3, 9)}),
        (None, {(3, 9)}),
    ],
)
def test_rules_of_nested_axes(rule, expected):
    axes = small.attention(0, 9, groups=3)
    block = block_of(axes, small.make_scores(axes, 0), {"*": rule})
    assert set(options_of(block)) == expected


@pytest.mark.parametrize(
    ("size", "step_ratio", "expected"),
    [
        (11_008, 1e-6, 64),
        (11_008, 0.01 / 64, 64),
        (11_008, 0.01 / 63, 32),
        (11_008, 0.01 / 20, 16),
        (11_008, 0.01 / 9, 8),
        (11_008, 0.01, 8),
        (400, 1e-6, 32),
        (64, 1e-6, 8),
        (63, 1e-6, 1),
        (3, 1.0, 1),
    ],
)
def test_default_multiple(size, step_ratio, expected):
    axis = small.axis("ffn", Kind.NEURONS, size)
    assert default_multiple(axis, step_ratio=step_ratio) == expected


@pytest.mark.parametrize(
    ("size", "step_ratio", "expected"),
    [
        (11_008, 0.02 / 128, 128),
        (11_008, 0.02 / 127, 64),
        (1_536, 0.01 / 20, 32),
        (1_536, 1.0, 32),  # whatever it costs
        (704, 1e-6, 64),
        (680, 1e-6, 64),  # is no multiple of 32, so that no quantiser takes it as it is
        (256, 1.0, 32),
        (224, 1e-6, 16),
        (63, 1e-6, 1),
    ],
)
def test_widths_of_models_that_generate_come_in_blocks_of_quantised_weights(
    size, step_ratio, expected
):
    axis = small.axis("ffn", Kind.NEURONS, size)
    assert default_multiple(axis, step_ratio=step_ratio, generates=True) == expected


def test_a_model_generates_where_it_has_a_cache():
    axes = [*small.ffn(0, 512), *small.ffn(1, 512)]
    costs = small.make_costs(axes)
    prunable = prunable_of(axes, costs)
    first, _ = build_space(prunable, None, ["flops"], rules={}).blocks
    assert np.diff(np.sort(first.counts[Kind.NEURONS])).min() == 8
    cached = replace(prunable, costs={**costs, "kv_cache": CostModel("kv_cache", 1.0, {})})
    first, _ = build_space(cached, None, ["flops"], rules={}).blocks
    assert np.diff(np.sort(first.counts[Kind.NEURONS])).min() == 32


def with_totals(axes, *, flops, params=1e9):
    """Unit costs of `search_spaces` in a model of these totals."""
    whole = {a.name: a.size for a in axes}
    costs = small.make_costs(axes)
    return [
        replace(costs[name], constant=costs[name].constant + total - costs[name].of(whole))
        for name, total in (("flops", flops), ("params", params))
    ]


def smallest_neurons(axes, costs):
    ratios = step_ratios_of([*axes], costs)
    counts = choose_counts(axes[:1], None, rules={}, step_ratios=ratios)
    return np.sort(counts[Kind.NEURONS])[1]


def test_the_default_multiple_obeys_every_budgeted_cost():
    axes = small.ffn(0, 2048)
    # One neuron costs 2 of 20,000 FLOPs and 3 of 10,000 parameters: 32 x 3 is 0.96 %.
    both = with_totals(axes, flops=20_000.0, params=10_000.0)
    assert smallest_neurons(axes, both) == 32
    assert smallest_neurons(axes, both[:1]) == 64


def test_the_default_multiple_counts_the_step_of_all_ffns():
    axes = [*small.ffn(0, 2048), *small.ffn(1, 2048)]
    # One neuron in both costs 4 of 20,000 FLOPs: 32 x 4 is 0.64 %.
    assert smallest_neurons(axes, with_totals(axes, flops=20_000.0)[:1]) == 32


# -- channels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "width", "step_ratio", "expected"),
    [
        (512, 1, 1e-6, 32),
        (512, 1, 0.01 / 32, 32),
        (512, 1, 0.01 / 31, 16),
        (512, 1, 0.01 / 15, 8),
        (512, 1, 0.01 / 7, 1),
        (255, 1, 1e-6, 16),
        (63, 1, 1e-6, 1),
        (128, 4, 1e-6, 8),
        (512, 64, 1e-6, 1),
        (512, 3, 1e-6, 32),
    ],
)
def test_channel_multiple(size, width, step_ratio, expected):
    axis = small.axis("conv", Kind.CHANNELS, size, width=width)
    assert default_multiple(axis, step_ratio=step_ratio) == expected


def test_the_step_of_channels_is_the_slope_of_the_products():
    first, second = (small.axis(name, Kind.CHANNELS, size) for name, size in (("a", 6), ("b", 4)))
    second = small.axis("b", Kind.CHANNELS, 4, width=2)
    product = Product(5.0, ((1.0, ((first.name, 2.0),)), (0.0, ((second.name, 3.0),))))
    cost = CostModel("flops", 10.0, {first.name: 7.0}, {}, (product,))
    total = cost.of({first.name: 6, second.name: 4})
    slopes = 7 + 5 * 2 * 12, 5 * 13 * 3
    ratio = step_ratios_of([first, second], [cost])[Kind.CHANNELS]
    assert ratio == pytest.approx((slopes[0] + slopes[1] / 2) / total)


def test_channels_keep_at_least_their_minimum():
    axis = replace(small.axis("conv", Kind.CHANNELS, 20), minimum=1)
    found = choose_counts([axis], None, rules={}, step_ratios={Kind.CHANNELS: 1.0})
    assert sorted(found[Kind.CHANNELS]) == list(range(1, 21))
    found = choose_counts(
        [axis], None, rules={"*": Rule(min=3, multiple=5)}, step_ratios={Kind.CHANNELS: 1.0}
    )
    assert sorted(found[Kind.CHANNELS]) == [5, 10, 15, 20]


# -- choices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "chosen", "expected"),
    [
        (small.attention(0, 5), [1, 4], [5, 4, 1]),
        (small.attention(0, 5), [], [5]),
        (small.ffn(0, 84), [0, 13, 13, 84], [84, 13, 0]),
    ],
)
def test_choices_take_the_place_of_rules_and_multiples(axes, chosen, expected):
    for rules in ({}, {"*": None}, {"*": Rule(min=9, multiple=4)}):
        block = block_of(axes, small.make_scores(axes, 0), rules, {axes[0].name: chosen})
        assert [count for (count,) in options_of(block)] == expected


def test_chosen_groups_keep_all_their_heads():
    axes = small.attention(0, 9, groups=3)
    block = block_of(axes, small.make_scores(axes, 0), None, {axes[0].name: [1]})
    assert set(options_of(block)) == {(1, 3), (3, 9)}


def test_choices_in_a_stock_group_must_suit_all_its_axes():
    axes = [*small.ffn(0, 8), *small.ffn(1, 8), *small.ffn(2, 8)]
    group = StockGroup(tuple(a.name for a in axes), {"neurons": "size"})
    choices = {axes[0].name: [2, 4, 6], axes[1].name: [3, 4, 6]}
    counts = choose_counts(
        axes,
        group,
        rules={"layers.2.*": Rule(min=5)},
        step_ratios={Kind.NEURONS: 1.0},
        choices=choices,
    )
    assert sorted(counts[Kind.NEURONS]) == [6, 8]


@pytest.mark.parametrize(
    ("axes", "index", "chosen", "message"),
    [
        (small.attention(0, 9, groups=3), 1, [3], "heads that are in KV groups.*give them for"),
        (small.ffn(0, 5), 0, [6], "found 6, needed counts from 0 to 5; leave"),
        (small.ffn(0, 5), 0, [-1], "found -1, needed counts from 0 to 5; leave"),
    ],
)
def test_choices_that_an_axis_cannot_have(axes, index, chosen, message):
    with pytest.raises(PlanError, match=message):
        block_of(axes, small.make_scores(axes, 0), None, {axes[index].name: chosen})


@pytest.mark.parametrize(
    ("groups", "whole", "expected"),
    [
        (0, {0}, {(6,)}),
        (2, {0}, {(2, 2), (2, 4), (2, 6)}),  # the groups stay: each keeps as many heads
        (2, {1}, {(2, 6)}),
        (2, {0, 1}, {(2, 6)}),
    ],
)
def test_axes_without_scores_stay_whole(groups, whole, expected):
    axes = small.attention(0, 6, groups=groups)
    names = {axes[index].name for index in whole}
    counts = choose_counts(axes, None, rules={}, step_ratios={}, whole=names)
    found = set(zip(*(counts[axis.kind].tolist() for axis in axes), strict=True))
    assert found == expected
