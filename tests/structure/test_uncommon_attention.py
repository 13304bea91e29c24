"""Attentions whose heads go together with others, or are written in an uncommon way."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import StructureError
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


def grouped_heads(groups: int) -> transformers.PreTrainedModel:
    """Two layers of four heads whose out-projection has a matrix for each group of them."""
    values = {"num_key_value_heads": 1, "head_dim": 8, "q_lora_rank": 12, "o_lora_rank": 6}
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    kinds = {"layer_types": ["sliding_attention"] * 2, "mlp_layer_types": ["moe"] * 2}
    config = {**ENCODER, **values, **routed, **kinds, "o_groups": groups, "qk_rope_head_dim": 4}
    model = built("DeepseekV4ForCausalLM", **config)
    model.set_experts_implementation("eager")  # in float64
    return model


def test_heads_at_the_same_position_of_groups_that_share_a_weight_go_together() -> None:
    model = grouped_heads(2)
    structure = find_structure(model, IDS)
    first, second = heads_of(structure)
    assert (first.size, first.minimum) == (2, 1)
    assert [(part.offset, part.width) for part in first.slices if "q_b_proj" in part.tensor] == [
        (0, 8),
        (16, 8),
    ]
    smaller = check_a_cut(model, IDS, structure, {first.name: [1], second.name: [0]})
    assert smaller.model.layers[0].self_attn.num_key_value_groups == 2


def test_heads_with_a_weight_of_their_own_are_refused_in_words() -> None:
    structure = find_structure(grouped_heads(4), IDS)
    reasons = [
        r.reason for r in structure.refusals if r.kind == "heads" and "self_attn" in r.module
    ]
    assert len(reasons) == 2
    assert all("whose number is fixed" in reason for reason in reasons)


def test_heads_whose_rows_are_regular_in_blocks_go_together_across_blocks() -> None:
    values = {"n_embd": 16, "n_layer": 2, "vocab_size": 19, "n_positions": 16, "rotary_dim": 2}
    model = built("CodeGenModel", **values, n_head=8)
    structure = find_structure(model, IDS)
    first, second = heads_of(structure)
    assert (first.size, len(first.taps)) == (2, 4)  # four blocks, two heads in each
    smaller = check_a_cut(model, IDS, structure, {first.name: [1], second.name: [0]})
    assert smaller.h[0].attn.num_attention_heads == 4
    check_a_cut(model, IDS, structure, {first.name: [], second.name: [0, 1]})


def squeezed(heads: int) -> transformers.PreTrainedModel:
    values = {**ENCODER, "num_attention_heads": heads, "embedding_size": 16}
    return built("SqueezeBertModel", **values)


def test_heads_of_a_convolution_in_groups_are_masked_in_its_dimension() -> None:
    model = squeezed(8)
    structure = find_structure(model, IDS)
    first, second = heads_of(structure)
    assert (first.size, first.minimum) == (2, 1)  # of each of four groups, one head
    assert {tap.dim for tap in first.taps} == {1}
    smaller = check_a_cut(model, IDS, structure, {first.name: [1], second.name: [0]})
    assert smaller.encoder.layers[0].attention.num_attention_heads == 4


def test_heads_that_all_go_together_are_refused_in_words() -> None:
    structure = find_structure(squeezed(4), IDS)
    reasons = [r.reason for r in structure.refusals if r.kind == "heads"]
    assert len(reasons) == 2
    assert all("one unit" in reason for reason in reasons)


class Masked(nn.Module):
    """An attention all of whose positions are masked out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for z in (self.q, self.k, self.v))
        context = (q @ k.transpose(-1, -2) - torch.inf).softmax(-1) @ v
        return self.out(context.transpose(1, 2).flatten(2))


def test_an_attention_that_puts_out_no_numbers_is_refused_in_words() -> None:
    with pytest.raises(StructureError, match="NaN instead of numbers"):
        find_structure(Around(Masked()).double().eval(), IDS)
