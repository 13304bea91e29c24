"""Axes of files of format 1 are found again, or refused by name."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hf_gradnas.errors import GradNASWarning, PlanError, ScoresError
from hf_gradnas.surgery.cut import check_plan
from hf_gradnas.types import Axis, Kind, Plan, Scores, Slice, Tap, present_plan, present_scores


def pair(name, maker, reader, size, kind=Kind.NEURONS):
    """An axis of what one linear layer makes and another reads."""
    slices = (Slice(f"{maker}.weight", 0, role="makes"), Slice(f"{reader}.weight", 1, role="reads"))
    side = Tap(reader, "input", -1) if kind is Kind.NEURONS else Tap(maker, "output", -1)
    return Axis(f"{name}:{kind}", name, kind, size, slices, (side,))


def attention(name, out, size):
    slices = (Slice(f"{name}.q.weight", 0, 4, 0, 4), Slice(f"{out}.weight", 1, 4, 0, 4))
    return Axis(f"{name}:heads", name, Kind.HEADS, size, slices, (Tap(out, "input", -1, 4, 0, 4),))


FFN = pair("layers.0.mlp", "layers.0.mlp.up", "layers.0.mlp.down", 8)


def plan_of(kept, **sizes_of):
    """A plan as version 0.1 wrote it."""
    sizes = {name: sizes_of.get("size", 8) for name in kept}
    plan = Plan(kept, sizes, "per_layer", format_version=1)
    return Plan.from_dict(json.loads(json.dumps(plan.to_dict())))


def scores_of(*names, size=8):
    values = {name: np.arange(size, dtype=np.float64) + i for i, name in enumerate(names)}
    return Scores(values, {"method": "fisher"}, {"taylor": values}, format_version=1)


@pytest.mark.parametrize(
    ("former", "axis"),
    [
        ("layers.0.mlp.down:neurons", FFN),  # a second pair of the module was refused
        ("layers.0:neurons", FFN),  # a weight of the layer that ran before fitted too
        ("layers.0.mlp.up:channels", FFN),
        ("layers.0.mlp.down:neurons", pair("a", "a", "layers.0.mlp.down", 8, Kind.CHANNELS)),
        ("a.o:heads", attention("a", "a.o", 8)),
    ],
)
def test_a_former_name_is_found_again(former, axis):
    plan = present_plan(plan_of({former: (0, 3)}), [axis])
    assert (plan.kept, plan.sizes) == ({axis.name: (0, 3)}, {axis.name: 8})
    assert plan.format_version == 2
    found = present_scores(scores_of(former), [axis])
    assert [*found.values] == [*found.also["taylor"]] == [axis.name]
    np.testing.assert_array_equal(found.values[axis.name], np.arange(8))


@pytest.mark.parametrize(
    "former",
    [
        "layers.0.mlp.up:neurons",  # the weight that makes them
        "layers.1:neurons",
        "layers:neurons",  # format 1 knew neurons in numbered layers only
        "layers.0.mlp.down:channels",
        "layers.0.mlp:heads",
    ],
)
def test_a_name_that_no_axis_had_is_refused_where_it_is_pruned(former):
    with pytest.raises(PlanError, match=rf"{former}: the plan keeps 1 of 8 units, but no axis"):
        present_plan(plan_of({former: (0,)}), [FFN])
    whole = present_plan(plan_of({former: tuple(range(8))}), [FFN])
    assert whole.kept == {FFN.name: tuple(range(8))}
    assert present_scores(scores_of(former), [FFN]).values == {}


def test_sizes_must_agree():
    with pytest.raises(PlanError, match=r"layers.0.mlp:neurons: the plan keeps 1 of 4 units"):
        present_plan(plan_of({FFN.name: (0,)}, size=4), [FFN])
    assert present_scores(scores_of(FFN.name, size=4), [FFN]).values == {}


def test_present_names_win():
    other = pair("layers.0", "layers.0.up", "layers.0.down", 8)
    plan = present_plan(plan_of({other.name: (1,), FFN.name: (2,)}), [FFN, other])
    assert plan.kept == {FFN.name: (2,), other.name: (1,)}
    moved = present_plan(
        plan_of({other.name: (1,), "layers.0.mlp.down:neurons": (2,)}), [FFN, other]
    )
    assert moved.kept == plan.kept


def test_axes_that_are_new_stay_whole():
    plan = present_plan(plan_of({FFN.name: (2,)}), [FFN, attention("a", "a.o", 2)])
    assert plan.kept == {FFN.name: (2,), "a:heads": (0, 1)}
    assert plan.sizes == {FFN.name: 8, "a:heads": 2}


def test_axes_that_are_new_have_no_scores():
    heads = attention("a", "a.o", 2)
    with pytest.warns(GradNASWarning, match=r"did not find a:heads \(1 of the 2 axes"):
        scores = present_scores(scores_of(FFN.name), [FFN, heads])
    assert scores.unscored == scores.of("taylor").unscored == {"a:heads"}
    np.testing.assert_array_equal(scores.values["a:heads"], np.zeros(2))
    np.testing.assert_array_equal(scores.also["taylor"]["a:heads"], np.zeros(2))
    assert present_scores(scores_of(FFN.name), [FFN]).unscored == set()


def test_nobody_guesses_between_two_axes():
    axes = [FFN, pair("layers.0.more", "layers.0.more.up", "layers.0.more.down", 8)]
    match = r"layers.0:neurons: layers.0.mlp:neurons and layers.0.more:neurons both have 8 units"
    with pytest.raises(PlanError, match=match):
        present_plan(plan_of({"layers.0:neurons": (0,)}), axes)
    with pytest.raises(ScoresError, match=match):
        present_scores(scores_of("layers.0:neurons"), axes)
    told_apart = [FFN, replace(axes[1], size=4)]
    assert present_plan(plan_of({"layers.0:neurons": (0,)}), told_apart).kept[FFN.name] == (0,)


def test_nobody_guesses_between_two_names():
    names = ("layers.0:neurons", "layers.0.mlp.down:neurons")
    match = r"layers.0.mlp:neurons: layers.0:neurons and layers.0.mlp.down:neurons both have 8"
    with pytest.raises(PlanError, match=match):
        present_plan(plan_of(dict.fromkeys(names, (0,))), [FFN])
    with pytest.raises(ScoresError, match=match):
        present_scores(scores_of(*names), [FFN])


def test_the_format_of_a_file_is_kept(tmp_path):
    plan = plan_of({"x:heads": (0,)})
    assert (plan.format_version, replace(plan, format_version=2).to_dict()["format_version"]) == (
        1,
        2,
    )
    scores_of(FFN.name).save(tmp_path / "s.safetensors")
    old = Scores.load(tmp_path / "s.safetensors")
    assert old.format_version == old.of("taylor").format_version == 1
    assert "format_version" not in old.metadata


def test_names_of_the_present_format_are_not_looked_for():
    now = replace(plan_of({"layers.0:neurons": (0,)}), format_version=2)
    with pytest.raises(PlanError, match=r"layers.0.mlp:neurons: the plan counts no units"):
        check_plan([FFN], now)
    assert check_plan([FFN], replace(now, format_version=1)).kept == {FFN.name: (0,)}
