"""A network cut to some of its channels equals the masked one, and loads by its record."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from channel_axes import CASES, Case, grouped, plain
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from hf_gradnas.errors import PlanError
from hf_gradnas.masks import masked
from hf_gradnas.surgery.cut import check_kept, cut
from hf_gradnas.surgery.modeling_gradnas import RecordError, resize
from hf_gradnas.surgery.records import merge_records

NAMES = sorted(CASES)


def cut_copy(case: Case, kept: dict[str, list[int]]) -> tuple[nn.Module, dict]:
    smaller = copy.deepcopy(case.model)
    return smaller, cut(smaller, case.axes, kept)


def difference(case: Case, kept: dict[str, list[int]]) -> tuple[float, float]:
    """Of masked to cut, and of masked to whole, relative."""
    whole = case.run()
    with masked(case.model, case.axes, kept):
        reference = case.run()
    result = case.run(cut_copy(case, kept)[0])
    scale = float(whole.abs().max())
    return (
        float((result - reference).abs().max()) / scale,
        float((reference - whole).abs().max()) / scale,
    )


@pytest.mark.parametrize("name", NAMES)
def test_masked_equals_cut(name: str) -> None:
    case = CASES[name]()
    kept = case.kept()
    plans = [kept, *[{axis: units} for axis, units in kept.items()], {a: [0] for a in kept}]
    for plan in plans:
        apart, effect = difference(case, plan)
        assert apart < 1e-12
        assert effect > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_modules_repeat_the_sizes_of_their_tensors(name: str) -> None:
    case = CASES[name]()
    model, _ = cut_copy(case, case.kept())
    for module in model.modules():
        if isinstance(module, _ConvNd):
            out, inner = module.weight.shape[:2]
            sides = (out, inner * module.groups)
            found = (module.out_channels, module.in_channels)
            assert found == (sides[::-1] if module.transposed else sides)
            assert module.bias.shape == (module.out_channels,)
        elif isinstance(module, _NormBase) and module.running_mean is not None:
            assert module.num_features == len(module.running_mean) == len(module.running_var)
            assert module.num_batches_tracked.ndim == 0
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight)
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            assert module.normalized_shape == tuple(module.weight.shape)
        elif isinstance(module, nn.PReLU):
            assert module.num_parameters == len(module.weight)
    assert all(t.is_contiguous() for t in model.state_dict().values())


def test_sizes_that_no_tensor_repeats_are_counted_down() -> None:
    case = CASES["concatenation"]()
    model, record = cut_copy(case, {"left:channels": [1, 4], "right:channels": [0, 2, 3]})
    assert model.plain.num_features == 2 + 2 + 3  # two channels belong to no axis
    assert record["modules"]["plain"] == {"num_features": 7}
    model, _ = cut_copy(CASES["channels last"](), {"wide:channels": [1, 4, 5]})
    assert model.bare.normalized_shape == (3,)
    model, _ = cut_copy(CASES["depthwise"](), {"0:channels": [1, 4]})
    assert [model[i].groups for i in (3, 5)] == [2, 2]
    assert (model[5].in_channels, model[5].out_channels) == (2, 4)
    assert (model[6].num_groups, model[6].num_channels) == (4, 4)


def test_a_norm_without_parameters_keeps_its_other_dimensions() -> None:
    model = nn.Sequential(nn.LayerNorm((8, 5, 5), elementwise_affine=False))
    record = {"format_version": 1, "architecture": "Sequential"}
    resize(model, {**record, "modules": {"0": {"normalized_shape": 3}}})
    assert model[0].normalized_shape == (3, 5, 5)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_network_takes_the_shapes_from_the_record_alone(name: str) -> None:
    case = CASES[name]()
    smaller, record = cut_copy(case, case.kept())
    fresh = CASES[name]().model
    for _ in range(2):  # the second time changes nothing
        resize(fresh, json.loads(json.dumps(record)))
        assert str(fresh) == str(smaller)
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(case.run(fresh), case.run(smaller))


@pytest.mark.parametrize("name", ["plain 2d", "depthwise", "concatenation"])
def test_cutting_twice_equals_cutting_once(name: str) -> None:
    case = CASES[name]()
    first = {axis.name: list(range(axis.size - 1)) for axis in case.axes}
    second = {axis.name: list(range(1, axis.size - 1)) for axis in case.axes}
    once, record = cut_copy(case, second)
    twice, old = cut_copy(case, first)
    axes = _axes_of_the_cut(case, name)
    new = cut(twice, axes, {a.name: list(range(1, a.size)) for a in axes})
    assert merge_records(old, new) == record
    assert torch.equal(case.run(twice), case.run(once))


def _axes_of_the_cut(case: Case, name: str) -> list:
    """The axes by hand once more, for networks that lost the last channel of every axis."""
    smaller = [replace(axis, size=axis.size - 1) for axis in case.axes]
    if name != "concatenation":
        return smaller
    left, right = smaller
    moved = tuple(replace(s, offset=7) if s.offset else s for s in right.slices)
    norms = tuple(replace(t, offset=7) for t in right.norms)
    (sizes,) = {replace(a, axis="", value=10) for axis in smaller for a in axis.attributes}
    left, right = (
        replace(axis, attributes=(replace(sizes, axis=axis.name),)) for axis in (left, right)
    )
    return [left, replace(right, slices=moved, norms=norms)]


def test_the_rows_of_each_group_are_kept() -> None:
    case = grouped()
    smaller, _ = cut_copy(case, {"0:channels": [1], "2:channels": [0, 2]})
    places = [1, 3, 5, 7]
    assert torch.equal(smaller[0].weight, case.model[0].weight[places])
    assert torch.equal(smaller[1].bias, case.model[1].bias[places])
    out = [0, 2, 3, 5, 6, 8, 9, 11]
    assert torch.equal(smaller[2].weight, case.model[2].weight[out][:, [1]])
    assert torch.equal(smaller[4].weight, case.model[4].weight[:, out])


def test_flags_and_buffers_are_kept() -> None:
    case = plain()
    case.model[1].num_batches_tracked += 7
    case.model[0].weight.requires_grad_(False)
    smaller, _ = cut_copy(case, {"0:channels": [2, 5]})
    assert int(smaller[1].num_batches_tracked) == 7
    assert torch.equal(smaller[1].running_var, case.model[1].running_var[[2, 5]])
    assert not isinstance(smaller[1].running_var, nn.Parameter)
    assert not smaller[0].weight.requires_grad
    assert smaller[0].bias.requires_grad


def test_channels_cannot_all_go() -> None:
    case = plain()
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    with pytest.raises(PlanError, match=r"0:channels: 0 of its 8 channels are kept, but at least"):
        cut(case.model, case.axes, {"0:channels": []})
    check_kept(case.axes, {"0:channels": [7]})
    assert all(torch.equal(t, before[name]) for name, t in case.model.state_dict().items())


def test_a_plain_network_of_another_class_is_refused() -> None:
    case = plain()
    record = {"format_version": 1, "architecture": "ResNet", "modules": {"0": {"bias": [3]}}}
    with pytest.raises(RecordError, match=r"Sequential: config\.gradnas holds sizes of ResNet"):
        resize(case.model, record)
    assert case.model[0].bias.shape == (8,)


def test_rows_that_the_tensor_lacks_are_refused_before_the_first_write() -> None:
    case = plain()
    record = {"format_version": 1, "architecture": "Sequential"}
    record["modules"] = {"0": {"bias": [2]}, "3": {"bias": [2]}}
    with pytest.raises(RecordError, match=r"3\.bias: has shape \[3\], .* belongs to another model"):
        resize(case.model, record, rows={"0.bias": {0: [0, 1]}, "3.bias": {0: [0, 5]}})
    assert case.model[0].bias.shape == (8,)
