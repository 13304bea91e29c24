"""Frontiers as numbers, tables and pictures."""

import csv
import io
import statistics
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from frontier_cases import make_frontier
from PIL import Image

from hf_gradnas.report.frontiers import (
    Spread,
    budgeted_costs,
    draw_frontier,
    frontier_csv,
    frontier_markdown,
    frontier_pictures,
    main_metric,
    rows_of,
    spaced,
    table_of,
)
from hf_gradnas.report.plots import drawing_style


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


SCORES = ("fisher", "balanced", "taylor", "magnitude")


def drawn(frontier):
    """The figure, laid out."""
    with drawing_style():
        figure = draw_frontier(frontier)
        figure.draw_without_rendering()
    return figure


def names_in(panel):
    """The names of the lines, which are the texts in the panel's own coordinates."""
    return [text for text in panel.texts if text.get_transform() == panel.transAxes]


def test_a_line_per_score_and_state_through_the_means():
    frontier = make_frontier()
    panel, divergence = drawn(frontier).axes
    lines = {line.get_color(): line for line in panel.get_lines() if line.get_linestyle() == "-"}
    fisher = [r for r in rows_of(frontier) if (r.score, r.state) == ("fisher", "repaired")]
    line = lines["#0072B2"]
    assert list(line.get_xdata()) == [100, *(100 * row.cost_ratios["flops"] for row in fisher)]
    assert list(line.get_ydata()) == [0.9, *(row.metrics["accuracy"].mean for row in fisher)]
    assert [text.get_text() for text in names_in(panel)] == [
        "fisher",
        "fisher, repaired",
        "taylor",
        "taylor, repaired",
        "unpruned 0.9",
    ]
    assert len(panel.collections) == 4  # bands
    assert divergence.get_yscale() == "log"
    assert "3 calibration subsets" in panel.figure.get_suptitle()


def test_one_subset_has_no_band_and_one_state_is_not_named():
    panel = drawn(make_frontier(seeds=(0,), states=("masked",))).axes[0]
    assert len(panel.collections) == 0
    assert [text.get_text() for text in names_in(panel)][:2] == ["fisher", "taylor"]
    assert panel.figure.get_suptitle() == "my-bert: quality over cost"


def test_a_panel_per_cost_and_only_what_was_measured():
    frontier = make_frontier(budgets=("flops=60%", "params=80%"))
    assert len(drawn(frontier).axes) == 4
    assert len(drawn(replace(frontier, original={})).axes) == 2
    unknown = tuple(replace(point, kl=None) for point in frontier.points)
    assert len(drawn(replace(frontier, points=unknown)).axes) == 2
    half = tuple(replace(p, kl=p.kl if p.budget.cost == "flops" else None) for p in frontier.points)
    assert len(drawn(replace(frontier, points=half)).axes) == 3


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
@pytest.mark.parametrize("scores", [SCORES[:1], SCORES])
def test_names_do_not_overlap_and_stay_inside(metric, scores):
    figure = drawn(make_frontier(scores=scores, metric=metric))
    for panel in figure.axes:
        boxes = sorted((t.get_window_extent() for t in names_in(panel)), key=lambda box: box.y0)
        assert len(boxes) >= 2 * len(scores)
        assert all(a.y1 <= b.y0 + 0.5 for a, b in pairwise(boxes))
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)
        across = [label.get_window_extent() for label in panel.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in pairwise(across))
    if metric == "perplexity":
        assert figure.axes[0].get_yscale() == "log"


def test_a_single_budget_and_equal_values_can_be_drawn():
    drawn(make_frontier(seeds=(0,), scores=SCORES[:1], budgets=("flops=100%",)))
    drawn(make_frontier(seeds=(0,), scores=SCORES[:1], budgets=("flops=99.9%",)))


def test_both_files_are_the_same_in_every_run():
    frontier = make_frontier()
    first = frontier_pictures(frontier)
    with mpl.rc_context({"font.size": 30}):
        assert frontier_pictures(frontier) == first
    assert Image.open(io.BytesIO(first["png"])).width > 1000
    assert ET.fromstring(first["svg"]).tag.endswith("svg")


def test_places_are_apart_in_order_and_near():
    draw = np.random.default_rng(0)
    for _ in range(50):
        wanted = draw.random(6).tolist()
        places = spaced(wanted, 0.07)
        assert np.argsort(places).tolist() == np.argsort(wanted).tolist()
        assert (np.diff(np.sort(places)) >= 0.07 - 1e-9).all()
    assert spaced([0.2, 0.9], 0.1) == [0.2, 0.9]
    assert spaced([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
