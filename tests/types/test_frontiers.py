"""A frontier is data: it comes back from its file as it was, and nonsense is refused."""

import json

import pytest
from frontier_cases import make_frontier

from hf_gradnas.errors import PlanError
from hf_gradnas.types import Budget, Frontier, Point


def test_a_file_gives_back_what_was_saved(tmp_path):
    frontier, file = make_frontier(), tmp_path / "sweep.json"
    frontier.save(file)
    assert Frontier.load(file) == frontier
    smaller = Frontier("m", "stock", {"flops": 1.0})
    smaller.save(file)  # a frontier that is there is replaced
    assert Frontier.load(file) == smaller


def test_the_file_says_what_share_was_kept(tmp_path):
    point = Point("fisher", 0, Budget("flops", 60.0, 100.0), "masked", {"flops": 58.0}, None, {})
    Frontier("m", "stock", {"flops": 100.0}, points=(point,)).save(tmp_path / "s.json")
    written = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["points"]
    assert [entry["cost_ratio"] for entry in written] == [point.cost_ratio] == [0.58]


def test_something_else_is_not_replaced(tmp_path):
    (tmp_path / "sweep.json").write_text('{"mine": 1}', encoding="utf-8")
    with pytest.raises(PlanError, match=r"sweep.json cannot be written \(it holds something else"):
        make_frontier().save(tmp_path / "sweep.json")
    assert (tmp_path / "sweep.json").read_text(encoding="utf-8") == '{"mine": 1}'


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        Frontier.load(tmp_path / "missing.json")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(PlanError, match="found None of the format_version None, needed 'frontier'"):
        Frontier.load(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("format_version", 2, "of the format_version 2, needed 'frontier' of 1"),
        ("format_version", True, "of the format_version True"),
        ("points", None, "TypeError"),
        ("points", [{"score": "fisher"}], "KeyError: 'budget'"),
        ("totals", {"flops": "many"}, "a value that is no finite number"),
        ("nonsense", 1, "nonsense"),
    ],
)
def test_nonsense_is_refused(name, value, said):
    data = {**make_frontier().to_dict(), name: value}
    with pytest.raises(PlanError, match=said):
        Frontier.from_dict(data)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("state", "cut", "the state 'cut', needed one of masked, repaired"), ("kl", "x", "no finite")],
)
def test_nonsense_in_a_point_is_refused(name, value, said):
    data = make_frontier().to_dict()
    data["points"][0][name] = value
    with pytest.raises(PlanError, match=said):
        Frontier.from_dict(data)
