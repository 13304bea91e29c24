"""What is cut is what was masked: checked after every cut, before anything can be written."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from torch import nn

from hf_gradnas import GradNASPruner, Plan, nas
from hf_gradnas.checkpoint import apply
from hf_gradnas.checkpoint.apply import difference, floating, renumber_heads
from hf_gradnas.errors import CutError, GradNASError, GradNASWarning, OrderError, PlanError
from hf_gradnas.types import Axis, Kind, Structure, Tap


def scored(name: str, **overrides):
    model, inputs = zoo.build(name, **overrides)
    pruner = GradNASPruner(model, score="fisher")
    pruner.score([inputs])
    return pruner, pruner.plan({"params": "80%"})


def of_other_units(cut):
    """A cut that keeps as many units as it should, but others: the first ones."""

    def wrong(model, axes, kept, **options):
        return cut(model, axes, {n: range(len(u)) for n, u in kept.items()}, **options)

    return wrong


def without(axis, leaf: str):
    return replace(axis, slices=tuple(s for s in axis.slices if not s.tensor.endswith(leaf)))


def test_a_cut_that_differs_from_its_masks_is_an_error_and_cannot_be_saved(monkeypatch, tmp_path):
    pruner, plan = scored("llama")
    monkeypatch.setattr(apply, "cut", of_other_units(apply.cut))
    with pytest.raises(CutError, match=r"differs by .* from the masked .* not usable and nothing"):
        pruner.apply(plan)
    with pytest.raises(OrderError, match="save_pretrained: the model failed when it was cut; load"):
        pruner.save_pretrained(tmp_path / "out")
    with pytest.raises(PlanError, match="was cut already"):
        pruner.apply(plan)
    assert not list(tmp_path.iterdir())


def test_a_cut_that_does_not_run_is_an_error():
    pruner, plan = scored("bert")
    axes = tuple(without(axis, "intermediate.dense.bias") for axis in pruner.structure.axes)
    pruner._prunable = replace(pruner.prunable, structure=Structure(axes))
    with pytest.raises(CutError, match=r"after the cut it does not run .RuntimeError: .*load it"):
        pruner.apply(plan)


def test_another_number_of_parameters_than_was_counted_is_an_error(monkeypatch):
    pruner, plan = scored("gpt2")
    count = apply.count_params
    monkeypatch.setattr(apply, "count_params", lambda *a, **k: count(*a, **k) - 1)
    with pytest.raises(CutError, match=r"has [\d,]+ parameters, but the plan counts [\d,]+"):
        pruner.apply(plan)


def test_a_plan_that_does_not_fit_leaves_the_model_to_be_cut_by_another():
    pruner, plan = scored("bert")
    before = copy.deepcopy(pruner.model.state_dict())
    with pytest.raises(PlanError, match="the stock class has one number for both"):
        pruner.apply(replace(plan, layout="stock"))
    assert all(torch.equal(before[k], v) for k, v in pruner.model.state_dict().items())
    pruner.apply(plan)


def test_what_fails_before_the_cut_leaves_the_model_to_be_cut_again():
    pruner, plan = scored("bert")
    before = copy.deepcopy(pruner.model.state_dict())
    hook = pruner.model.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pruner.apply(plan)
    hook.remove()
    assert all(torch.equal(before[k], v) for k, v in pruner.model.state_dict().items())
    pruner.apply(plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_right_cuts_pass_in_every_type(dtype):
    model, inputs = zoo.build("llama")
    pruner = GradNASPruner(model.to(dtype))
    pruner.prune([inputs], {"params": "80%"})


class Noisy(nn.Module):
    """Draws numbers in its forward, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x + torch.randn_like(x))))


def test_random_forwards_are_compared_with_one_seed():
    torch.manual_seed(0)
    model, axes = Noisy(), ()
    state, x = torch.get_rng_state(), torch.randn(2, 8)
    torch.set_rng_state(state)
    record = apply.cut_with_proof(model, axes, {}, calls=[((x,), {})])
    assert record["modules"] == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_the_second_call_is_taken_where_the_first_does_not_run():
    x = torch.randn(2, 8)
    apply.cut_with_proof(Noisy(), (), {}, calls=[((x[:, :3],), {}), ((x,), {})])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        apply.cut_with_proof(Noisy(), (), {}, calls=[((x[:, :3],), {})])


def test_outputs_that_have_entries_per_head_are_not_compared():
    outputs = {"logits": torch.ones(1), "attentions": (torch.ones(2),), "n": torch.ones(1).long()}
    nested = [outputs, {"decoder_attentions": torch.ones(2), "inner": {"x": torch.ones(3)}}]
    assert [path for path, _ in floating(nested)] == ["0.logits", "1.inner.x"]


def test_not_a_number_equals_itself_only():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    assert difference(nan, nan)[0] == 0
    assert not difference(nan, one)[0] <= 1
    assert not difference(one, nan)[0] <= 1


def test_the_surface_of_the_reference_proves_its_cuts_too(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 4))
    x, y = torch.randn(8, 8), torch.randint(4, (8,))
    config = {
        "data_loader": [(x, y)],
        "collect_func": lambda batch: batch[0],
        "loss_func": lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
    }
    monkeypatch.setattr(apply, "cut", of_other_units(apply.cut))
    with pytest.raises(GradNASError, match=r"differs by .* from the masked"):
        nas.prune(model, "gradnas", {"flops": "60%"}, dummy_input=x[:1], config=config)


PATH = "model.decoder.layers.{}.encoder_attn:heads"
PAIRS = [[0, 1], [1, 0], [1, 3], [2, 2]]


def whisper(**options: Any) -> tuple[GradNASPruner, dict[str, Any]]:
    model, inputs = zoo.build("whisper", dtype=torch.float32)
    model.generation_config.alignment_heads = [list(pair) for pair in PAIRS]
    model.generation_config._from_model_config = False  # as one that was read from a file
    pruner = GradNASPruner(model, layout="per_layer", **options)
    pruner.discover(inputs)
    return pruner, inputs


def plan_of(pruner: GradNASPruner, **kept: tuple[int, ...]) -> Plan:
    """A plan that keeps all but in the cross-attentions that are named, as ``_1=(0, 3)``."""
    axes = pruner.structure.axes
    names = {PATH.format(layer.removeprefix("_")): units for layer, units in kept.items()}
    assert names.keys() <= {axis.name for axis in axes}
    units = {axis.name: names.get(axis.name, tuple(range(axis.size))) for axis in axes}
    return Plan(units, {axis.name: axis.size for axis in axes}, "per_layer")


def timestamps(model: Any, inputs: dict[str, Any], pairs: Any) -> torch.Tensor:
    """Times of the tokens that a greedy search finds, as ``generate`` computes them for words."""
    ids = torch.ones(4, 1, dtype=torch.long)
    found = tf.GenerationMixin.generate(
        model, inputs["input_features"], decoder_input_ids=ids, max_new_tokens=6,
        output_attentions=True, return_dict_in_generate=True, do_sample=False,
    )  # fmt: skip
    return model._extract_token_timestamps(found, pairs, num_frames=40, num_input_ids=1)


@pytest.mark.leaves_state
def test_kept_heads_are_counted_anew_and_give_the_same_times(tmp_path: Path) -> None:
    pruner, inputs = whisper()
    plan = plan_of(pruner, _0=(1, 2), _1=(0, 2, 3), _2=(2,))
    with pruner.masked(plan):
        expected = timestamps(pruner.model, inputs, PAIRS)
    model = pruner.apply(plan)
    found = model.generation_config.alignment_heads
    assert found == [[0, 0], [1, 0], [1, 2], [2, 0]]
    assert torch.equal(timestamps(model, inputs, found), expected)
    saved = pruner.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(saved, attn_implementation="eager").eval()
    assert again.generation_config.alignment_heads == found
    assert torch.equal(timestamps(again, inputs, found), expected)


@pytest.mark.leaves_state
def test_a_head_that_is_gone_is_taken_out_with_a_warning() -> None:
    pruner, inputs = whisper()
    with pytest.warns(GradNASWarning, match=r"loses \[\[1, 3\]\].*keeps 3 of 4.*encoder_attn"):
        model = pruner.apply(plan_of(pruner, _1=(0, 1)))
    assert model.generation_config.alignment_heads == [[0, 1], [1, 0], [2, 2]]
    timestamps(model, inputs, model.generation_config.alignment_heads)


@pytest.mark.leaves_state
@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ({"_0": ()}, r"since model.decoder.layers.0.encoder_attn lost all its heads"),
        ({"_0": (0,), "_1": (1,), "_2": (0,)}, "since they were all cut"),
    ],
)
def test_where_no_time_can_be_found_the_key_goes(kept: Any, why: str, tmp_path: Path) -> None:
    pruner, _ = whisper()
    with pytest.warns(GradNASWarning, match=why):
        model = pruner.apply(plan_of(pruner, **kept))
    assert not hasattr(model.generation_config, "alignment_heads")
    saved = pruner.save_pretrained(tmp_path / "out")
    assert not hasattr(tf.GenerationConfig.from_pretrained(saved), "alignment_heads")


@pytest.mark.parametrize("value", [None, [], "x", [[0]], [[0, 1.5]], {"a": 1}])
def test_what_is_no_list_of_pairs_stays_as_it_is(value: Any) -> None:
    axis = Axis(
        PATH.format(0), PATH.format(0).partition(":")[0], Kind.HEADS, 4, (), (Tap("", "input", -1),)
    )
    model = SimpleNamespace(generation_config=SimpleNamespace(alignment_heads=value))
    renumber_heads(model, [axis], {axis.name: (1,)})
    assert model.generation_config.alignment_heads == value
    renumber_heads(SimpleNamespace(generation_config=None), [axis], {})


def test_rounding_of_16_bits_adds_up_over_layers():
    # A Llama of 30 layers in bfloat16, masked and cut: .061 was seen, and was refused.
    deep = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(211)])
    assert apply.half_tolerance(torch.nn.Linear(2, 2)) == apply.HALF_TOLERANCE == 0.05
    assert 0.061 < apply.half_tolerance(deep) < 0.1
    many = nn.ModuleList([nn.Linear(2, 2) for _ in range(999)])  # experts, of which few run
    assert apply.half_tolerance(many) == apply.MOST_HALF < 0.3
