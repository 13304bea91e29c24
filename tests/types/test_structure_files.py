"""Axes, costs and stock space come back from JSON as they were, or are refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import zoo
from families import spread

from hf_gradnas.checkpoint.prunable import find_prunable
from hf_gradnas.errors import StructureError
from hf_gradnas.types import Prunable, Structure, parse_json

ALL = [*zoo.FAMILIES, *zoo.MIXTURES]


def _read(value):
    """As a file would hold it."""
    return parse_json(json.dumps(value.to_dict()))


@pytest.mark.parametrize("name", spread(ALL))
def test_what_is_found_in_every_family_comes_back_exactly(name):
    model, inputs = zoo.build(name)
    found = find_prunable(model, inputs)
    structure = Structure.from_dict(_read(found.structure))
    assert repr(structure) == repr(found.structure)  # fields that do not compare, too
    again = Prunable.from_dict(_read(found))
    assert repr(again) == repr(replace(found, sample={}))
    assert again == replace(found, sample={})


@pytest.fixture(scope="module")
def llama():
    model, inputs = zoo.build("llama")
    return find_prunable(model, inputs, layers=True)


def test_layers_and_what_is_in_them_come_back(llama):
    assert any(axis.is_layer for axis in llama.axes)
    assert any(axis.within for axis in llama.axes)
    assert Prunable.from_dict(_read(llama)) == replace(llama, sample={})


def _changed(data, path, value):
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


AXIS = ("structure", "axes", 0)
NONSENSE = [
    ((*AXIS, "size"), "4", r"axes\[0\]\.size holds '4', needed a whole number"),
    ((*AXIS, "size"), True, "size holds True"),
    ((*AXIS, "size"), 4.0, "size holds 4.0"),
    ((*AXIS, "size"), 0, "size is 0"),
    ((*AXIS, "size"), 3, "multiple of what they are in"),
    ((*AXIS, "size"), KeyError, "holds no 'size'"),
    ((*AXIS, "kind"), "legs", "kind holds 'legs', needed one of heads"),
    ((*AXIS, "kind"), None, "kind holds None"),
    ((*AXIS, "more"), 1, "holds 'more'"),
    ((*AXIS, "taps"), [], "has no tap"),
    ((*AXIS, "taps"), {}, "needed a list"),
    ((*AXIS, "parent"), "no.such:axis", "names the axis 'no.such:axis'"),
    ((*AXIS, "parent"), "", "names the axis ''"),
    ((*AXIS, "kind"), "neurons", "heads are in neurons"),
    ((*AXIS, "minimum"), -1, "minimum is -1"),
    ((*AXIS, "blocks"), 0, "blocks is 0"),
    ((*AXIS, "slices", 0, "role"), "sings", "role holds 'sings'"),
    ((*AXIS, "slices", 0, "width"), 0, "no place of units"),
    ((*AXIS, "slices", 0), "q_proj", "needed an object"),
    (("structure", "axes", 1), None, "needed an object"),
    (("costs", "flops", "constant"), "1", "constant holds '1', needed a number"),
    (("costs", "flops", "per_unit", "no.such:axis"), 1.0, "names the axis 'no.such:axis'"),
    (("costs", "flops"), KeyError, "totals are of other costs"),
    (("totals", "flops"), 0.0, "needed a number above 0"),
    (("totals", "flops"), 1e999, "needed a number above 0"),
    (("layout",), "auto", "layout is 'auto'"),
    (("space", "groups", 0, "axes"), ["x"], "names the axis 'x'"),
    (("space", "groups", 1, "allowed"), [{"legs": 1}], "is no number of"),
    (("space", "groups", 1, "allowed"), [{"heads": 1}], "is no number of"),
    (("space", "groups", 1, "allowed", 0, "heads"), -1, "is no number of"),
    (("sample",), {"a": 1}, "sample"),
    (("format_version",), 2, "reads 1"),
    (("format_version",), True, "reads 1"),
    (("format_version",), KeyError, "format_version is None"),
]


@pytest.mark.parametrize(("path", "value", "said"), NONSENSE)
def test_nonsense_is_refused_and_named(llama, path, value, said):
    with pytest.raises(StructureError, match=said):
        Prunable.from_dict(_changed(llama.to_dict(), path, value))


@pytest.mark.parametrize("data", [None, [], "axes", 3, {}])
def test_what_is_no_object_is_refused(data):
    for kind in (Structure, Prunable):
        with pytest.raises(StructureError, match=r"format_version is None"):
            kind.from_dict(data)


def test_an_axis_that_is_there_twice_is_refused(llama):
    data = llama.structure.to_dict()
    data["axes"].append(data["axes"][0])
    with pytest.raises(StructureError, match="2 axes have this name"):
        Structure.from_dict(data)
