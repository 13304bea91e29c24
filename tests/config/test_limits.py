import math

import numpy as np
import pytest

from hf_gradnas.config.limits import format_amount, parse_budgets
from hf_gradnas.errors import BudgetError
from hf_gradnas.types import Budget

TOTALS = {"flops": 2e12, "params": 110e6}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("50%", 1e12),
        (" 62.5 % ", 1.25e12),
        ("100%", 2e12),
        ("1.2G", 1.2e9),
        ("1.5T", 1.5e12),
        ("66M", 66e6),
        ("0.3b", 0.3e9),
        ("300k", 300e3),
        ("1e9", 1e9),
        (66e6, 66e6),
        (2e12, 2e12),
        (200, 200.0),
        (np.float32(2.0**30), 2.0**30),
        (np.int64(10**9), 1e9),
    ],
)
def test_reads_shares_and_amounts(limit, expected):
    assert parse_budgets({"flops": limit}, TOTALS) == (Budget("flops", expected, 2e12),)


def test_milliseconds_are_read_before_the_total_is_measured():
    assert parse_budgets({"latency_ms": 20}, {"latency_ms": math.inf})[0].limit == 20
    with pytest.raises(BudgetError, match="too small to be meant"):
        parse_budgets({"params": 20}, {"params": math.inf})


def test_several_budgets_keep_their_order():
    budgets = parse_budgets({"params": "40%", "flops": "1T"}, TOTALS)
    assert [(b.cost, b.limit, b.ratio) for b in budgets] == [
        ("params", 44e6, 0.4),
        ("flops", 1e12, 0.5),
    ]


@pytest.mark.parametrize("budget", [0.5, "50%", None, ["flops"], 66e6])
def test_needs_a_mapping(budget):
    with pytest.raises(BudgetError, match=r'needed a mapping .* \{"flops": "50%"\}'):
        parse_budgets(budget, TOTALS)


def test_refuses_an_empty_mapping():
    with pytest.raises(BudgetError, match="found an empty mapping"):
        parse_budgets({}, TOTALS)


def test_names_the_nearest_known_cost():
    with pytest.raises(BudgetError, match=r"'flop', known are flops, params; .*'flops'\?"):
        parse_budgets({"flop": "50%"}, TOTALS)
    with pytest.raises(BudgetError, match=r"did you mean 'flops'\?"):
        parse_budgets({"FLOPS": "50%"}, TOTALS)


def test_an_unknown_cost_without_known_ones():
    with pytest.raises(BudgetError, match="unknown cost 1"):
        parse_budgets({1: "50%"}, {})


@pytest.mark.parametrize("limit", [0.5, 1, 1.0, "0.5", 0.07])
def test_refuses_a_bare_fraction_with_the_percentage_to_write(limit):
    hint = f"write '{100 * float(limit):g}%'"
    with pytest.raises(BudgetError, match=f"share kept {hint}"):
        parse_budgets({"flops": limit}, TOTALS)


@pytest.mark.parametrize("limit", ["101%", "0%", "-5%"])
def test_refuses_percentages_outside_0_to_100(limit):
    with pytest.raises(BudgetError, match="more than 0 % and at most 100 %"):
        parse_budgets({"flops": limit}, TOTALS)


@pytest.mark.parametrize("limit", [0, -3.0, "-1G"])
def test_refuses_limits_that_are_not_positive(limit):
    with pytest.raises(BudgetError, match="needed a limit above 0; the original costs 2T"):
        parse_budgets({"flops": limit}, TOTALS)


@pytest.mark.parametrize("limit", [2.1e12, "3T"])
def test_refuses_more_than_the_original(limit):
    with pytest.raises(BudgetError, match=r"original cost, which is 2T \(2000000000000\);"):
        parse_budgets({"flops": limit}, TOTALS)


def test_a_short_number_is_not_said_twice():
    with pytest.raises(BudgetError, match=r"which is 1.568; give"):
        parse_budgets({"latency_ms": "50"}, {"latency_ms": 1.568})


@pytest.mark.parametrize(
    "limit",
    [
        *("half", "", "%", "K", "1.2X", True, None, [1], math.nan, math.inf, "nan%", "1e999"),
        *("٥٠%", "５０%", "1_000", "1_0%", "0x10", b"50%", 1j, "5 0%", "50%%", "--5"),
    ],
)
def test_refuses_what_is_not_a_finite_number(limit):
    with pytest.raises(BudgetError, match=r"flops=.*not a finite number; write a percentage"):
        parse_budgets({"flops": limit}, TOTALS)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.2345e9, "1.234G"), (66e6, "66M"), (2.5e12, "2.5T"), (1500, "1.5K"), (12, "12")],
)
def test_format_amount(value, text):
    assert format_amount(value) == text


@pytest.mark.parametrize(
    ("limit", "share"), [(0.5, "50%"), (1, "100%"), (50, "50%"), ("60", "60%")]
)
def test_a_share_without_its_sign_is_asked_about(limit, share):
    with pytest.raises(BudgetError, match=f"too small to be meant; .* write '{share}'"):
        parse_budgets({"flops": limit}, TOTALS)


def test_small_limits_of_small_models_are_meant():
    assert parse_budgets({"flops": 50}, {"flops": 1000.0})[0].limit == 50


def test_an_integer_longer_than_python_prints_is_refused():
    for limit in (10**400, 10**6000):
        with pytest.raises(BudgetError, match=r"flops: an integer of \d+ bits is above"):
            parse_budgets({"flops": limit}, TOTALS)
