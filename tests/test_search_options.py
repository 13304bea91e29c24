"""Options of a block against explicit enumeration of every subset."""

import numpy as np
import pytest
import search_spaces as small

from hf_gradnas.config.rules import Rule
from hf_gradnas.search.choices import choose_counts, default_multiple
from hf_gradnas.search.options import make_block, make_members
from hf_gradnas.types import Kind, Scores


def block_of(axes, scores, rules=None):
    costs = list(small.make_costs(axes).values())
    whole = [cost.of({a.name: a.size for a in axes}) for cost in costs]
    neurons = [a.name for a in axes if a.kind == Kind.NEURONS]
    counts = choose_counts(
        axes, None, rules=rules or {}, costs=costs, totals=whole, neurons=neurons
    )
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
        worst = max(small.pruned_scores(axes, scores, kept), default=-np.inf)
        assert block.losses.worst[option] == worst


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
    assert default_multiple(size, step_ratio=step_ratio) == expected


def test_the_default_multiple_obeys_every_budgeted_cost():
    axes = small.ffn(0, 2048)
    costs = small.make_costs(axes)
    both = [costs["flops"], costs["params"]]
    # One neuron costs 2 of 20,000 FLOPs and 3 of 10,000 parameters: 32 x 3 is 0.96 %.
    names = [axes[0].name]
    counts = choose_counts(
        axes, None, rules={}, costs=both, totals=[20_000.0, 10_000.0], neurons=names
    )
    assert np.sort(counts[Kind.NEURONS])[1] == 32
    counts = choose_counts(axes, None, rules={}, costs=both[:1], totals=[20_000.0], neurons=names)
    assert np.sort(counts[Kind.NEURONS])[1] == 64


def test_the_default_multiple_counts_the_step_of_all_ffns():
    first, second = small.ffn(0, 2048), small.ffn(1, 2048)
    costs = [small.make_costs([*first, *second])["flops"]]
    names = [first[0].name, second[0].name]
    # One neuron in both costs 4 of 20,000 FLOPs: 32 x 4 is 0.64 %.
    counts = choose_counts(first, None, rules={}, costs=costs, totals=[20_000.0], neurons=names)
    assert np.sort(counts[Kind.NEURONS])[1] == 32
