"""A frontier's means, tables and CSV say what its points say."""

import csv
import io
import statistics
from dataclasses import replace

import pytest
from frontier_cases import make_frontier

from hf_gradnas.report.frontiers import (
    Spread,
    budgeted_costs,
    frontier_csv,
    frontier_markdown,
    main_metric,
    rows_of,
    table_of,
)


def test_rows_are_means_over_seeds():
    frontier = make_frontier()
    rows = rows_of(frontier)
    assert len(rows) == 3 * 2 * 2
    assert [row.budget.ratio for row in rows[::4]] == [0.8, 0.6, 0.4]
    assert [(row.score, row.state) for row in rows[:4]] == [
        ("fisher", "masked"),
        ("fisher", "repaired"),
        ("taylor", "masked"),
        ("taylor", "repaired"),
    ]
    points = [p for p in frontier.points if (p.score, p.state) == ("taylor", "masked")]
    found = [p.metrics["accuracy"] for p in points if p.budget.ratio == 0.4]
    last = rows[-2].metrics["accuracy"]
    assert (last.mean, last.sd) == (statistics.fmean(found), statistics.stdev(found))
    assert rows[0].cost_ratios["flops"] == pytest.approx((160 - 1) / 200)


def test_one_seed_has_no_deviation_and_a_kl_that_is_not_finite_is_not_averaged():
    frontier = make_frontier(seeds=(0,))
    assert rows_of(frontier)[0].kl.sd is None
    broken = replace(frontier.points[0], kl=None)
    rows = rows_of(replace(frontier, points=(broken, *frontier.points[1:])))
    assert rows[0].kl is None
    assert table_of(replace(frontier, points=(broken,)))[1][1][-1] == "-"


def test_the_metric_that_is_shown():
    assert main_metric(make_frontier()) == "accuracy"
    assert main_metric(make_frontier(metric="perplexity")) == "perplexity"
    assert main_metric(replace(make_frontier(), original={"examples": 1, "loss": 1})) == "loss"
    assert main_metric(replace(make_frontier(), original={})) is None


def test_numbers_are_short():
    assert str(Spread(0.88194, 0.0049)) == "0.8819 ± 0.005"
    assert str(Spread(12345.678)) == "12345.68"
    assert str(Spread(0.0)) == "0.0000"
    assert str(Spread(0.000123, 0.00004)) == "0.00012 ± 4e-05"


def test_the_table_begins_with_the_whole_model():
    headers, rows = table_of(make_frontier(states=("masked",)))
    assert headers[:3] == ("budget", "score", "state")
    assert headers[3:] == ("flops", "params", "loss", "accuracy", "KL")
    assert rows[0] == ("unpruned", "", "", "100%", "100%", "0.5000", "0.9000", "0.0000")
    assert rows[1][:4] == ("flops=80%", "fisher", "masked", "79.5%")
    assert rows[1][6].startswith("0.8780 ± ")
    assert len(rows) == 1 + 6
    assert frontier_markdown(make_frontier()).count("\n") == 2 + 1 + 12


def test_the_csv_has_a_line_per_point():
    frontier = make_frontier(budgets=("flops=60%", "params=70%"))
    assert budgeted_costs(frontier) == ["flops", "params"]
    lines = list(csv.DictReader(io.StringIO(frontier_csv(frontier))))
    assert lines[0]["state"] == "unpruned"
    assert float(lines[0]["accuracy"]) == 0.9
    assert len(lines) == 1 + len(frontier.points)
    for line, point in zip(lines[1:], frontier.points, strict=True):
        assert (line["state"], line["score"], int(line["seed"])) == (
            point.state,
            point.score,
            point.seed,
        )
        assert float(line["kl"]) == point.kl
        assert float(line["loss"]) == point.metrics["loss"]
        assert float(line[f"{point.budget.cost}_ratio"]) == point.cost_ratio
