"""The headline says what is left, what it is worth and how fast it is, and nothing unmeasured."""

import pytest
from report_cases import EVALUATED, make_case

from hf_gradnas.report import final_metric, headline
from hf_gradnas.report.headline import say_kept


def test_it_says_all_that_was_measured():
    assert headline(make_case(**EVALUATED)[-1]) == (
        "Kept 48.0% of the FLOPs and 22.6% of the parameters; perplexity 2.7 → 7.4; "
        "2.00 × as fast at batch size 1"
    )


def test_it_says_nothing_else():
    assert headline(make_case()[-1]) == "Kept 48.0% of the FLOPs and 22.6% of the parameters"


def test_several_costs_are_a_list():
    kept = {"flops": 0.5, "params": 0.4, "memory": 0.3}
    assert say_kept(kept, ["memory"]) == (
        "Kept 30.0% of the bytes of weights, 50.0% of the FLOPs and 40.0% of the parameters"
    )
    assert say_kept({"flops": 0.5}, []) == "Kept 50.0% of the FLOPs"


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        ({}, None),
        ({"before": {"loss": 1.0}}, None),
        ({"before": {"loss": 1.0}, "after": {"loss": 2.0}}, ("loss", 1.0, 2.0)),
        (
            {"before": {"loss": 1.0, "accuracy": 0.9}, "after (masked)": {"accuracy": 0.8}},
            ("accuracy", 0.9, 0.8),
        ),
        (
            {
                "before": {"perplexity": 3.0},
                "after": {"perplexity": 9.0},
                "recovered": {"perplexity": 4.0},
            },
            ("perplexity", 3.0, 4.0),
        ),
    ],
)
def test_the_most_telling_metric_of_the_last_state(metrics, found):
    assert final_metric(metrics) == found
