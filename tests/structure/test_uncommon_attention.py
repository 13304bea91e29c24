"""Attentions whose heads go together with others, or are written in an uncommon way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_gradnas import GradNASPruner
from hf_gradnas.verification import find_structure

from .test_kinds_of_attention import ENCODER, IDS, built, check_a_cut, heads_of


class Twice(nn.Module):
    """Values that a weight reads before the softmax, to make a bias for each head of it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.repeats = groups, 4 // groups
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 4 * groups), nn.Linear(16, 4 * groups)
        self.gate = nn.Linear(4 * groups, groups)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
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
        return self.score(x + self.attention(x))


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


def test_the_config_keeps_the_width_of_a_head_where_heads_of_a_group_go_together() -> None:
    model = built("DogeForCausalLM", **ENCODER, num_key_value_heads=2).float()
    pruner = GradNASPruner(model)
    structure = pruner.discover(IDS)  # which loads what it would write
    assert [axis.size for axis in heads_of(structure)] == [2, 2]
