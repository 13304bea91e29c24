"""Hparams and the search space of a converted model."""

import copy
import gc

import networks
import pytest
import torch
import zoo

from hf_gradnas import nas
from hf_gradnas.errors import OrderError
from hf_gradnas.nas.hparams import (
    TYPES,
    SearchSpace,
    close_space,
    make_hparams,
    needed_space,
    open_space,
    space_of,
)
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
