"""Which experts are found, and which are refused with what reason."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import MixtralConfig, PhimoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock

from hf_gradnas.errors import StructureError
from hf_gradnas.masks import mask_leaves, masked
from hf_gradnas.running.states import frozen
from hf_gradnas.scores.gradients import GradientRecorder
from hf_gradnas.structure.discovery import discover
from hf_gradnas.structure.experts import UNROUTED
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Kind, Refusal
from hf_gradnas.verification import find_structure


def test_experts_that_are_not_told_who_was_chosen_are_refused_by_name():
    class Untold(torch.nn.Module):
        """One matrix each, the products of which are chosen only afterwards."""

        def __init__(self):
            super().__init__()
            self.stack = torch.nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return torch.einsum("td,edf->tef", x, self.stack)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = torch.nn.Linear(8, 4, bias=False)
            self.experts = Untold()

        def forward(self, x):
            weights, indices = self.router(x).topk(2)
            outputs = self.experts(x).gather(1, indices[..., None].expand(-1, -1, 8))
            return x + (outputs * weights[..., None]).sum(1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = torch.nn.Linear(8, 8), Block()
            self.last = torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.block(self.first(x)).relu())

    torch.manual_seed(0)
    found = discover(Net(), (torch.randn(6, 8),), {})
    (reason,) = (r.reason for r in found.refusals if r.kind == "experts")
    assert "are not told by indices" in reason


class TextAndPictures(torch.nn.Module):
    """Two routers, each with its experts, of which a batch of text runs the first only."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.text, self.pictures = MixtralSparseMoeBlock(config), MixtralSparseMoeBlock(config)

    def forward(self, x, pictures=None):
        return x + (self.text(x) if pictures is None else self.pictures(x))


class Net(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first, self.block = torch.nn.Linear(8, 8), block
        self.last = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.block(self.first(x)).relu())


def test_experts_that_a_module_counts_with_those_of_another_router_stay():
    config = MixtralConfig(
        hidden_size=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    net = Net(TextAndPictures(config)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    structure = find_structure(net, {"x": torch.randn(2, 12, 8)})
    (reason,) = (r.reason for r in structure.refusals if r.kind == "experts")
    assert "block.num_experts counts its experts and those of block.pictures.experts" in reason
    by_kind = {axis.kind: axis for axis in structure.axes if axis.kind is not Kind.CHANNELS}
    experts, neurons = by_kind[Kind.EXPERTS], by_kind[Kind.NEURONS]
    assert (experts.minimum, experts.size, neurons.size) == (4, 4, 64)


def test_neurons_of_an_only_expert_can_go():
    model, inputs = zoo.build("mixtral", num_local_experts=1, num_experts_per_tok=1)
    structure = find_structure(model, inputs)
    reasons = [r.reason for r in structure.refusals if r.kind == "experts"]
    assert len(reasons) == 2
    assert all("no router was seen that chooses among its experts" in r for r in reasons)
    neurons = [axis for axis in structure.axes if axis.kind is Kind.NEURONS]
    assert [axis.size for axis in neurons] == [24, 24]
    kept = {axis.name: [u for u in range(24) if u % 3] for axis in neurons}
    with masked(model, structure.axes, kept), torch.no_grad(), zoo.float64_throughout():
        expected = model(**inputs).logits
    cut(model, structure.axes, kept)
    with torch.no_grad(), zoo.float64_throughout():
        assert (model(**inputs).logits - expected).abs().max() <= 1e-10 * expected.abs().max()


class SharedExperts(torch.nn.Module):
    """Experts that all run for every token, one matrix each in three tensors."""

    def __init__(self, experts, width):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.randn(experts, width, 8))
        self.up = torch.nn.Parameter(torch.randn(experts, width, 8))
        self.down = torch.nn.Parameter(torch.randn(experts, 8, width))

    def forward(self, x):
        tokens = x.reshape(1, -1, 8).expand(len(self.gate), -1, -1)
        gate, up = (torch.bmm(tokens, w.transpose(1, 2)) for w in (self.gate, self.up))
        out = torch.bmm(torch.nn.functional.silu(gate) * up, self.down.transpose(1, 2))
        return x + out.sum(0).view(x.shape)


@pytest.mark.parametrize("experts", [1, 3])
def test_neurons_of_shared_experts_go_by_their_number(experts):
    torch.manual_seed(0)
    net, x = Net(SharedExperts(experts, 10)).double().eval(), torch.randn(4, 5, 8).double()
    structure = find_structure(net, {"x": x})
    (axis,) = (axis for axis in structure.axes if axis.kind is Kind.NEURONS)
    assert (axis.name, axis.size) == ("block:neurons", 10)
    recorder = GradientRecorder(net, [axis])
    with frozen(net), recorder.attached():
        recorder.start(4)
        net(x).square().sum().backward()
        gradients = recorder.gradients()[axis.name]
    for example in range(4):
        with mask_leaves(net, [axis]) as leaves:
            net(x[example : example + 1]).square().sum().backward()
            torch.testing.assert_close(gradients[example], leaves[axis.name].grad)
            net.zero_grad()
    kept = {axis.name: [0, 2, 3, 7]}
    with masked(net, [axis], kept), torch.no_grad():
        expected = net(x)
    cut(net, [axis], kept)
    assert net.block.down.shape == (experts, 8, 4)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)


class Chooser(torch.nn.Module):
    """Experts in a list, each of which gets the tokens that chose it; no choice is seen."""

    def __init__(self, *, sorts):
        super().__init__()
        self.sorts = sorts
        self.router = torch.nn.Linear(8, 3, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 8))
            for _ in range(3)
        )

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        weights = self.router(tokens).softmax(-1)
        chosen = weights.argmax(-1)
        weights = weights.masked_fill(torch.nn.functional.one_hot(chosen, 3) == 0, 0).sum(-1)
        out = torch.zeros_like(tokens)
        if self.sorts:
            order = chosen.argsort(stable=True)
            parts = tokens[order].split(torch.bincount(chosen, minlength=3).tolist())
            results = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
            out = out.index_add(0, order, torch.cat(results) * weights[order, None])
        else:
            for number, expert in enumerate(self.experts):
                (rows,) = torch.where(chosen == number)
                out = out.index_add(0, rows, expert(tokens[None, rows].view(-1, 8)))
            out = out * weights[:, None]
        return x + out.view(x.shape)


@pytest.mark.parametrize("sorts", [False, True])
def test_neurons_of_experts_in_a_list_are_scored_by_example(sorts):
    torch.manual_seed(0)
    net, x = Net(Chooser(sorts=sorts)).double().eval(), torch.randn(4, 7, 8).double()
    structure = find_structure(net, {"x": x})
    axes = [axis for axis in structure.axes if axis.module.startswith("block.experts")]
    assert [axis.size for axis in axes] == [6, 6, 6]
    assert Refusal("block.experts", "experts", UNROUTED) in structure.refusals
    assert {tap.runner for axis in axes for tap in axis.taps} == {"block"}
    recorder = GradientRecorder(net, axes)
    with frozen(net), recorder.attached():
        recorder.start(4)
        net(x).square().sum().backward()
        gradients = recorder.gradients()
    for example in range(4):
        with mask_leaves(net, axes) as leaves:
            net(x[example : example + 1]).square().sum().backward()
            for name, leaf in leaves.items():
                expected = torch.zeros(6).double() if leaf.grad is None else leaf.grad
                torch.testing.assert_close(gradients[name][example], expected)
            net.zero_grad()


def test_rows_that_cannot_be_followed_are_refused_by_name():
    torch.manual_seed(0)
    net, x = Net(Chooser(sorts=False)).double().eval(), torch.randn(4, 7, 8).double()
    structure = find_structure(net, {"x": x})
    axes = [axis for axis in structure.axes if axis.module.startswith("block.experts")]
    net.block.experts[1].register_forward_pre_hook(lambda module, args: args[0].flip(0).flip(0))
    recorder = GradientRecorder(net, axes)
    recorder.start(4)
    with recorder.attached(), pytest.raises(StructureError, match=r"experts\.1\.2 reads were not"):
        net(x)


def test_as_many_experts_stay_as_are_told_to_run_where_each_is_chosen_by_itself():
    """With one, PhiMoE's second choice is among none, and it puts out NaN."""
    config = PhimoeConfig(hidden_size=8, intermediate_size=6, num_local_experts=4)
    torch.manual_seed(0)
    block = PhimoeSparseMoeBlock(config).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    net, x = Net(block).double().eval(), torch.randn(2, 6, 8).double()
    (axis,) = (a for a in find_structure(net, {"x": x}).axes if a.kind is Kind.EXPERTS)
    assert (axis.size, axis.minimum) == (4, 2)
