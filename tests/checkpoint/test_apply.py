"""What is cut is what was masked: checked after every cut, before anything can be written."""

import copy
from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn

from hf_gradnas import GradNASPruner, nas
from hf_gradnas.checkpoint import apply
from hf_gradnas.checkpoint.apply import difference, floating
from hf_gradnas.errors import CutError, GradNASError, OrderError, PlanError
from hf_gradnas.types import Structure


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
