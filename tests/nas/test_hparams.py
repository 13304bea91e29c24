"""Hparams and the search space of a converted model."""

import copy
import gc
from dataclasses import replace

import networks
import pytest
import torch
import zoo

from hf_gradnas import nas
from hf_gradnas.errors import GradNASError, OrderError, PlanError
from hf_gradnas.nas.config import GradNASConfig
from hf_gradnas.nas.hparams import (
    TYPES,
    SearchSpace,
    axis_choices,
    check_kernel_size,
    choices_of,
    close_space,
    make_divisible,
    make_hparams,
    needed_space,
    open_space,
    space_of,
)
from hf_gradnas.nas.rules import ConvRule
from hf_gradnas.types import Axis, Kind, Slice, Structure, Tap
from hf_gradnas.verification import find_structure

EVERY = nas.GradNASConfig(**{key: {} for key in nas.GradNASConfig()})


def hparam_of(scores, *, width=1):
    taps = (Tap("x", "output", 1, width, 0, width),)
    axis = Axis("x:channels", "x", Kind.CHANNELS, len(scores), (), taps)
    choices = tuple(width * count for count in range(1, len(scores) + 1))
    ordered = torch.tensor(scores, dtype=torch.float64).sort(descending=True)
    order = tuple(ordered.indices.tolist())
    return nas.Hparam("x.out_channels", axis, choices, choices[-1], ordered.values, order)


def test_the_degradation_is_the_sum_of_the_pruned_scores():
    hparam = hparam_of([3.0, 1.0, 4.0, 1.5])
    assert hparam.score_tensor.tolist() == [4.0, 3.0, 1.5, 1.0]
    assert [hparam.degradation(c) for c in hparam.choices] == [5.5, 2.5, 1.0, 0.0]
    hparam.active = 2
    assert hparam.kept() == (0, 2)
    assert hparam.active_slice == slice(0, 2)


def test_units_of_several_channels_go_together():
    hparam = hparam_of([3.0, 1.0, 4.0], width=2)
    assert (hparam.max, hparam.width, hparam.choices) == (6, 2, (2, 4, 6))
    assert [hparam.degradation(c) for c in hparam.choices] == [4.0, 1.0, 0.0]
    hparam.active = 4
    assert hparam.kept() == (0, 2)


def test_before_scores_are_measured_the_first_units_stay():
    hparam = hparam_of([1.0, 2.0, 3.0])
    hparam.score_tensor, hparam.order, hparam.active = None, (), 2
    assert hparam.degradation(1) == 0.0
    assert hparam.kept() == (0, 1)


def test_counts_follow_groups_and_leave_out_what_is_not_named():
    groups = Axis("a:kv_groups", "a", Kind.KV_GROUPS, 2, (), (Tap("a.o", "input", -1, 3, 0, 3),))
    heads = Axis(
        "a:heads", "a", Kind.HEADS, 6, (), (Tap("a.o", "input", -1),), parent="a:kv_groups"
    )
    parts = (Slice("b.up.weight", 0, role="makes"),)
    other = Axis("b:neurons", "b", Kind.NEURONS, 4, parts, (Tap("b.down", "input", -1),))
    space = SearchSpace(nas.GradNASConfig(), Structure((groups, heads, other)))
    hparam = nas.Hparam("a.num_key_value_heads", groups, (1, 2), 2, None, (1, 0))
    space.hparams = {hparam.name: hparam}
    assert space.counts({}) == {"a:kv_groups": 2, "a:heads": 6, "b:neurons": 4}
    assert space.counts({hparam.name: 1}) == {"a:kv_groups": 1, "a:heads": 3, "b:neurons": 4}
    hparam.active = 1
    assert space.kept() == {
        "a:kv_groups": (1,),
        "a:heads": (3, 4, 5),
        "b:neurons": (0, 1, 2, 3),
    }


def test_a_space_without_axes_says_which_call_is_missing():
    space = SearchSpace(nas.GradNASConfig())
    for call in (space.kept, lambda: space.counts({}), space.needed_structure):
        with pytest.raises(OrderError, match="no axes yet; call search"):
            call()


def test_a_space_belongs_to_a_model_and_goes_with_it():
    model, _ = networks.build("linears")
    assert space_of(model) is None
    with pytest.raises(OrderError, match="Sequential: not converted; call convert"):
        list(nas.named_hparams(model))
    before = set(vars(model))
    space = open_space(model, nas.GradNASConfig())
    assert needed_space(model) is space is space_of(model)
    assert set(vars(model)) == before
    assert list(nas.named_hparams(model)) == []
    assert space_of(copy.deepcopy(model)) is None
    assert open_space(model, nas.GradNASConfig()) is not space
    close_space(model)
    close_space(model)
    assert space_of(model) is None
    number = len(nas.hparams._SPACES)
    open_space(model, nas.GradNASConfig())
    del model
    gc.collect()
    assert len(nas.hparams._SPACES) == number


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "residual",
            {"stem.0.out_channels": 8, "first.0.out_channels": 6, "second.0.out_channels": 4},
        ),
        ("linears", {"0.out_features": 8, "1.out_features": 8}),
        ("transpose1d", {"0.out_channels": 8, "2.out_channels": 6}),
        ("transformers conv1d", {"0.out_features": 8, "2.out_features": 6}),
    ],
)
def test_hparams_have_the_names_and_sizes_of_the_layers(name, expected):
    model, args = networks.build(name)
    nas.convert(model, {"gradnas": EVERY})
    config = {
        "data_loader": [args],
        "loss_func": lambda output, batch: output.square().mean(),
        "verbose": False,
    }
    nas.search(model, {"flops": "99%"}, args, config)
    assert {n: h.max for n, h in nas.named_hparams(model)} == expected
    assert all(name == hparam.name for name, hparam in nas.named_hparams(model))


def test_named_hparams_can_be_those_with_or_without_a_choice():
    model, batch = zoo.build("bert", dtype=torch.float64)
    structure = find_structure(model, {k: v for k, v in batch.items() if k != "labels"})
    space = open_space(model, nas.GradNASConfig(**{"nn.Linear": None}))
    space.structure, space.hparams = structure, make_hparams(model, structure, space.config)
    both, free, fixed = (
        dict(nas.named_hparams(model, configurable)) for configurable in (None, True, False)
    )
    assert {name.rpartition(".")[2] for name in free} == {"num_attention_heads"}
    assert {name.rpartition(".")[2] for name in fixed} == {"out_features"}
    assert both == {**free, **fixed}
    assert list(both) == list(space.hparams)


def test_experts_in_one_tensor_follow_the_rule_of_linear():
    model, batch = zoo.build("bert", dtype=torch.float64)
    structure = find_structure(model, {k: v for k, v in batch.items() if k != "labels"})
    # As experts have it: the first weight does not belong to a module of a type with a rule.
    axes = tuple(
        Axis(
            axis.name,
            axis.module,
            axis.kind,
            axis.size,
            (Slice(f"{axis.module}.experts", 1, role="makes"),),
            axis.taps,
        )
        for axis in structure.axes
        if axis.kind is Kind.NEURONS
    )
    for axis in axes:
        stacked = torch.nn.Parameter(torch.zeros(2, axis.size, 4))  # (experts, units, inputs)
        model.get_submodule(axis.module).experts = stacked
    for rule, choices in (({"feature_divisor": 32}, (32, 64, 96)), (None, (96,))):
        config = nas.GradNASConfig(**{"nn.Linear": rule})
        for hparam in make_hparams(model, Structure(axes), config).values():
            assert hparam.choices == choices


def test_types_have_the_keys_of_the_config():
    assert {*TYPES, "hf.Attention"} == set(nas.GradNASConfig())
    for key, types in TYPES.items():
        first = types[0] if isinstance(types, tuple) else types
        assert first.__name__ == key.removeprefix("nn.")


RATIOS = tuple(0.05 * i for i in range(1, 21))
OF_1536 = (
    *(96, 160, 224, 320, 384, 448, 544, 608, 704, 768),
    *(832, 928, 992, 1088, 1152, 1216, 1312, 1376, 1472, 1536),
)
FFN = Axis("ffn:neurons", "ffn", Kind.NEURONS, 1536, (), (Tap("ffn.down", "input", -1),))


def channels(size, width=1, minimum=1):
    taps = (Tap("conv", "output", 1, width, 0, width),)
    return Axis("conv:channels", "conv", Kind.CHANNELS, size, (), taps, minimum=minimum)


@pytest.mark.parametrize(
    ("value", "divisor", "result"),
    [
        (76.8, 32, 96),  # the nearest is 64, which is under 90 %
        (998.4, 32, 992),
        (48, 32, 64),  # half is rounded up
        (47.9, 32, 64),  # 32 is under 90 %
        (1, 32, 32),  # never 0
        (35, 32, 32),
        (36, 32, 64),
        (10, 1, 10),
        (2.5, 1, 3),
        (0.2, 1, 1),
    ],
)
def test_sizes_are_rounded_as_in_mobilenet(value, divisor, result):
    assert make_divisible(value, divisor) == result


def test_a_rounded_size_is_a_near_multiple():
    for divisor in (1, 4, 7, 32):
        for tenth in range(1, 3000, 7):
            value = tenth / 10
            size = make_divisible(value, divisor)
            assert size % divisor == 0
            assert size >= max(0.9 * value, divisor)
            assert size - value < max(divisor / 2 + 0.1 * value, divisor) + 1e-9
            assert size == divisor or size - divisor < value


def test_the_minimum_holds_besides_the_divisor():
    assert make_divisible(3, 4, 16) == 16
    assert make_divisible(3, 4, 1) == 4
    assert make_divisible(100, 4, 16) == 100


def test_the_choices_of_1536_features():
    assert choices_of(1536, RATIOS, 32) == OF_1536
    assert axis_choices(FFN, "nn.Linear", "ffn.up", GradNASConfig()) == OF_1536


def test_without_ratios_every_multiple_is_a_choice():
    assert choices_of(12, None, 1) == tuple(range(1, 13))
    assert choices_of(10, None, 4) == (4, 8, 10)
    assert choices_of(3, None, 4) == (3,)


def test_choices_are_sorted_distinct_and_at_most_the_size():
    assert choices_of(8, (1.0, 0.5, 0.5, 0.55), 4) == (4, 8)
    assert choices_of(20, RATIOS, 32) == (20,)
    assert choices_of(40, RATIOS, 32) == (32, 40)
    assert choices_of(40, (), 32) == (40,)


def test_heads_are_one_to_all():
    heads = Axis("a:heads", "a", Kind.HEADS, 12, (), (Tap("a.out", "input", -1, 64, 0, 64),))
    assert axis_choices(heads, "hf.Attention", "a", GradNASConfig()) == tuple(range(1, 13))
    config = GradNASConfig(hf_attention={"n_heads_ratio": (0.5,), "n_heads_divisor": 4})
    assert axis_choices(heads, "hf.Attention", "a", config) == (8, 12)


def test_a_rule_that_is_off_has_no_choices():
    config = GradNASConfig(nn_linear={"*": {}, "*up*": None}, nn_conv2d={"other": {}})
    assert axis_choices(FFN, "nn.Linear", "ffn.up", config) is None
    assert axis_choices(channels(8), "nn.Conv2d", "conv", config) is None
    assert axis_choices(FFN, "nn.Linear", "ffn.gate", config) is not None


def test_channels_count_where_they_are_whole_units():
    config = GradNASConfig(nn_conv2d={"channel_divisor": 4})
    assert axis_choices(channels(8), "nn.Conv2d", "conv", config) == (4, 8)
    # 16 channels in units of 2: 4, 8, 12, 16 channels; 24 in units of 3: 12 and 24.
    assert axis_choices(channels(8, width=2), "nn.Conv2d", "conv", config) == (2, 4, 6, 8)
    assert axis_choices(channels(8, width=3), "nn.Conv2d", "conv", config) == (4, 8)
    assert axis_choices(channels(7, width=3), "nn.Conv2d", "conv", config) == (4, 7)
    default = GradNASConfig()
    assert axis_choices(channels(64, width=3), "nn.Conv2d", "conv", default) == (32, 64)


def test_fewer_units_than_the_minimum_are_no_choice():
    config = GradNASConfig(nn_conv2d={})
    assert axis_choices(channels(4, minimum=3), "nn.Conv2d", "conv", config) == (3, 4)
    none = replace(channels(4), minimum=0)
    assert axis_choices(none, "nn.Conv2d", "conv", config) == (1, 2, 3, 4)


@pytest.mark.parametrize("sizes", [(), (3,), ((3, 3),), (3, (3, 3), 3)])
def test_the_present_kernel_size_is_no_change(sizes):
    check_kernel_size(ConvRule(kernel_size=sizes), (3, 3), "conv")


@pytest.mark.parametrize("sizes", [(1,), (3, 5), ((3, 1),), ((3,),), ((3, 3, 3),)])
def test_another_kernel_size_is_refused(sizes):
    message = (
        r"net\.conv: the rule's kernel_size has the choice .*, the layer has \(3, 3\); kernel sizes"
        r" are not searched: leave kernel_size empty, or turn the layer off with \{'net\.conv': No"
    )
    with pytest.raises(PlanError, match=message):
        check_kernel_size(ConvRule(kernel_size=sizes), (3, 3), "net.conv")
    assert issubclass(PlanError, GradNASError)
