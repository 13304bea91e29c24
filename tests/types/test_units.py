"""Units read, compare and hash as the tuple of the same numbers, and are small."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hf_gradnas import Plan
from hf_gradnas.errors import PlanError
from hf_gradnas.types import Units, check_indices

ROWS = [(), (0,), (0, 2, 5), tuple(range(300)), (3, 70_000), (0, 2**33)]


@pytest.mark.parametrize("row", ROWS)
def test_they_are_what_their_tuple_is(row):
    units = Units(row)
    assert units == row
    assert row == units
    assert hash(units) == hash(row)
    assert repr(units) == repr(row)
    assert (len(units), list(units), bool(units)) == (len(row), list(row), bool(row))
    assert units == Units(np.array(row, dtype=np.int64)) == Units(iter(row))
    assert all(type(unit) is int for unit in units)
    assert isinstance(units, Sequence)
    assert (row[-1] in units) if row else (0 not in units)
    assert units[1:] == row[1:]
    assert list(reversed(units)) == list(reversed(row))
    assert {units: 1}[row] == 1
    for again in (copy.deepcopy(units), copy.copy(units)):
        assert again == row
        assert not again._array.flags.writeable
    assert units.tolist() == list(row)
    assert np.asarray(units).dtype == np.int64
    assert torch.tensor(units, dtype=torch.long).tolist() == list(row)


def test_they_are_sorted_as_tuples_are():
    rows = [(3,), (), (0, 70_000), (0, 2, 5), (0, 2)]
    assert sorted(map(Units, rows)) == sorted(rows)
    assert (0, 1) < Units((0, 2)) <= (0, 2)
    assert Units((1,)) > (0, 2)
    with pytest.raises(TypeError):
        Units((1,)) < [2]  # noqa: B015 - the comparison is what fails


def test_they_differ_where_tuples_do():
    units = Units((0, 2, 5))
    for other in ((0, 2), (0, 2, 6), [0, 2, 5], "025", None, 3, Units((0, 2)), Units()):
        assert units != other
        assert other != units
    assert (units[0], units[-1]) == (0, 5)
    with pytest.raises(IndexError):
        units[3]


@pytest.mark.parametrize("bad", [[0.5], [True], ["0"], [[0]], [None], [10**30]])
def test_only_integers_are_units(bad):
    with pytest.raises(TypeError, match="units are a row of integers"):
        Units(bad)


def test_none_is_below_zero():
    with pytest.raises(ValueError, match="found -1"):
        Units([3, -1])


def test_an_array_that_changes_later_does_not_change_them():
    array = np.array([1, 2], dtype=np.uint8)
    units = Units(array)
    array[0] = 7
    assert units == (1, 2)


def test_each_number_takes_as_many_bytes_as_the_largest_needs():
    assert [Units(row)._array.itemsize for row in ([255], [256], [65_536], [2**33])] == [1, 2, 4, 8]


@pytest.mark.parametrize("wrong", [(2, 0), (1, 1), (0, 4)])
def test_they_are_checked_as_tuples_are(wrong):
    check_indices("a", Units((0, 3)), 4)
    with pytest.raises(PlanError, match="sorted, distinct and below 4"):
        check_indices("a", Units(wrong), 4)


def test_a_plan_s_file_is_the_same_as_with_tuples(tmp_path):
    rows = {"a:heads": (0, 2), "b:neurons": ()}
    sizes = {"a:heads": 4, "b:neurons": 3}
    plain = Plan(rows, sizes, "per_layer")
    small = Plan({name: Units(row) for name, row in rows.items()}, sizes, "per_layer")
    assert plain == small
    assert repr(plain) == repr(small)
    assert json.dumps(plain.to_dict()) == json.dumps(small.to_dict())
    small.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plain
    assert all(isinstance(units, Units) for units in again.kept.values())
