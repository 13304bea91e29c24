"""Attentions whose heads go together with others, or are written in an uncommon way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_gradnas.verification import find_structure

from .test_kinds_of_attention import IDS, check_a_cut, heads_of


class Crossed(nn.Module):
    """Four heads over 16 features, whose queries come from another stream than keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = (z.view(*z.shape[:2], -1, 4).transpose(1, 2) for z in self.project(x, hidden))
        context = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(context.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(hidden), self.v(hidden)


class Twice(Crossed):
    """Values that a weight reads before the softmax, to make a bias for each head of it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.repeats = groups, 4 // groups
        self.k, self.v = nn.Linear(16, 4 * groups), nn.Linear(16, 4 * groups)
        self.gate = nn.Linear(4 * groups, groups)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(hidden), self.v(hidden)
        gate = self.gate(v).transpose(1, 2)[:, :, None]  # (batch, groups, 1, tokens)
        q, k, v = (z.view(*z.shape[:2], -1, 4).transpose(1, 2) for z in (q, k, v))
        k, v, gate = (z.repeat_interleave(self.repeats, 1) for z in (k, v, gate))
        context = (q @ k.transpose(-1, -2) + gate).softmax(-1) @ v
        return self.out(context.transpose(1, 2).flatten(2))


class Around(nn.Module):
    """An attention of a sequence to itself between embeddings and scores."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.score = nn.Embedding(19, 16), nn.Linear(16, 3)
        self.attention = attention

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        return self.score(x + self.attention(x, x))


@pytest.mark.parametrize(("groups", "size"), [(4, 4), (2, 2)])
def test_heads_whose_values_are_read_twice_are_masked_at_both_places(
    groups: int, size: int
) -> None:
    torch.manual_seed(0)
    model = Around(Twice(groups)).double().eval()
    structure = find_structure(model, IDS)
    (heads,) = heads_of(structure)  # of two groups, the heads go together by their bias
    assert [tap.module for tap in heads.taps] == ["attention.out", "attention.gate"]
    assert (heads.size, heads.minimum) == (size, 1)
    check_a_cut(model, IDS, structure, {heads.name: [size - 1]})
