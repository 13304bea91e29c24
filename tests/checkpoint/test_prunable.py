"""What would fail when it is cut, saved or loaded is found before anything is scored."""

import copy
import re
from collections import Counter

import pytest
import torch
import transformers
import zoo
from families import spread
from torch import nn
from transformers.utils import ModelOutput

from hf_gradnas import GradNASPruner, nas
from hf_gradnas.checkpoint import prunable
from hf_gradnas.checkpoint.prunable import find_prunable, trial_plan
from hf_gradnas.errors import StructureError
from hf_gradnas.nas.hparams import needed_space
from hf_gradnas.surgery.cut import check_plan
from hf_gradnas.types import Kind

ALL = sorted(zoo.FAMILIES)


@pytest.mark.parametrize("name", spread(ALL))
def test_every_family_passes_and_is_left_as_it_was(name):
    model, inputs = zoo.build(name)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    kinds = {id(module): type(module) for module in model.modules()}
    found = find_prunable(model, inputs)
    assert {axis.minimum for axis in found.structure.axes} <= {0, 1}
    assert not [r for r in found.structure.refusals if "load" in r.reason]
    assert model.config.to_dict() == config
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {id(module): type(module) for module in model.modules()} == kinds


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "phi3"])
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_the_plan_that_is_tried_cuts_all_that_the_layout_can(name, layout):
    model, inputs = zoo.build(name)
    found = find_prunable(model, inputs, layout=layout)
    axes = found.structure.axes
    plan = trial_plan(axes, found.space, layout, removals=True)
    check_plan(axes, plan)
    counts = plan.counts()
    if layout == "stock":
        cut = {name for group in found.space.groups for name in group.axes}
        assert {axis.name for axis in axes if counts[axis.name] < axis.size} <= cut
    else:
        assert all(counts[axis.name] < axis.size for axis in axes if axis.parent is None)
        gone = Counter(axis.kind for axis in axes if counts[axis.name] == 0)
        assert gone[Kind.HEADS] == gone[Kind.NEURONS] == 1


class Config(transformers.PreTrainedConfig):
    model_type = "forgets"
    forgets = ""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scale * self.down(torch.tanh(self.up(x)))
        return x + self.narrow(torch.tanh(self.wide(x)))


class Forgets(transformers.PreTrainedModel):
    """Loses one of its FFNs' widths, or a switch, when it is built from the config of a cut."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([Block(), Block()])
        self.post_init()
        record = getattr(config, "gradnas", None)
        if record and config.forgets == "width":
            for path in [p for p in record["modules"] if p.endswith((".up", ".down"))]:
                del record["modules"][path]
        if record and config.forgets == "switch":
            self.layers[0].scale = 2.0

    def forward(self, x: torch.Tensor) -> ModelOutput:
        for layer in self.layers:
            x = layer(x)
        return ModelOutput(logits=x)


def forgetting(what: str) -> tuple[Forgets, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Forgets(Config(forgets=what)).eval(), {"x": torch.randn(2, 4, 8)}


def test_axes_whose_width_is_lost_when_it_is_built_again_are_refused_and_the_rest_is_not():
    model, inputs = forgetting("width")
    structure = GradNASPruner(model).discover(inputs)
    assert {re.sub(r"\d", "*", axis.name) for axis in structure.axes} == {"layers.*.narrow:neurons"}
    reasons = [refusal.reason for refusal in structure.refusals]
    assert len(reasons) == 2
    assert all("its class builds layers.0.up.weight as [16, 8]" in reason for reason in reasons)


def test_a_model_that_computes_something_else_once_it_is_loaded_is_refused():
    model, inputs = forgetting("switch")
    with pytest.raises(StructureError, match=r"4 axes, but none .* put out other logits once"):
        GradNASPruner(model).discover(inputs)
    assert model.layers[0].scale == 1.0


def test_where_only_a_removal_fails_one_unit_stays(monkeypatch):
    fault = prunable._fault
    monkeypatch.setattr(
        prunable,
        "_fault",
        lambda *a, removals: "gone" if removals else fault(*a, removals=removals),
    )
    model, inputs = zoo.build("bert")
    found = find_prunable(model, inputs)
    assert {axis.minimum for axis in found.structure.axes} == {1}
    assert not found.structure.refusals


def test_the_surface_of_the_reference_searches_what_can_be_loaded_again():
    model, inputs = forgetting("width")
    config = {
        "verbose": False,
        "data_loader": [inputs["x"]],
        "collect_func": lambda batch: batch,
        "loss_func": lambda output, batch: output.logits.square().mean(),
    }
    fine = {"nn.Linear": {"*": {"feature_divisor": 2}}}
    nas.convert(model, [("gradnas", fine)])
    nas.search(model, {"flops": "90%"}, inputs["x"][:1], config)
    names = {axis.name for axis in needed_space(model).needed_structure().axes}
    assert names == {"layers.0.narrow:neurons", "layers.1.narrow:neurons"}
