"""The equations of experts and of the neurons in them, in float64 where the equation is exact."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import zoo
from families import spread, structure_of
from mask_gradients import check_gradients, recorded
from torch.utils.flop_counter import FlopCounterMode

from hf_gradnas import GradNASPruner
from hf_gradnas._compat import implementations
from hf_gradnas.callback.weights import WeightMask, check_maskable
from hf_gradnas.errors import PlanError, StructureError
from hf_gradnas.masks import mask_leaves, masked
from hf_gradnas.routing import run_experts
from hf_gradnas.running.states import frozen
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Kind, Plan, Structure
from hf_gradnas.verification import find_structure

ALL = sorted(zoo.MIXTURES)
CHOSEN = sorted(zoo.MIXTURES.keys() - set(zoo.ALL_RUN))
TOLD = [name for name in CHOSEN if name != "jetmoe"]  # by indices
BEHIND_INTERFACE = sorted(zoo.MIXTURES.keys() - set(zoo.OWN_KERNELS))
EXPERTS, NEURONS = 6, 24


@pytest.fixture(params=ALL)
def found(request):
    model, inputs = zoo.build(request.param)
    return model, inputs, structure_of(request.param)


def experts_of(structure: Structure) -> list:
    return [axis for axis in structure.axes if axis.kind is Kind.EXPERTS]


def inside(structure: Structure, experts) -> object:
    return next(axis for axis in structure.axes if axis.parent == experts.name)


def irregular(structure: Structure) -> dict[str, list[int]]:
    """Other experts in every layer, and in each of them other neurons."""
    kept = {}
    for layer, axis in enumerate(experts_of(structure)):
        stay = [0, 2, 3, 5] if layer % 2 else [1, 2, 4]
        neurons = inside(structure, axis)
        each = neurons.size // axis.size
        kept[axis.name] = stay
        kept[neurons.name] = [
            e * each + n for e in stay for n in range(each) if (n + e) % 3 or layer % 2
        ]
        if layer % 2:
            kept[neurons.name] = [u for u in kept[neurons.name] if (u % each + u // each) % 4]
    return kept


def logits(model, inputs):
    with torch.no_grad(), zoo.float64_throughout():
        return model(**inputs).logits


def test_every_layer_has_experts_and_neurons_in_them(found):
    _, _, structure = found
    experts = experts_of(structure)
    assert [axis.size for axis in experts] == [EXPERTS, EXPERTS]
    assert [axis.minimum for axis in experts] == [2, 2]
    assert [inside(structure, axis).size for axis in experts] == [EXPERTS * NEURONS] * 2
    for axis in experts:
        assert axis.name == f"{axis.module}:experts"
        assert inside(structure, axis).name == f"{axis.module}:neurons"


def test_masked_is_cut(found):
    model, inputs, structure = found
    kept = irregular(structure)
    with masked(model, structure.axes, kept):
        expected = logits(model, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-3
    cut(model, structure.axes, kept)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_a_mask_of_ones_changes_no_bit(found):
    model, inputs, structure = found
    whole = logits(model, inputs)
    everything = {axis.name: range(axis.size) for axis in structure.axes}
    with masked(model, structure.axes, everything):
        assert torch.equal(logits(model, inputs), whole)
    with mask_leaves(model, structure.axes):
        assert torch.equal(logits(model, inputs), whole)


@pytest.mark.parametrize("name", TOLD)
def test_an_excluded_expert_is_chosen_by_no_token(name):
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    axis = experts_of(structure)[0]
    chosen = []
    module = model.get_submodule(axis.taps[0].module)
    hook = module.register_forward_pre_hook(lambda m, args: chosen.append(args[1].unique()))
    try:
        logits(model, inputs)
        with masked(model, structure.axes, {axis.name: [1, 2, 4]}):
            logits(model, inputs)
    finally:
        hook.remove()
    assert {0, 3, 5} & set(chosen[0].tolist())
    assert set(chosen[1].tolist()) == {1, 2, 4}


def test_gradients_are_those_of_masks_and_finite_differences(found):
    model, inputs, structure = found
    axes = [a for a in structure.axes if a.kind is Kind.EXPERTS or a.parent]
    axes = [a for a in axes if a.kind is not Kind.HEADS]
    check_gradients(model, inputs, axes, rtol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "dots1", "llama4", "dbrx", "jetmoe"])
def test_the_gradient_of_an_expert_is_the_sum_of_its_neurons(name):
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    gradients = recorded(model, inputs, structure.axes)
    for axis in experts_of(structure):
        neurons = gradients[inside(structure, axis).name].unflatten(1, (EXPERTS, NEURONS)).sum(2)
        torch.testing.assert_close(gradients[axis.name], neurons, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", BEHIND_INTERFACE)
def test_our_experts_put_out_what_those_of_transformers_do(name):
    model, inputs = zoo.build(name)
    calls = []
    path = next(p for p, m in model.named_modules() if p.endswith("mlp.experts"))
    module = model.get_submodule(path)
    hook = module.register_forward_hook(lambda m, args, out: calls.append((args, out)))
    try:
        logits(model, inputs)
    finally:
        hook.remove()
    (args, expected), *_ = calls
    with torch.no_grad():
        ours = run_experts(module, *args, None)
        beyond = args[1].clone()
        beyond[0] = EXPERTS  # what belongs to another process
        partial = run_experts(module, args[0], beyond, args[2], None)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert not partial[0].any()
    torch.testing.assert_close(partial[1:], expected[1:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", spread(ALL))
def test_costs_are_those_of_the_cut_model(name):
    model, inputs = zoo.build(name)
    pruner = GradNASPruner(model, layout="per_layer")
    structure = pruner.discover(inputs)
    kept = {a.name: tuple(range(a.size)) for a in structure.axes} | irregular(structure)
    plan = Plan(kept, {a.name: a.size for a in structure.axes}, "per_layer")
    counts = plan.counts()
    claimed = {name: cost.of(counts) for name, cost in pruner.prunable.costs.items()}
    cut(model, structure.axes, plan.kept)
    assert claimed["params"] == sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    kernels = implementations(model, attention="eager", experts="eager")
    with frozen(model), torch.no_grad(), kernels, counter:
        model(**pruner.prunable.sample)
    assert claimed["flops"] == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("name", zoo.ALL_RUN)
def test_experts_that_all_run_cost_time(name):
    model, inputs = zoo.build(name, dtype=torch.float32)
    pruner = GradNASPruner(model)
    structure = pruner.discover(inputs)
    whole = {axis.name: axis.size for axis in structure.axes}
    axis = experts_of(structure)[0]
    flops = pruner.prunable.costs["flops"]
    fewer = {**whole, axis.name: 3, inside(structure, axis).name: 3 * NEURONS}
    tokens = pruner.prunable.sample["input_ids"].numel()
    matrices = 3 * (3 * NEURONS * 64) + 3 * 64  # of three experts, and the rows of their router
    assert flops.of(whole) - flops.of(fewer) == pytest.approx(2 * tokens * matrices)


@pytest.mark.parametrize("name", CHOSEN)
def test_fewer_experts_cost_parameters_and_no_time(name):
    model, inputs = zoo.build(name, dtype=torch.float32)
    pruner = GradNASPruner(model)
    structure = pruner.discover(inputs)
    whole = {axis.name: axis.size for axis in structure.axes}
    axis = experts_of(structure)[0]
    fewer = {**whole, axis.name: 3, inside(structure, axis).name: 3 * NEURONS}
    params, flops = (pruner.prunable.costs[name] for name in ("params", "flops"))
    assert params.of(fewer) < params.of(whole)
    router = 2 * 3 * 64 * pruner.prunable.sample["input_ids"].numel()
    assert flops.of(whole) - flops.of(fewer) == pytest.approx(router)


@pytest.mark.parametrize("name", spread(ALL))
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_a_plan_by_score_is_saved_and_loads(name, layout, tmp_path):
    model, inputs = zoo.build(name, dtype=torch.float32)
    whole = sum(p.numel() for p in model.parameters())
    pruner = GradNASPruner(model, layout=layout)
    pruner.discover(inputs)
    pruner.score([inputs])
    plan = pruner.plan({"params": 0.75 * whole})
    experts = experts_of(pruner.structure)
    assert any(
        len(plan.kept[found.name]) < found.size
        for axis in experts
        for found in (axis, inside(pruner.structure, axis))
    )
    for axis in experts:
        neurons = inside(pruner.structure, axis)
        each = len(plan.kept[neurons.name]) // len(plan.kept[axis.name])
        assert neurons.multiple == (
            8 if name in BEHIND_INTERFACE else 1
        )  # what grouped kernels need
        assert each == NEURONS or each % neurons.multiple == 0
    pruner.apply(plan)
    with torch.no_grad():
        expected = model(**inputs).logits
    pruner.save_pretrained(tmp_path / "pruned", report=False)
    loaded = type(model).from_pretrained(tmp_path / "pruned", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert ("gradnas" in config) is (layout == "per_layer")


def test_widths_that_the_grouped_kernel_cannot_run_take_the_slow_one(tmp_path):
    model, inputs = zoo.build("mixtral", dtype=torch.float32)
    pruner = GradNASPruner(model, layout="per_layer")
    structure = pruner.discover(inputs)
    kept = {a.name: tuple(range(a.size)) for a in structure.axes}
    neurons = inside(structure, experts_of(structure)[0])
    kept[neurons.name] = tuple(u for u in range(neurons.size) if u % NEURONS < 7)
    plan = Plan(kept, {a.name: a.size for a in structure.axes}, "per_layer")
    with pruner.masked(plan), torch.no_grad():
        expected = model(**inputs).logits
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "pruned", report=False)
    loaded = type(model).from_pretrained(tmp_path / "pruned", attn_implementation="eager")
    for found in (model, loaded):
        kernels = [
            m.config._experts_implementation for m in found.modules() if hasattr(m, "down_proj")
        ]
        assert kernels == ["eager", "grouped_mm"]
        with torch.no_grad():
            torch.testing.assert_close(found(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_fewer_experts_than_a_token_chooses_are_refused(found):
    model, _, structure = found
    axis = experts_of(structure)[0]
    before = copy.deepcopy(model.state_dict())
    kept = {axis.name: [1], inside(structure, axis).name: list(range(NEURONS, 2 * NEURONS))}
    with pytest.raises(PlanError, match=r"1 of its 6 experts are kept, but at least 2 must stay"):
        cut(model, structure.axes, kept)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_neurons_in_unequal_numbers_are_refused(found):
    model, _, structure = found
    neurons = inside(structure, experts_of(structure)[0])
    with pytest.raises(PlanError, match="every expert must keep the same number of neurons"):
        cut(model, structure.axes, {neurons.name: list(range(1, neurons.size))})


def test_a_masked_model_is_as_before_when_its_forward_fails(found):
    model, inputs, structure = found
    whole = logits(model, inputs)
    stack = {n: p for n, p in model.named_parameters() if p.ndim > 2}
    with (
        masked(model, structure.axes, irregular(structure)),
        pytest.raises((IndexError, RuntimeError)),
    ):
        model(input_ids=torch.full((1, 4), zoo.VOCAB + 9))
    broken = model.get_submodule(experts_of(structure)[0].taps[0].owner)
    hook = broken.act_fn.register_forward_hook(_fail) if hasattr(broken, "act_fn") else None
    if hook is not None:
        with masked(model, structure.axes, irregular(structure)), pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
    assert all(model.get_parameter(n) is p for n, p in stack.items())
    assert torch.equal(logits(model, inputs), whole)


def _fail(*args):
    raise ZeroDivisionError


def test_experts_of_a_router_that_chooses_groups_first_keep_as_many_in_each(tmp_path):
    groups = {"n_group": 3, "topk_group": 2, "n_routed_experts": 12}
    model, inputs = zoo.build("dots1", **groups)
    structure = find_structure(model, inputs)
    for axis in experts_of(structure):
        assert (axis.blocks, axis.minimum) == (3, 6)
    kept = {}
    for layer, axis in enumerate(experts_of(structure)):
        kept[axis.name] = [0, 2, 3, 4, 5, 7, 8, 10, 11] if layer else [1, 2, 4, 7, 9, 10]
        neurons = inside(structure, axis)
        kept[neurons.name] = [
            e * NEURONS + n for e in kept[axis.name] for n in range(NEURONS) if (n + e) % 2
        ]
    with masked(model, structure.axes, kept):
        expected = logits(model, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-3
    uneven = {axis.name: [0, 1, 2, 4, 5, 8], inside(structure, axis).name: range(0)}
    uneven[inside(structure, axis).name] = [
        e * NEURONS + n for e in uneven[axis.name] for n in range(NEURONS)
    ]
    with pytest.raises(PlanError, match=r"must keep the same number of experts, found \[3, 2, 1\]"):
        cut(model, structure.axes, uneven)
    cut(model, structure.axes, kept)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()

    model, inputs = zoo.build("dots1", dtype=torch.float32, **groups)
    pruner = GradNASPruner(model)
    pruner.discover(inputs)
    pruner.score([inputs])
    plan = pruner.plan({"params": "70%"})
    for axis in experts_of(pruner.structure):
        counts = [
            sum(axis.block_of(u) == block for u in plan.kept[axis.name]) for block in range(3)
        ]
        assert len(set(counts)) == 1
        assert counts[0] >= 2
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "pruned", report=False)


def test_experts_that_the_sample_hardly_reaches_are_proved_all_the_same():
    model, _ = zoo.build("mixtral", num_local_experts=64)
    one = {"input_ids": torch.tensor([[5, 9, 11]])}
    structure = find_structure(model, one)
    assert [inside(structure, axis).size for axis in experts_of(structure)] == [64 * NEURONS] * 2


@pytest.mark.parametrize("kept", ["experts", "neurons"])
def test_rules_keep_a_kind_whole_by_the_end_of_its_name(kept):
    model, inputs = zoo.build("mixtral", dtype=torch.float32)
    rules = {"*:heads": None, "*:kv_groups": None, f"*:{kept}": None, "*:channels": None}
    pruner = GradNASPruner(model, rules=rules)
    pruner.discover(inputs)
    pruner.score([inputs])
    plan = pruner.plan({"params": "80%"})
    for axis in experts_of(pruner.structure):
        neurons = inside(pruner.structure, axis)
        experts, each = len(plan.kept[axis.name]), NEURONS
        if kept == "experts":
            assert experts == EXPERTS
            each = len(plan.kept[neurons.name]) // experts
            assert each < NEURONS
        else:
            assert experts < EXPERTS
        assert len(plan.kept[neurons.name]) == experts * each
    others = [axis for axis in pruner.structure.axes if "self_attn" in axis.name]
    assert all(len(plan.kept[axis.name]) == axis.size for axis in others)


def test_weights_of_0_do_not_mask_experts_but_neurons_in_them():
    model, inputs = zoo.build("mixtral")
    structure = find_structure(model, inputs)
    with pytest.raises(StructureError, match="would still be chosen"):
        check_maskable(model, structure.axes, {})
    check_maskable(model, structure.axes, {"*:experts": None})
    neurons = inside(structure, experts_of(structure)[0])
    kept = {neurons.name: [u for u in range(neurons.size) if (u + u // NEURONS) % 3]}
    with masked(model, structure.axes, kept):
        expected = logits(model, inputs)
    before = model.state_dict()["model.layers.0.mlp.experts.down_proj"].clone()
    mask = WeightMask(model, structure.axes, kept, whole=False)
    mask.scale(0.5)
    mask.zero()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-10, atol=1e-12)
    after = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert torch.equal(after[after != 0], before[after != 0])
