"""The reference's calls on plain modules: its toy cases, every kind of layer, wrappers."""

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradnas import nas
from hf_gradnas.errors import BudgetError, DataError, GradNASWarning, PlanError, StructureError
from hf_gradnas.masks import masked
from hf_gradnas.nas.hparams import TYPES, needed_space


def rules(divisor):
    """Every type with the default ratios and one divisor."""
    divisors = ("channel_divisor", "feature_divisor")
    return {
        key: {glob: {n: divisor if n in divisors else v for n, v in rule.items()}}
        for key, globs in nas.GradNASConfig().items()
        for glob, rule in globs.items()
    }


def real_loss(output, batch):
    output = output["masks"] if isinstance(output, dict) else output
    return (output * 1.3).sin().mean() + output.square().mean()


def settings(batches, **more):
    return {"data_loader": batches, "loss_func": real_loss, "verbose": False, **more}


def flops_of(model, args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    return counter.get_total_flops()


def params_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def result(model, args):
    with torch.no_grad():
        output = model(*args)
    return output["masks"] if isinstance(output, dict) else output


def prune(model, args, constraints, divisor=1, **more):
    generator = torch.Generator().manual_seed(7)
    batches = [
        tuple(torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in args)
        for _ in range(2)
    ]
    config = settings(batches, collect_func=lambda batch: batch, **more)
    return nas.prune(model, [("gradnas", rules(divisor))], constraints, args, config)[1]


# --- the reference's toy cases --------------------------------------------------------------------

TOYS = {
    "linears": (
        lambda: nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 1)),
        (4, 1),
        {"0.out_features", "1.out_features"},
    ),
    "conv and linear": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1, 1), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 1)
        ),
        (1, 1, 4, 4),
        {"0.out_channels", "3.out_features"},
    ),
    "convs": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)),
        (1, 1, 4, 4),
        {"0.out_channels", "1.out_channels"},
    ),
}
LOSSES = {
    "flat": lambda output, batch: F.mse_loss(output, output + 1),
    "real": lambda output, batch: F.mse_loss(output, torch.ones_like(output)),
}


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_toy_cases_of_the_reference_are_searched_and_cut(toy, loss, recwarn, tmp_path):
    make, shape, names = TOYS[toy]
    model, x = make(), torch.randn(shape)
    total = flops_of(model, (x,))
    found, history = nas.prune(
        model,
        [("gradnas", rules(4))],
        {"flops": "90%"},
        x,
        settings([(x,)] * 3, loss_func=LOSSES[loss]),
    )
    assert found is model
    best = history["best"]
    assert best["config"].keys() == names
    assert best["constraints"]["flops"] == flops_of(model, (x,)) <= 0.9 * total
    searched = dict(nas.named_hparams(model, configurable=True))
    assert searched.keys() == names
    for name, hparam in searched.items():
        assert hparam.choices == (4, 8)
        assert torch.equal(hparam.score_tensor, hparam.score_tensor.sort(descending=True).values)
        assert hparam.score_tensor.shape == (8,)
        assert best["config"][name] == hparam.active
        layer = model.get_submodule(name.rpartition(".")[0])
        assert getattr(layer, name.rpartition(".")[2]) == hparam.active
    if loss == "flat":
        assert "All scores are zero" in str(recwarn.pop(GradNASWarning).message)
    assert not recwarn.list
    nas.save(model, tmp_path / "toy")
    twin = nas.restore(make(), tmp_path / "toy")
    assert torch.equal(twin(x), model(x))


def test_an_hparam_with_one_choice_keeps_its_size():
    model, args = networks.build("linears")
    mode = {"nn.Linear": {"*": {"feature_divisor": 4}, "1": {"features_ratio": ()}}}
    _, history = nas.prune(model, {"gradnas": mode}, {"flops": "90%"}, args, settings([args]))
    hparams = dict(nas.named_hparams(model))
    fixed = dict(nas.named_hparams(model, configurable=False))
    assert set(fixed) == {"1.out_features"}
    for name, hparam in fixed.items():
        assert hparam.choices == (hparam.max,)
        assert history["best"]["config"][name] == hparam.max == 8
    assert history["best"]["config"]["0.out_features"] == hparams["0.out_features"].active == 4


# --- every kind of layer --------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_cut_model_costs_what_is_claimed_and_equals_the_masked_one(name):
    model, args = networks.build(name)
    original = copy.deepcopy(model)
    history = prune(model, args, {"flops": "70%"})
    constraints = history["best"]["constraints"]
    assert constraints["flops"] == flops_of(model, args) <= 0.7 * flops_of(original, args)
    assert constraints["params"] == params_of(model)
    space = needed_space(model)
    with masked(original, space.structure.axes, space.kept()):
        expected = result(original, args)
    difference = (result(model, args) - expected).abs().max()
    assert difference <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_several_constraints_hold_at_once(reduce):
    model, args = networks.build("residual")
    flops, params = flops_of(model, args), params_of(model)
    history = prune(model, args, {"flops": "85%", "params": 0.6 * params}, reduce=reduce)
    assert flops_of(model, args) <= 0.85 * flops
    assert params_of(model) <= 0.6 * params
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert history["best"]["constraints"] == {
        "flops": flops_of(model, args),
        "params": params_of(model),
        "memory": weights,
    }


def test_constraints_that_exclude_each_other_are_told_apart_from_those_that_cannot_be_met():
    model, args = networks.build("linears")
    with pytest.raises(BudgetError, match=r"flops: 1% .* cannot be met; the smallest choices"):
        prune(model, args, {"flops": "1%"})
    assert {h.active for _, h in nas.named_hparams(model)} == {8}


def test_training_mode_running_statistics_and_weights_are_left_alone_by_scoring():
    model, args = networks.build("conv2d")
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def broken(output, batch):
        assert not model.training
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        prune(model, args, {"flops": "70%"}, loss_func=broken)
    assert [m.training for m in model] == [i != 1 for i in range(len(model))]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    history = prune(model, args, {"flops": "70%"})
    assert model.training
    assert model[1].num_batches_tracked == before["1.num_batches_tracked"]
    kept = needed_space(model).kept()["0:channels"]
    assert torch.equal(model[1].running_mean, before["1.running_mean"][list(kept)])
    assert history["best"]["config"]["0.out_channels"] == len(kept)
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_parameter_stays_frozen():
    model, args = networks.build("conv2d")
    model[0].weight.requires_grad_(False)
    prune(model, args, {"flops": "70%"})
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "whole"),
    [
        ({"nn.BatchNorm2d": None}, {"0.out_channels"}),  # a norm
        ({"nn.Conv2d": {"*": {}, "4": None}}, {"0.out_channels", "4.out_channels"}),  # a consumer
        ({"nn.Linear": {"*": {}, "8": None}}, {"6.out_features"}),
        ({"nn.Linear": {"*": {}, "6": None}}, {"4.out_channels", "6.out_features"}),
        ({"nn.Linear": None}, {"4.out_channels", "6.out_features"}),
        ({"nn.Conv2d": {"[!4]": {}}}, {"0.out_channels", "4.out_channels"}),
    ],
)
def test_a_type_that_is_off_keeps_the_axes_whole_that_it_touches(change, whole):
    model, args = networks.build("conv2d")
    mode = {**rules(1), **change}
    _, history = nas.prune(model, {"gradnas": mode}, {"flops": "99%"}, args, settings([args]))
    hparams = dict(nas.named_hparams(model))
    assert {n for n, h in hparams.items() if len(h.choices) == 1} == whole
    assert all(history["best"]["config"][name] == hparams[name].max for name in whole)


def test_choices_are_those_that_all_layers_with_the_channels_permit():
    model, args = networks.build("conv2d")
    mode = {
        **rules(1),
        "nn.Conv2d": {"channels_ratio": (0.25, 0.5, 0.75)},
        "nn.BatchNorm2d": {"features_ratio": (0.5, 0.75, 0.9)},
    }
    nas.prune(model, {"gradnas": mode}, {"flops": "90%"}, args, settings([args]))
    assert dict(nas.named_hparams(model))["0.out_channels"].choices == (4, 6, 8)


def test_channels_are_counted_one_by_one_where_a_unit_holds_several():
    model, args = networks.build("grouped")  # a unit is one channel in each of two groups
    mode = {**rules(1), "nn.Conv2d": {"channels_ratio": (0.25, 0.5, 0.75)}}
    nas.prune(model, {"gradnas": mode}, {"flops": "80%"}, args, settings([args]))
    hparams = dict(nas.named_hparams(model))
    assert hparams["0.out_channels"].choices == (2, 4, 6, 8)
    assert hparams["2.out_channels"].choices == (6, 12)
    for hparam in hparams.values():
        assert hparam.width == 2
        assert len(hparam.kept()) == hparam.active // 2
        assert hparam.active_slice == slice(0, hparam.active // 2)
    assert model[2].groups == 2


def test_a_type_that_no_rule_names_is_not_searched():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))
            self.down = nn.Linear(8, 6, dtype=torch.float64)
            self.head = nn.Linear(6, 2, dtype=torch.float64)

        def forward(self, x):
            return self.head(torch.relu(self.down(torch.relu(x @ self.up.t()))))

    model, x = Own(), torch.randn(3, 5, dtype=torch.float64)
    prune(model, (x,), {"flops": "90%"})
    assert dict(nas.named_hparams(model, configurable=True)).keys() == {"down.out_features"}
    assert model.up.shape == (8, 5)


@pytest.mark.parametrize("choice", [(5,), ((3, 1),)])
def test_another_kernel_size_is_refused_when_the_model_is_converted(choice):
    model, _ = networks.build("conv2d")
    mode = {"nn.Conv2d": {"*": {"kernel_size": choice}}}
    message = r"0: the rule's kernel_size has the choice .* kernel sizes are not searched"
    with pytest.raises(PlanError, match=message):
        nas.convert(model, {"gradnas": mode})
    same = {"nn.Conv2d": {"*": {"kernel_size": (3,)}, "4": {"kernel_size": ((1, 1),)}}}
    nas.convert(model, {"gradnas": same})


def test_nothing_to_search_is_an_error():
    model, args = networks.build("linears")
    with pytest.raises(StructureError, match="no searchable hparams found in Sequential: all 2"):
        nas.prune(model, "gradnas", {"flops": "90%"}, args, settings([args]))


# --- wrappers and call conventions ----------------------------------------------------------------


def test_a_parallel_wrapper_is_unwrapped_and_returned(tmp_path):
    model, args = networks.build("conv2d")
    wrapped = nn.DataParallel(model)
    found, _ = nas.prune(wrapped, [("gradnas", rules(1))], {"flops": "70%"}, args, settings([args]))
    assert found is wrapped
    assert params_of(model) == params_of(wrapped) < params_of(networks.build("conv2d")[0])
    nas.save(wrapped, tmp_path / "f")
    twin = nas.restore(nn.DataParallel(networks.build("conv2d", seed=1)[0]), tmp_path / "f")
    assert torch.equal(twin(*args), model(*args))


def test_a_compiled_model_is_unwrapped_and_returned():
    model, args = networks.build("conv2d")
    compiled = torch.compile(model, backend="eager")
    found, history = nas.prune(
        compiled, [("gradnas", rules(1))], {"flops": "70%"}, args, settings([args])
    )
    assert found is compiled
    assert params_of(model) == params_of(compiled) == history["best"]["constraints"]["params"]
    assert history["best"]["config"].keys() == {
        "0.out_channels",
        "4.out_channels",
        "6.out_features",
    }


class Head(nn.Module):
    """A user's own module around a Transformers model."""

    def __init__(self, bert):
        super().__init__()
        self.bert, self.head = bert, nn.Linear(64, 3, dtype=torch.float64)

    def forward(self, input_ids, attention_mask=None):
        output = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(output.last_hidden_state[:, 0])


@pytest.mark.parametrize("form", ["dict", "dict in tuple", "tensor of zeros", "list of tensors"])
def test_a_module_around_a_transformers_model_is_pruned_and_restored(form, tmp_path):
    model, batch = zoo.build("bert", dtype=torch.float64)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    names = ("input_ids", "attention_mask")
    dummy = {
        "dict": inputs,
        "dict in tuple": (inputs,),
        "tensor of zeros": torch.zeros(1, 16, dtype=torch.long),
        "list of tensors": tuple(inputs[name] for name in names),
    }[form]
    wrapper = Head(copy.deepcopy(model.bert))
    inputs = {name: inputs[name] for name in names}
    dummy = {n: dummy[n] for n in names} if form == "dict" else dummy
    dummy = ({n: dummy[0][n] for n in names},) if form == "dict in tuple" else dummy
    fresh, before = copy.deepcopy(wrapper), params_of(wrapper)
    _, history = nas.prune(
        wrapper,
        {"gradnas": rules(8)},
        {"params": "80%"},
        dummy,
        settings(
            [(inputs, batch["labels"])],
            loss_func=lambda output, given: F.cross_entropy(output, given[1]),
        ),
    )
    assert {name.rpartition(".")[2] for name in history["best"]["config"]} == {
        "num_attention_heads",
        "out_features",
    }
    assert history["best"]["constraints"]["params"] == params_of(wrapper) <= 0.8 * before
    nas.save(wrapper, tmp_path / "f")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    assert torch.equal(nas.restore(fresh, tmp_path / "f")(**inputs), wrapper(**inputs))


# --- grouped queries ------------------------------------------------------------------------------


def tiny_llama(groups):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        vocab_size=64,
        attention_dropout=0.0,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(
    ("groups", "what", "choices"),
    [
        (4, "num_attention_heads", (1, 2, 3, 4)),
        (2, "num_key_value_heads", (1, 2)),
        (1, "num_attention_heads", (1, 2, 3, 4)),
    ],
)
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_grouped_queries_are_chosen_by_group_and_the_heads_follow(groups, what, choices, reduce):
    model, ids = tiny_llama(groups), torch.arange(24).view(2, 12)
    _, history = nas.prune(
        model,
        {"gradnas": {"nn.Linear": None}},
        {"params": "90%"},
        torch.zeros(1, 12, dtype=torch.long),
        settings([{"input_ids": ids, "labels": ids}], loss_func=lambda o, b: o.loss, reduce=reduce),
    )
    found = {n: h for n, h in nas.named_hparams(model) if not n.endswith("out_features")}
    assert {name.rpartition(".")[2] for name in found} == {what}
    assert {hparam.choices for hparam in found.values()} == {choices}
    assert history["best"]["constraints"]["params"] >= params_of(model)
    for index, layer in enumerate(model.model.layers):
        kept = history["best"]["config"][f"model.layers.{index}.self_attn.{what}"]
        heads = kept * 2 if groups == 2 else kept
        assert layer.self_attn.q_proj.out_features == 8 * heads
        assert layer.self_attn.k_proj.out_features == 8 * min(kept, groups)
    assert torch.isfinite(model(ids).logits).all()


def test_forwards_whose_arguments_have_no_names_are_refused():
    class Unnamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))

        def forward(self, *inputs):
            return self.layers(inputs[0])

    x = torch.randn(3, 2)
    with pytest.raises(DataError, match="takes inputs by position only, needed arguments"):
        nas.prune(Unnamed(), {"gradnas": rules(1)}, {"flops": "80%"}, x, settings([x]))
    with pytest.raises(DataError, match=r"dummy_input: does not fit Linear\.forward"):
        nas.prune(nn.Linear(2, 2), "gradnas", {"flops": "80%"}, (x, x), settings([x]))


def test_every_type_of_the_config_is_a_layer_or_an_attention():
    assert {*TYPES, "hf.Attention"} == set(nas.GradNASConfig().keys())
