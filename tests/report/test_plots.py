"""Pictures show the plan, are the same in every run, and leave the user's matplotlib alone."""

import io
import xml.etree.ElementTree as ET
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from report_cases import EVALUATED, make_case

from hf_gradnas.report.plots import (
    KEPT,
    draw_all,
    draw_costs,
    draw_scores,
    draw_widths,
    drawing_style,
    sorted_row,
)


def texts(figure):
    """Everything written in a figure."""
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def test_a_row_is_sorted_and_marks_what_is_cut():
    row, cut = sorted_row(np.array([1.0, 4.0, 2.0, 3.0]), (0, 1), columns=8)
    assert row.tolist() == [4, 4, 3, 3, 2, 2, 1, 1]
    assert cut.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_many_units_share_a_cell():
    values = np.array([1e0, 1e2, 1e4, 1e8])
    row, cut = sorted_row(values, (2, 3), columns=2)
    np.testing.assert_allclose(row, [1e6, 1e1])  # means of logarithms
    assert cut.tolist() == [0, 1]
    uneven, share = sorted_row(np.arange(7.0), (6, 5, 4), columns=3)
    assert (len(uneven), share.tolist()) == (3, [0, 0.5, 1])
    assert np.isfinite(uneven).all()
    assert sorted_row(np.zeros(5), (), columns=2)[1].tolist() == [1, 1]


def test_the_heat_map_marks_the_number_of_kept_units():
    plan, _, scores, summary = make_case()
    with drawing_style():
        figure = draw_scores(summary, plan, scores)
    panel = next(ax for ax in figure.axes if ax.get_title(loc="left").startswith("neurons"))
    found = [line.get_xdata()[0] for line in panel.get_lines()]
    assert found == [axis.kept for axis in summary.of_kind("neurons")]
    assert panel.images[0].norm.vmin > 0  # logarithmic
    assert "key/value groups: 25% of 12 kept" in texts(figure)


def test_widths_are_the_plan():
    _, _, _, summary = make_case()
    with drawing_style():
        panel = draw_widths(summary).axes[1]
    kept = [
        bar.get_width() for bar in panel.patches if mpl.colors.same_color(bar.get_facecolor(), KEPT)
    ]
    assert kept == [axis.kept for axis in summary.of_kind("neurons")]


def test_costs_and_latencies_are_shares_of_before():
    summary = make_case(**EVALUATED)[-1]
    with drawing_style():
        figure = draw_costs(summary)
    widths = [round(bar.get_width(), 3) for bar in figure.axes[0].patches]
    assert widths[::2] == [100] * 4
    assert widths[1] == 48
    assert widths[5::2] == [50, 33.333]
    assert "30.0 → 10.0 ms (3.00 × as fast)" in texts(figure)
    assert {"before", "after", "budget"} <= set(texts(figure))


@pytest.mark.parametrize("layers", [6, 80])
def test_labels_do_not_overlap_and_stay_inside(layers):
    plan, _, scores, summary = make_case(layers, **EVALUATED)
    with drawing_style():
        for figure in (draw_scores(summary, plan, scores), draw_widths(summary)):
            figure.draw_without_rendering()
            for panel in figure.axes:
                if panel.get_ylabel() != "layer":
                    continue
                boxes = [label.get_window_extent() for label in panel.get_yticklabels()]
                assert len(boxes) > 4
                # From top to bottom, each wholly below the one before.
                assert all(a.y0 >= b.y1 for a, b in pairwise(boxes))
                across = [label.get_window_extent() for label in panel.get_xticklabels()]
                assert all(a.x1 < b.x0 for a, b in pairwise(across))
            for text in figure.findobj(mpl.text.Text):
                box = text.get_window_extent()
                assert box.width == 0 or (box.x0 >= 0 and box.x1 <= figure.bbox.x1)


def test_all_pictures_are_the_same_twice_and_whatever_the_user_set():
    plan, _, scores, summary = make_case(**EVALUATED)
    first = draw_all(summary, plan, scores)
    assert set(first) == {f"{n}.{s}" for n in ("scores", "widths", "costs") for s in ("png", "svg")}
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none"}):
        before = dict(mpl.rcParams)
        assert draw_all(summary, plan, scores) == first
        assert dict(mpl.rcParams) == before
    for name, content in first.items():
        if name.endswith("png"):
            image = Image.open(io.BytesIO(content))
            assert min(image.size) > 150
        else:
            assert ET.fromstring(content).tag.endswith("svg")
            assert b"dc:date" not in content


def test_without_scores_there_is_no_picture_of_them():
    plan, _, _, summary = make_case()
    assert {name.split(".")[0] for name in draw_all(summary, plan, None)} == {"widths", "costs"}


@pytest.mark.parametrize("values", [np.zeros(1000), np.full(1000, 3.0), np.r_[0.0, np.ones(999)]])
def test_scores_without_a_range_can_be_drawn(values):
    plan, _, scores, summary = make_case(1)
    name = "model.layers.0.mlp:neurons"
    changed = type(scores)({**scores.values, name: values})
    with drawing_style():
        draw_scores(summary, plan, changed).draw_without_rendering()
