"""Pictures show the plan, are the same in every run, and leave the user's matplotlib alone."""

import io
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from report_cases import EVALUATED, make_case

from hf_gradnas.report.canvas import Bar, Canvas, Cells, Label
from hf_gradnas.report.plots import (
    BEFORE,
    CUT,
    KEPT,
    LINE,
    draw_all,
    draw_costs,
    draw_scores,
    draw_widths,
    sorted_row,
    ticks,
)


def texts(canvas):
    """Everything written in a picture."""
    return [item.text for item in canvas.items if isinstance(item, Label)]


def bars(canvas, color):
    return [item for item in canvas.items if isinstance(item, Bar) and item.color == color]


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
    canvas = draw_scores(summary, plan, scores)
    maps = [item for item in canvas.items if isinstance(item, Cells) and item.colors.shape[1] > 1]
    place = summary.kinds.index("neurons")
    edges = bars(canvas, LINE)[3 * place : 3 * place + 3]
    found = [(bar.x + bar.width / 2 - maps[place].x) / maps[place].width * 1000 for bar in edges]
    assert found == pytest.approx([axis.kept for axis in summary.of_kind("neurons")])
    assert "key/value groups: 25% of 12 kept" in texts(canvas)


def test_colours_are_logarithmic_and_pale_where_units_are_cut():
    plan, _, scores, summary = make_case(1)
    name = "model.layers.0.mlp:neurons"
    values = {**scores.values, name: np.repeat(10.0 ** np.arange(3, -2, -1), 200)}
    kept = {**plan.kept, name: tuple(range(500))}
    summary = replace(summary, axes=tuple(replace(a, kept=len(kept[a.name])) for a in summary.axes))
    canvas = draw_scores(summary, replace(plan, kept=kept), type(scores)(values))
    place = summary.kinds.index("neurons")
    maps = [item for item in canvas.items if isinstance(item, Cells) and item.colors.shape[1] > 1]
    row = maps[place].colors[0].astype(int)
    assert row[[0, 96]].tolist() == [[0xFD, 0xE7, 0x25], [0x5E, 0xC9, 0x62]]  # 1 and 3/4 of a range
    assert row[192].tolist() == [0x21, 0x91, 0x8C]
    assert row[-1].tolist() == [round(255 * 0.72 + 0.28 * part) for part in (0x44, 0x01, 0x54)]
    assert {"10⁻¹", "10⁰", "10³"} <= set(texts(canvas))


def test_widths_are_the_plan():
    _, _, _, summary = make_case()
    canvas = draw_widths(summary)
    axes = [axis for kind in summary.kinds for axis in summary.of_kind(kind)]
    kept, cut = bars(canvas, KEPT)[:-1], bars(canvas, CUT)[:-1]  # the last are the legend's
    ratios = [own.width / whole.width for own, whole in zip(kept, cut, strict=True)]
    assert ratios == pytest.approx([axis.kept_ratio for axis in axes])
    assert all(own.x == whole.x for own, whole in zip(kept, cut, strict=True))
    assert {f"{axis.kept:,}" for axis in axes} <= set(texts(canvas))


def test_costs_and_latencies_are_shares_of_before():
    summary = make_case(**EVALUATED)[-1]
    canvas = draw_costs(summary)
    before, after = (bars(canvas, color)[:-1] for color in (BEFORE, KEPT))
    assert len({bar.width for bar in before}) == 1
    shares = [round(100 * bar.width / before[0].width, 3) for bar in after]
    assert shares[0] == 48
    assert shares[2:] == [50, 33.333]
    limit, _ = bars(canvas, LINE)
    middle = limit.x + limit.width / 2
    assert middle == pytest.approx(before[0].x + 0.5 * before[0].width)
    assert "30.0 → 10.0 ms (3.00 × as fast)" in texts(canvas)
    assert {"before", "after", "budget"} <= set(texts(canvas))


def long_names(summary):
    """The same of a model whose modules have long names, and which has one itself."""
    moved = {"self_attn": "cross_attention_of_the_decoder", "mlp": "feed_forward_network.dense"}
    axes = [
        replace(a, module=a.module.replace(n, moved[n]))
        for a in summary.axes
        for n in moved
        if a.module.endswith(n)
    ]
    odd = replace(axes[0], module="a_tower_with_a_rather_long_name.of.its.own.in.the.model")
    return replace(summary, name="owner/" + "long" * 30, axes=(*axes[1:], odd))


@pytest.mark.parametrize("change", [lambda summary: summary, long_names], ids=["short", "long"])
@pytest.mark.parametrize("layers", [1, 6, 80])
def test_texts_do_not_overlap_and_stay_inside(layers, change):
    plan, _, scores, summary = make_case(layers, **EVALUATED)
    summary = change(summary)
    pictures = draw_scores(summary, plan, scores), draw_widths(summary), draw_costs(summary)
    for canvas in pictures:
        boxes = [item.box for item in canvas.items if isinstance(item, Label)]
        assert all(0 <= x0 < x1 <= canvas.width for x0, _, x1, _ in boxes)
        assert all(0 <= y0 < y1 <= canvas.height for _, y0, _, y1 in boxes)
        for (a, b, c, d), (e, f, g, h) in combinations(boxes, 2):
            assert min(c, g) <= max(a, e) or min(d, h) <= max(b, f) + 0.2
    numbers = [item for item in pictures[1].items if isinstance(item, Label) and item.text == "0"]
    assert numbers


@pytest.mark.parametrize(
    ("most", "found"),
    [(1, [0, 1]), (3, [0, 1, 2, 3]), (12, [0, 3, 6, 9, 12]), (1000, [0, 250, 500, 750, 1000])],
)
def test_ticks_are_whole_and_few(most, found):
    assert ticks(most) == found
    assert all(len(ticks(size)) <= 5 for size in range(1, 3000))


def test_markup_in_names_is_text():
    summary = replace(make_case()[-1], name='<b>&"bert"')
    root = ET.fromstring(draw_widths(summary).svg())
    assert '<b>&"bert": width of every module' in [element.text for element in root.iter()]


def test_a_png_shows_bars_where_they_are():
    canvas = Canvas(72, 36)
    canvas.bar(18, 9, 36, 18, KEPT)
    canvas.bar(0, 0, 0, 9, LINE)
    pixels = np.asarray(Image.open(io.BytesIO(canvas.png())))
    assert pixels.shape == (65, 130, 3)
    blue = (pixels == (0x00, 0x72, 0xB2)).all(-1)
    ys, xs = np.nonzero(blue)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (16, 48, 32, 97)
    assert (pixels[~blue] == 255).all()


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
    canvas = draw_scores(summary, plan, changed)
    assert canvas.png()
    assert "score" in texts(canvas)
