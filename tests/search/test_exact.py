"""The bound of the prices, the proof of optimality, and what happens when work runs out."""

import numpy as np
import pytest
import search_spaces as small
from searching import prunable_of

from hf_gradnas.search import STRATEGIES, exact
from hf_gradnas.search.lagrangian import fill_up, price_budgets, search_lagrangian
from hf_gradnas.search.space import build_space, make_problem
from hf_gradnas.types import Scores

AXES = [
    a for layer in range(3) for a in (*small.attention(layer, 4, groups=2), *small.ffn(layer, 4))
]
RATIOS = [{"flops": 0.6}, {"params": 0.4}, {"flops": 0.6, "params": 0.62}]


def problem_of(axes, scores, seed=None, **ratios):
    costs = small.make_costs(axes, seed)
    limits = small.budgets(axes, costs, **ratios)
    names = [limit.cost for limit in limits]
    space = build_space(prunable_of(axes, costs), scores.values, names, rules={})
    return make_problem(space, limits), small.smallest_loss(axes, scores, costs, limits)


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("seed", range(6))
def test_prices_bound_the_loss_from_below(seed, ratios):
    problem, best = problem_of(AXES, small.make_scores(AXES, seed), seed, **ratios)
    prices, picks = price_budgets(problem)
    assert np.all(prices >= 0)
    priced = problem.score + np.tensordot(prices, problem.costs, axes=1)
    bound = priced.min(axis=1).sum() - prices @ problem.room
    assert bound <= best * (1 + 1e-9)
    assert problem.fits(picks)
    # No other prices give a better bound: these solve the dual of the relaxed problem.
    rng = np.random.default_rng(seed)
    for other in prices * rng.lognormal(0, 0.2, (200, prices.size)):
        priced = problem.score + np.tensordot(other, problem.costs, axes=1)
        assert priced.min(axis=1).sum() - other @ problem.room <= bound * (1 + 1e-9)


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("seed", range(6))
def test_the_solution_is_proved_and_full(seed, ratios):
    problem, best = problem_of(AXES, small.make_scores(AXES, seed), seed, **ratios)
    solution = search_lagrangian(problem)
    assert solution.is_optimal
    assert solution.score == pytest.approx(best, rel=1e-9)
    assert solution.bound <= solution.score * (1 + 1e-9)
    assert np.array_equal(fill_up(problem, solution.picks), solution.picks)


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("start", [True, False])
def test_any_start_leads_to_the_optimum(start, ratios):
    problem, best = problem_of(AXES, small.make_scores(AXES, 0), 0, **ratios)
    picks = problem.cheapest() if start else None
    for prices in (price_budgets(problem)[0], np.zeros(len(ratios))):
        solution = exact.close_gap(problem, prices, picks)
        assert solution.is_optimal
        assert solution.score == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("work", [0, 40])
def test_without_work_the_best_plan_found_is_returned_with_its_bound(monkeypatch, work, ratios):
    monkeypatch.setattr(exact, "MAX_WORK", work)
    monkeypatch.setattr(exact, "MAX_PAIRS", 12)
    monkeypatch.setattr(exact, "NARROW_PAIRS", 4)
    scores = Scores({a.name: np.ones(a.size) for a in AXES})
    problem, best = problem_of(AXES, scores, **ratios)
    solution = search_lagrangian(problem)
    assert problem.fits(solution.picks)
    assert solution.bound <= best * (1 + 1e-9)
    assert solution.score >= best * (1 - 1e-9)
    assert solution.score == problem.score_of(solution.picks)


@pytest.mark.parametrize("search", STRATEGIES.values())
def test_budgets_below_everything_have_no_solution(search):
    problem, _ = problem_of(AXES, small.make_scores(AXES, 0), flops=0.01)
    assert search(problem) is None


@pytest.mark.parametrize("ratios", [{"flops": 0.55}, {"flops": 0.55, "params": 0.55}])
def test_a_7b_size_space_is_solved_to_optimality(ratios):
    axes = [a for n in range(32) for a in (*small.attention(n, 32), *small.ffn(n, 11_008))]
    rng = np.random.default_rng(0)
    scores = Scores({a.name: rng.lognormal(rng.normal(), 1.5, a.size) for a in axes})
    costs = small.make_costs(axes)
    limits = small.budgets(axes, costs, **ratios)
    names = [limit.cost for limit in limits]
    space = build_space(prunable_of(axes, costs), scores.values, names, rules={})
    solution = search_lagrangian(make_problem(space, limits))
    assert solution.is_optimal


def test_fill_up_takes_the_steps_that_save_most_per_cost():
    axes = [*small.ffn(0, 4), *small.ffn(1, 4)]
    scores = Scores({axes[0].name: np.full(4, 2.0), axes[1].name: np.full(4, 1.0)})
    problem, _ = problem_of(axes, scores, flops=0.86)
    picks = fill_up(problem, problem.cheapest())
    assert problem.fits(picks)
    assert problem.units[[0, 1], picks].tolist() == [4, 2]
