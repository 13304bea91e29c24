"""The picture shows the plan, is the same in every run, and leaves the user's matplotlib alone."""

import io
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from report_cases import EVALUATED, make_case

from hf_gradnas.report.plots import (
    CUT,
    KEPT,
    LINE,
    draw_picture,
    draw_units,
    drawing_style,
    score_range,
    sorted_row,
)


def texts(figure):
    """Everything written in a figure."""
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def pixels(content):
    """The picture ``(height, width, 3)``."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def of_colour(image, colour):
    return (image == np.array(mpl.colors.to_rgb(colour)).__mul__(255).round()).all(-1)


def bands(image):
    """First and last row of each panel, by the line of the numbers kept."""
    rows = np.flatnonzero(of_colour(image, LINE).any(1))
    starts = [rows[0], *(b for a, b in pairwise(rows) if b > a + 1)]
    ends = [*(a for a, b in pairwise(rows) if b > a + 1), rows[-1]]
    return list(zip(starts, ends, strict=True))


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


@pytest.mark.parametrize("has_scores", [True, False])
def test_a_line_marks_the_number_of_kept_units(has_scores):
    plan, _, scores, summary = make_case(12)
    _, content = draw_picture(summary, plan, scores if has_scores else None)
    image = pixels(content)
    line = of_colour(image, LINE)
    first, last = bands(image)[1]
    axes = summary.of_kind("neurons")
    drawn = np.flatnonzero((image[first] != 255).any(-1))
    left, right = drawn[0], drawn[-1] + 1
    for index, axis in enumerate(axes):
        middle = first + int((last + 1 - first) * (index + 0.5) / len(axes))
        edge = np.flatnonzero(line[middle]).mean()
        assert abs((edge - left) / (right - left) - axis.kept_ratio) < 0.005


def test_without_scores_there_are_two_colours():
    plan, _, _, summary = make_case()
    name, content = draw_picture(summary, plan, None)
    image = pixels(content)
    assert name == "widths.png"
    first, last = bands(image)[1]
    kept, cut = (of_colour(image[first : last + 1], colour).sum() for colour in (KEPT, CUT))
    share = np.mean([axis.kept_ratio for axis in summary.of_kind("neurons")])
    assert kept / (kept + cut) == pytest.approx(share, abs=0.01)


def test_the_picture_says_what_it_shows():
    plan, _, scores, summary = make_case(**EVALUATED)
    figure = draw_units(summary, plan, scores)
    said = texts(figure)
    assert "key/value groups: 25% of 12 kept" in said
    assert "small: score of every unit (fisher)" in said
    assert "1,000" in said
    lowest, highest, is_logarithmic = score_range(list(scores.values.values()))
    assert 0 < lowest < highest
    assert is_logarithmic


@pytest.mark.parametrize("layers", [6, 80])
def test_texts_do_not_overlap_and_stay_inside(layers):
    plan, _, scores, summary = make_case(layers, **EVALUATED)
    with drawing_style():
        for given in (scores, None):
            figure = draw_units(summary, plan, given)
            figure.draw_without_rendering()
            found = [text for text in figure.findobj(mpl.text.Text) if text.get_text()]
            boxes = [text.get_window_extent() for text in found]
            for index, box in enumerate(boxes):
                assert box.x0 >= 0
                assert box.x1 <= figure.bbox.x1
                assert box.y0 >= 0
                assert box.y1 <= figure.bbox.y1
                apart = [not box.overlaps(other) for other in boxes[:index]]
                assert all(apart), found[index]


def test_long_names_stay_inside():
    plan, _, scores, summary = make_case(2)
    names = [f"model.a_very_long_name_{i}_of_some_branch_{i}.blocks.{i}.mixer.proj" for i in (0, 1)]
    axes = [
        type(a)(a.name, names[i // 2], a.kind, a.size, a.kept) for i, a in enumerate(summary.axes)
    ]
    summary = type(summary)(**{**vars(summary), "axes": tuple(axes)})
    with drawing_style():
        figure = draw_units(summary, plan, scores)
        figure.draw_without_rendering()
        for text in figure.findobj(mpl.text.Text):
            assert not text.get_text() or text.get_window_extent().x0 >= 0


def test_the_picture_is_the_same_twice_and_whatever_the_user_set():
    plan, _, scores, summary = make_case(**EVALUATED)
    first = draw_picture(summary, plan, scores)
    assert first[0] == "scores.png"
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        before = dict(mpl.rcParams)
        assert draw_picture(summary, plan, scores) == first
        assert dict(mpl.rcParams) == before
    assert min(pixels(first[1]).shape[:2]) > 150


@pytest.mark.parametrize("values", [np.zeros(1000), np.full(1000, 3.0), np.r_[0.0, np.ones(999)]])
def test_scores_without_a_range_can_be_drawn(values):
    plan, _, scores, summary = make_case(1)
    name = "model.layers.0.mlp:neurons"
    changed = type(scores)({**scores.values, name: values})
    assert draw_picture(summary, plan, changed)[1]
