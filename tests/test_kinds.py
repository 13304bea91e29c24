"""One row per kind, and the roles of slices that spare everybody else to ask for the kind."""

from __future__ import annotations

from typing import get_args

import conv_families
import pytest
import torch
import zoo
from families import spread
from torch import nn

from hf_gradnas.errors import StructureError
from hf_gradnas.masks import masked
from hf_gradnas.types import KINDS, PARENTS, Axis, Kind, Mask, Slice, Tap
from hf_gradnas.verification import find_structure


def test_every_kind_has_a_row_and_every_row_a_mask() -> None:
    assert set(KINDS) == set(Kind)
    assert {row.mask for row in KINDS.values()} == set(get_args(Mask))
    assert {Kind.KV_GROUPS, Kind.EXPERTS} == PARENTS
    for row in KINDS.values():
        assert row.singular
        assert row.plural
        assert row.title
        assert row.any_number != bool(row.config_names)
        assert list(row.multiples) == sorted(row.multiples, reverse=True)


def test_an_axis_has_a_place_to_be_masked_at() -> None:
    with pytest.raises(StructureError, match="a:neurons: the axis has no tap, but its units"):
        Axis("a:neurons", "a", Kind.NEURONS, 4, (), ())


def test_slices_are_the_same_when_their_rows_are_whatever_they_do() -> None:
    assert Slice("a.weight", 0, role="makes") == Slice("a.weight", 0)
    assert Slice("a.weight", 0) != Slice("a.weight", 1)
    assert Slice("a.weight", 0, 2, 1, 3).rows([0, 2]) == [1, 2, 7, 8]
    assert Tap("a", "input", -1, 2, 1, 3).end(3) == 9


def test_people_count_channels_and_whole_units_of_the_rest() -> None:
    two = (Tap("a", "output", 1, 2, 0, 2),)
    assert Axis("a:channels", "a", Kind.CHANNELS, 4, (), two).per_unit == 2
    assert Axis("a:heads", "a", Kind.HEADS, 4, (), two).per_unit == 1


@pytest.mark.parametrize("family", spread([*zoo.FAMILIES, *zoo.CONV_FAMILIES]))
def test_every_unit_is_made_and_all_but_kv_groups_are_read(family: str) -> None:
    model, inputs = zoo.build(family)
    structure = find_structure(model, inputs)
    parents = {axis.parent for axis in structure.axes}
    for axis in structure.axes:
        assert axis.makers, axis.name
        assert bool(axis.readers) is (axis.name not in parents), axis.name
        for part in (*axis.makers, *axis.readers):
            assert model.get_parameter(part.tensor).ndim > 1
        for part in axis.slices:  # a bias follows the weight that makes
            if part.tensor.endswith("bias"):
                assert part.role == "follows", part


def test_what_neither_makes_nor_reads_follows() -> None:
    model, inputs = zoo.build("t5")
    heads = find_structure(model, inputs)["encoder.block.0.layer.0.SelfAttention:heads"]
    roles = {part.tensor.removeprefix(f"{heads.module}."): part.role for part in heads.slices}
    assert roles.pop("relative_attention_bias.weight") == "follows"
    assert roles == {"o.weight": "reads", **{f"{name}.weight": "makes" for name in "qkv"}}


def test_a_depthwise_kernel_follows_the_channels_that_pass_it() -> None:
    model, inputs, _ = conv_families.build("mobilenet v1")
    convolutions = {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    }
    parts = [part for axis in find_structure(model, inputs).axes for part in axis.slices]
    depthwise = [part for part in parts if part.tensor in convolutions]
    assert depthwise
    assert {part.role for part in depthwise} == {"follows"}


def test_a_masked_kv_group_is_its_heads_masked_at_the_same_place() -> None:
    model, inputs = zoo.build("llama")
    axes = find_structure(model, inputs).axes
    groups = next(axis for axis in axes if axis.kind == Kind.KV_GROUPS)
    heads = next(axis for axis in axes if axis.parent == groups.name)
    each = heads.size // groups.size
    with torch.no_grad():
        with masked(model, axes, {groups.name: [1]}):
            by_group = model(**inputs).logits
        with masked(model, axes, {heads.name: range(each, 2 * each)}):
            assert torch.equal(model(**inputs).logits, by_group)
