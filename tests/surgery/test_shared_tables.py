"""A table of biases that the attentions of a stack share: T5's, and one of another make."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_gradnas.costs.counting import count_costs
from hf_gradnas.masks import masked
from hf_gradnas.surgery import modeling_gradnas
from hf_gradnas.surgery.cut import cut
from hf_gradnas.surgery.modeling_gradnas import SHARED_TABLES, SharedTable, table_of
from hf_gradnas.surgery.records import merge_records
from hf_gradnas.types import Kind, Structure
from hf_gradnas.verification import find_structure

ROW = SharedTable("owns_pairs", "pairs", "bias")
WIDTH, HEADS, LENGTH = 16, 4, 6


class Attention(nn.Module):
    """Attention whose first layer looks a bias per head up, and hands it on."""

    def __init__(self, owns_pairs: bool) -> None:
        super().__init__()
        self.num_heads, self.owns_pairs = HEADS, owns_pairs
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        if owns_pairs:
            self.pairs = nn.Embedding(2 * LENGTH, HEADS)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        shape = (batch, length, self.num_heads, -1)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        if bias is None:
            place = torch.arange(length)
            found = self.pairs(place[:, None] - place + LENGTH)  # (queries, keys, heads)
            bias = found.permute(2, 0, 1)[None]
        weights = torch.softmax(q @ k.transpose(-1, -2) + bias, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1)), bias


class Stack(nn.Module):
    """Three attentions, of which the first has the table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(index == 0) for index in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            out, bias = layer(x, bias=bias)
            x = x + out
        return x


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> tuple[Stack, Tensor, Structure]:
    """The stack, an input, and its structure, with a row for its table."""
    monkeypatch.setattr(modeling_gradnas, "SHARED_TABLES", (*SHARED_TABLES, ROW))
    model = Stack().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    return model, x, find_structure(model, {"x": x})


def test_a_row_says_which_modules_share_a_table(stack) -> None:
    model, _, structure = stack
    assert table_of(model.layers[1]) == ROW
    assert table_of(model) is None
    heads = [axis for axis in structure.axes if axis.kind == Kind.HEADS]
    assert [axis.tied for axis in heads] == ["layers.0.pairs.weight"] * 3
    assert [axis.removal.table for axis in heads] == ["pairs"] * 3


@pytest.mark.parametrize("kept", [[(0, 1), (2,), (1, 3)], [(0, 1, 2, 3), (2,), (0, 1, 2, 3)]])
def test_layers_of_other_heads_get_their_own_columns(stack, kept) -> None:
    model, x, structure = stack
    heads = [axis.name for axis in structure.axes if axis.kind == Kind.HEADS]
    plan = dict(zip(heads, kept, strict=True))
    with torch.no_grad():
        with masked(model, structure.axes, plan):
            wanted = model(x)
        smaller = copy.deepcopy(model)
        record = cut(smaller, structure.axes, plan)
        assert torch.allclose(smaller(x), wanted, rtol=0, atol=1e-12)
        assert record["own_position_bias"] == {
            f"layers.{index}": [2 * LENGTH, len(kept[index])] for index in (1, 2)
        }
        assert not (smaller(x) - model(x)).abs().max() < 1e-3
        again = Stack().double().eval()  # built anew, and filled from a checkpoint
        modeling_gradnas.resize(again, record)
        again.load_state_dict(smaller.state_dict())
        assert torch.equal(again(x), smaller(x))


def test_a_second_cut_slices_the_tables_that_the_first_made(stack) -> None:
    model, x, structure = stack
    heads = [axis.name for axis in structure.axes if axis.kind == Kind.HEADS]
    direct, twice = copy.deepcopy(model), copy.deepcopy(model)
    record = cut(direct, structure.axes, dict.fromkeys(heads, (1, 3)))
    old = cut(twice, structure.axes, dict.fromkeys(heads, (1, 2, 3)))
    again = find_structure(twice, {"x": x})
    new = cut(twice, again.axes, dict.fromkeys(heads, (0, 2)))
    assert merge_records(old, new) == record
    with torch.no_grad():
        assert torch.equal(twice(x), direct(x))


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 3, 4), (2, 3, 1)])
def test_costs_know_when_a_table_stays_shared(stack, counts) -> None:
    model, x, structure = stack
    heads = [axis.name for axis in structure.axes if axis.kind == Kind.HEADS]
    costs = count_costs(model, structure, {"x": x[:1]}, layout="per_layer")
    smaller, kept = copy.deepcopy(model), dict(zip(heads, counts, strict=True))
    cut(smaller, structure.axes, {name: range(count) for name, count in kept.items()})
    assert costs["params"].of(kept) == sum(p.numel() for p in smaller.parameters())
