"""Experts that are modules of a list: the equations of stacked ones, files, and ways of loading."""

from __future__ import annotations

import json
from typing import Any

import expert_lists
import pytest
import torch
import transformers
import zoo
from expert_lists import EXPERTS, NEURONS
from mask_gradients import check_gradients, recorded
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.nllb_moe import modeling_nllb_moe

from hf_gradnas import GradNASPruner
from hf_gradnas._compat import implementations
from hf_gradnas.callback.weights import WeightMask, check_maskable
from hf_gradnas.errors import PlanError
from hf_gradnas.masks import mask_leaves, masked
from hf_gradnas.running.states import frozen
from hf_gradnas.scores import collect_scores
from hf_gradnas.surgery.cut import cut, plan_cut
from hf_gradnas.surgery.modeling_gradnas import RecordError, resize
from hf_gradnas.surgery.records import merge_records
from hf_gradnas.surgery.rows import shapes_of
from hf_gradnas.types import Cut, Kind, Structure
from hf_gradnas.verification import find_structure
from hf_gradnas.verification.models import ALL_STAY

ALL = ("switch", *expert_lists.STYLES)


@pytest.fixture(scope="module")
def known() -> dict[str, Structure]:
    """What was found in each model, once."""
    return {name: find_structure(*expert_lists.build(name)) for name in ALL}


@pytest.fixture(params=ALL)
def found(request: Any, known: dict[str, Structure]) -> tuple[nn.Module, dict, Structure]:
    return *expert_lists.build(request.param), known[request.param]


def experts_of(structure: Structure) -> list:
    return [axis for axis in structure.axes if axis.kind is Kind.EXPERTS]


def inside(structure: Structure, experts: Any) -> Any:
    return next(axis for axis in structure.axes if axis.parent == experts.name)


def irregular(structure: Structure) -> dict[str, list[int]]:
    """Other experts in every layer, and in each of them other neurons."""
    kept = {}
    for layer, axis in enumerate(experts_of(structure)):
        stay = [0, 2, 3, 5] if layer else [1, 2, 4]
        kept[axis.name] = stay
        kept[inside(structure, axis).name] = [
            e * NEURONS + n for e in stay for n in range(NEURONS) if (n + e) % (3 + layer)
        ]
    return kept


def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad(), zoo.float64_throughout():
        return model(**inputs).logits


def test_experts_are_units_and_neurons_are_in_them(found):
    model, _, structure = found
    experts = experts_of(structure)
    fewest = 1 if "Switch" in type(model).__name__ else 2
    assert [(axis.size, axis.minimum) for axis in experts] == [(EXPERTS, fewest)] * 2
    for axis in experts:
        assert axis.name == f"{axis.module}:experts"
        assert inside(structure, axis).name == f"{axis.module}:neurons"
        assert inside(structure, axis).size == EXPERTS * NEURONS
    held = [name for name in structure.unpruned if ".experts." in name]
    assert not held


def test_masked_is_cut_and_the_list_is_numbered_anew(found):
    model, inputs, structure = found
    kept = irregular(structure)
    with masked(model, structure.axes, kept):
        expected = logits(model, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-3
    names = {
        a.taps[0].owner: list(model.get_submodule(a.taps[0].owner)._modules)
        for a in experts_of(structure)
    }
    cut(model, structure.axes, kept)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()
    for (path, before), count in zip(names.items(), (3, 4), strict=True):
        assert list(model.get_submodule(path)._modules) == before[:count]


def test_masked_is_cut_where_as_few_as_can_stay(found):
    model, inputs, structure = found
    kept = {axis.name: range(EXPERTS - axis.minimum, EXPERTS) for axis in experts_of(structure)}
    for axis in experts_of(structure):
        kept[inside(structure, axis).name] = [
            e * NEURONS + n for e in kept[axis.name] for n in range(NEURONS)
        ]
    with masked(model, structure.axes, kept):
        expected = logits(model, inputs)
    cut(model, structure.axes, kept)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_groups_that_a_router_chooses_first_keep_as_many_experts():
    model, inputs = expert_lists.build("grouped", num_local_experts=12)
    structure = find_structure(model, inputs)
    kept = {}
    for layer, axis in enumerate(experts_of(structure)):
        assert (axis.blocks, axis.minimum) == (3, 6)
        kept[axis.name] = [0, 2, 3, 4, 5, 7, 8, 10, 11] if layer else [1, 2, 4, 7, 9, 10]
        kept[inside(structure, axis).name] = [
            e * NEURONS + n for e in kept[axis.name] for n in range(NEURONS) if (n + e) % 2
        ]
    with masked(model, structure.axes, kept):
        expected = logits(model, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-3
    cut(model, structure.axes, kept)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_experts_are_found_where_all_tokens_choose_the_same():
    model, inputs = expert_lists.build("sorted")
    with torch.no_grad():
        for layer in model.layers:
            layer.e_score_correction_bias[:2] += 10
    structure = find_structure(model, inputs)
    assert [axis.size for axis in experts_of(structure)] == [EXPERTS, EXPERTS]
    gradients = recorded(model, inputs, experts_of(structure))
    assert all((g[:, :2] != 0).all() and not g[:, 2:].any() for g in gradients.values())


def test_a_mask_of_ones_changes_no_bit(found):
    model, inputs, structure = found
    whole = logits(model, inputs)
    everything = {axis.name: range(axis.size) for axis in structure.axes}
    with masked(model, structure.axes, everything):
        assert torch.equal(logits(model, inputs), whole)
    with mask_leaves(model, structure.axes):
        assert torch.equal(logits(model, inputs), whole)


def test_gradients_are_those_of_masks_and_finite_differences(found):
    model, inputs, structure = found
    axes = [a for a in structure.axes if a.kind is Kind.EXPERTS or a.parent]
    check_gradients(model, inputs, axes, rtol=1e-9)


@pytest.mark.parametrize("style", expert_lists.STYLES)
def test_every_example_has_the_gradients_that_it_has_alone(style, known):
    model, inputs = expert_lists.build(style)
    axes = [a for a in known[style].axes if a.kind is Kind.EXPERTS or a.parent]
    gradients = recorded(model, inputs, axes)  # of a mean over as many tokens of each example
    one = {name: x[1:2].expand(zoo.BATCH, -1) for name, x in inputs.items()}
    for name, rows in recorded(model, one, axes).items():
        torch.testing.assert_close(rows[0], gradients[name][1], rtol=1e-9, atol=1e-12)


def test_costs_are_those_of_the_cut_model(found):
    model, inputs, _ = found
    pruner = GradNASPruner(model, layout="per_layer")
    structure = pruner.discover(inputs)
    kept = {a.name: tuple(range(a.size)) for a in structure.axes} | irregular(structure)
    counts = {name: len(units) for name, units in kept.items()}
    costs = pruner.prunable.costs
    before, sizes = model.num_parameters(), {a.name: a.size for a in structure.axes}
    assert costs["params"].of(sizes) == before
    claimed = {name: cost.of(counts) for name, cost in costs.items()}
    (first, *_), whole = experts_of(structure), costs["active_params"].of(sizes)
    fewer = {first.name: 3, inside(structure, first).name: 3 * NEURONS}
    router = len(first.makers) * 3 * model.get_parameter(first.makers[0].tensor).shape[1]
    assert whole - costs["active_params"].of({**sizes, **fewer}) == pytest.approx(router, abs=3)
    cut(model, structure.axes, kept)
    assert claimed["params"] == model.num_parameters()
    counter = FlopCounterMode(display=False)
    kernels = implementations(model, attention="eager", experts="eager")
    with frozen(model), torch.no_grad(), kernels, counter:
        model(**pruner.prunable.sample)
    assert claimed["flops"] == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_cut_is_data_and_two_cuts_have_one_record(known):
    model, inputs = expert_lists.build("loop")
    axes = known["loop"].axes
    planned = plan_cut(shapes_of(model), axes, irregular(known["loop"]), architecture="ListMixture")
    assert planned.members["layers.0.experts"] == {"0": "1", "1": "2", "2": "4"}
    assert planned.record["lists"] == {
        "layers.0.experts": ["3", "4", "5"],
        "layers.1.experts": ["4", "5"],
    }
    assert Cut.from_dict(json.loads(json.dumps(planned.to_dict()))) == planned
    cut(model, axes, irregular(known["loop"]))
    again = find_structure(model, inputs)
    experts = experts_of(again)[1]
    each = inside(again, experts).size // experts.size
    units = [u for u in range(4 * each) if u // each in (1, 3)]
    kept = {experts.name: [1, 3], inside(again, experts).name: units}
    with masked(model, again.axes, kept):
        expected = logits(model, inputs)
    record = merge_records(planned.record, cut(model, again.axes, kept))
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert record["lists"]["layers.1.experts"] == ["2", "3", "4", "5"]
    assert "layers.1.experts.2.w1" not in record["modules"]
    fresh, _ = expert_lists.build("loop")
    resize(fresh, record)
    resize(fresh, record)  # changes nothing
    assert shapes_of(fresh) == shapes_of(model)


def test_a_list_that_does_not_fit_a_record_is_left_as_it_is(known):
    model, _ = expert_lists.build("loop")
    record = plan_cut(
        shapes_of(model), known["loop"].axes, irregular(known["loop"]), architecture="ListMixture"
    ).record
    for lists, match in (
        ({"layers.0.experts": "5"}, "never writes there"),
        ({"x": []}, "has none"),
    ):
        with pytest.raises(RecordError, match=match):
            resize(model, {**record, "lists": lists})
    assert len(model.layers[0].experts) == EXPERTS


def test_experts_that_put_out_several_tensors_stay_and_neurons_in_them_are_scored():
    model, inputs = expert_lists.build("tuples")
    structure = find_structure(model, inputs)
    assert {axis.kind for axis in structure.axes} == {Kind.NEURONS}
    assert all("put out more than one tensor" in r.reason for r in structure.refusals)
    with zoo.float64_throughout():
        scores = collect_scores(model, structure.axes, [inputs])
    assert all(values.any() for values in scores.values.values())


def test_fewer_experts_than_a_token_chooses_are_refused(known):
    model, _ = expert_lists.build("loop")
    axis = experts_of(known["loop"])[0]
    kept = {axis.name: [1], inside(known["loop"], axis).name: range(NEURONS, 2 * NEURONS)}
    with pytest.raises(PlanError, match=r"1 of its 6 experts are kept, but at least 2 must stay"):
        cut(model, known["loop"].axes, kept)
    assert len(model.layers[0].experts) == EXPERTS


@pytest.mark.leaves_state
@pytest.mark.parametrize("name", ["switch", "sorted"])
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_a_plan_by_score_is_saved_and_loads(name, layout, tmp_path):
    model, inputs = expert_lists.build(name, dtype=torch.float32)
    pruner = GradNASPruner(model, layout=layout)
    pruner.discover(inputs)
    pruner.score([inputs])
    plan = pruner.plan({"params": "60%"})
    experts = experts_of(pruner.structure)
    counts = [len(plan.kept[axis.name]) for axis in experts]
    assert min(counts) < EXPERTS or (name, layout) == ("sorted", "stock")
    assert layout == "per_layer" or len({*counts}) == 1
    with pruner.masked(plan), torch.no_grad():
        expected = model(**inputs).logits
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "pruned", report=False)
    loaded = type(model).from_pretrained(tmp_path / "pruned", attn_implementation="eager")
    with torch.no_grad():
        for one in (model, loaded):
            torch.testing.assert_close(one(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert ("gradnas" in config) is (layout == "per_layer")


def test_weights_of_0_mask_neurons_in_experts_of_a_list(known):
    model, inputs = expert_lists.build("loop")
    axes = known["loop"].axes
    check_maskable(model, axes, {"*:experts": None})
    neurons = inside(known["loop"], experts_of(known["loop"])[0])
    kept = {neurons.name: [u for u in range(neurons.size) if (u + u // NEURONS) % 3]}
    with masked(model, axes, kept):
        expected = logits(model, inputs)
    WeightMask(model, axes, kept, whole=False).zero()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-10, atol=1e-12)


def test_magnitudes_are_those_of_the_weights(known):
    model, inputs = expert_lists.build("loop")
    pruner = GradNASPruner(model, score="magnitude")
    structure = pruner.discover(inputs)
    scores = pruner.score([inputs]).values
    neurons = inside(structure, experts_of(structure)[0])
    expert = model.layers[0].experts[2]
    rows = [expert.w1.weight[5], expert.w3.weight[5], expert.w3.bias[5], expert.w2.weight[:, 5]]
    wanted = sum(float(row.detach().square().sum()) for row in rows)
    assert scores[neurons.name][2 * NEURONS + 5] == pytest.approx(wanted)


def nllb() -> tuple[nn.Module, dict, list[str]]:
    """NLLB-MoE, a batch, and the paths of its lists."""
    config = transformers.NllbMoeConfig(
        vocab_size=zoo.VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, num_experts=4,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_sparse_step=1, decoder_sparse_step=1, router_bias=True,
    )  # fmt: skip
    model = transformers.NllbMoeForConditionalGeneration(config).double().eval()
    for module in model.modules():
        if vars(module).get("dtype") is torch.float32:
            module.dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.arange(24).view(2, 12) + 3
    lists = [path for path, _ in model.named_modules() if path.endswith(".experts")]
    return model, {"input_ids": ids, "labels": ids}, lists


def test_experts_stay_that_run_whatever_the_router_says():
    """Transformers' NLLB-MoE runs its first two experts, and no others; neurons in them can go."""
    model, inputs, _ = nllb()
    structure = find_structure(model, inputs)
    assert [(axis.size, axis.minimum) for axis in experts_of(structure)] == [(4, 4)] * 2
    reasons = {r.module: r.reason for r in structure.refusals if r.kind == Kind.EXPERTS}
    assert reasons == {axis.module: ALL_STAY for axis in experts_of(structure)}
    neurons = [inside(structure, axis) for axis in experts_of(structure)]
    kept = {axis.name: [u for u in range(axis.size) if u % 16 % 3] for axis in neurons}
    with masked(model, structure.axes, kept):
        expected = logits(model, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-3
    cut(model, structure.axes, kept)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_two_experts_that_are_chosen_one_by_one(monkeypatch):
    """NLLB-MoE with a loop that runs what its router chooses."""

    def forward(self, hidden, _, weights):
        total = torch.zeros_like(hidden)
        for number in range(self.num_experts):
            (rows,) = torch.where(weights[:, number] > 0)
            if rows.numel():
                out = self[f"expert_{number}"](hidden[rows]) * weights[rows, number, None]
                total = total.index_add(0, rows, out)
        return total

    monkeypatch.setattr(modeling_nllb_moe.NllbMoeExperts, "forward", forward)
    model, inputs, lists = nllb()
    structure = find_structure(model, inputs)
    assert [(axis.size, axis.minimum) for axis in experts_of(structure)] == [(4, 2)] * 2
    kept = {a.name: [1, 3] for a in experts_of(structure)}
    for axis in experts_of(structure):
        neurons = inside(structure, axis)
        kept[neurons.name] = [u for u in range(neurons.size) if u // 16 in (1, 3) and u % 16 % 3]
    with masked(model, structure.axes, kept):
        expected = logits(model, inputs)
    cut(model, structure.axes, kept)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()
    names = list(model.get_submodule(lists[0])._modules)
    assert names == ["expert_0", "expert_1", "token_dropout"]
