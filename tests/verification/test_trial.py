"""A forward in a trial: float64 whatever it asks for, and values that show every unit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_gradnas.structure.trace import Call
from hf_gradnas.types import Kind
from hf_gradnas.verification import find_structure
from hf_gradnas.verification.trial import POSITIONS, Trial, cropped, float64_throughout


class Layer(nn.Module):
    """A pair of linear layers that is not quite an FFN, in some way."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.up(x).relu()
        if self.style == "half precision":
            hidden = hidden.to(torch.bfloat16).float() + hidden.type(torch.float16)
        elif self.style == "numbers anew":
            lowest = torch.tensor(torch.finfo(x.dtype).min)
            hidden = torch.max(hidden, lowest) + torch.zeros(1)
        out = self.down(hidden)
        if self.style == "a gate at 0":
            out = out * self.gate.tanh()
        if self.style == "the second output":
            return x, other + out
        return x + out, other


class Net(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.embeddings, self.score = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList([Layer(style) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = other = self.embeddings(ids)
        for layer in self.layers:
            x, other = layer(x, other)
        return self.score(x + other)


@pytest.mark.parametrize(
    "style", ["half precision", "numbers anew", "a gate at 0", "the second output"]
)
def test_neurons_are_proved_whatever_a_forward_does_to_them(style: str) -> None:
    torch.manual_seed(0)
    model = Net(style).eval()
    before = copy.deepcopy(model.state_dict())
    structure = find_structure(model, {"ids": torch.arange(8).view(2, 4)})
    neurons = [axis.size for axis in structure.axes if axis.kind is Kind.NEURONS]
    assert neurons == [16, 16]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.get_default_dtype() == torch.float32


def test_the_default_type_comes_back_after_an_exception() -> None:
    with float64_throughout():
        assert torch.ones(2).float().dtype == torch.float64
        assert torch.ones(2, dtype=torch.int64).to(torch.float32).dtype == torch.float64
    with pytest.raises(KeyError), float64_throughout():
        raise KeyError
    assert torch.ones(2).dtype == torch.float32


def test_a_call_of_long_sequences_is_cropped_to_their_first_positions():
    hidden, mask = torch.randn(2, 90, 16), torch.zeros(2, 1, 90, 90)
    tables = (torch.randn(2, 90, 4), torch.randn(2, 90, 4))
    call = Call((hidden,), {"attention_mask": mask, "position_embeddings": tables, "x": None}, ())
    short = cropped(call)
    assert torch.equal(short.args[0], hidden[:, :POSITIONS])
    assert short.kwargs["attention_mask"].shape == (2, 1, POSITIONS, POSITIONS)
    assert [t.shape for t in short.kwargs["position_embeddings"]] == [(2, POSITIONS, 4)] * 2
    few = Call((hidden[:, :9],), {}, ())
    assert cropped(few) is few
    square = Call((torch.randn(2, 90, 90),), {}, ())  # features of the same size
    assert cropped(square) is square


class Fixed(nn.Module):
    """Runs on sequences of one length only."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.down(self.up(x.view(-1, 90, 6)).relu())


def test_a_module_that_runs_on_no_fewer_positions_is_proved_on_all():
    call = Call((torch.randn(2, 90, 6),), {}, ())
    trial = Trial(Fixed(), call)
    assert trial.on_few_positions() is trial
    shorter = Trial(nn.Sequential(nn.Linear(6, 6)), call).on_few_positions()
    assert shorter.whole()[0].shape == (2, POSITIONS, 6)


def test_a_trial_ends_with_the_modules_that_are_compared():
    layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 2))
    call = Call((torch.randn(3, 6),), {}, ())
    runs = []
    layers[3].register_forward_hook(lambda *args: runs.append(1))
    (found,) = Trial(layers, call, until=["0", "2"]).whole()[1:]
    assert runs == []
    whole = layers.double()[:3](call.args[0].double())
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    unreached = nn.ModuleDict({"run": nn.Linear(6, 2), "idle": nn.Linear(2, 2)})
    (output,) = Trial(unreached, call, path="run", until=["idle"]).whole()
    assert output.shape == (3, 2)


class Stem(nn.Module):
    """Two layers, and many after them; `direct` uses a weight of one that it does not call."""

    def __init__(self, *, direct: bool) -> None:
        super().__init__()
        self.direct = direct
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        self.rest = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.direct:
            x = x @ self.rest[0].weight.new_ones(6, 6)
        return self.rest(self.stem(x))


def test_what_the_forward_does_not_call_needs_no_float64() -> None:
    call = Call((torch.randn(3, 6),), {}, ())
    trial = Trial(Stem(direct=False), call, until=["stem.1"])
    partial = trial.on_what_it_calls()
    assert partial.is_partial
    assert torch.equal(partial.whole()[0], trial.whole()[0])
    twin = partial.twin()
    assert twin.stem[1].weight.dtype is torch.float64
    assert twin.rest[1].weight.dtype is torch.float32


def test_a_forward_that_needs_more_in_float64_than_it_calls_gets_it() -> None:
    trial = Trial(Stem(direct=True), Call((torch.randn(3, 6),), {}, ()), until=["stem.1"])
    assert trial.on_what_it_calls() is trial


@pytest.mark.parametrize("is_drawn", [False, True])
def test_copies_of_a_trial_write_nothing_into_the_model(is_drawn: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    before = copy.deepcopy(model.state_dict())
    trial = Trial(model, Call((torch.randn(3, 6),), {}, ()), is_drawn=is_drawn)
    shared = trial.copied()[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert shared is not is_drawn
    trial.whole()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
