"""A forward in a trial: float64 whatever it asks for, and values that show every unit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_gradnas.types import Kind
from hf_gradnas.verification import find_structure
from hf_gradnas.verification.trial import float64_throughout


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
