"""Attentions that differ from the usual one in a single respect, one kind a test."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_gradnas.costs.counting import count_costs
from hf_gradnas.masks import masked
from hf_gradnas.stock.space import find_stock_space
from hf_gradnas.surgery.cut import cut
from hf_gradnas.surgery.modeling_gradnas import resize
from hf_gradnas.surgery.records import merge_records
from hf_gradnas.types import Axis, Kind, Structure
from hf_gradnas.verification import find_structure

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 19, "max_position_embeddings": 16}
ENCODER = {**TEXT, "num_attention_heads": 4, "intermediate_size": 24}
IDS = {"input_ids": torch.arange(12).view(2, 6) % 19}


def built(name: str, **values: object) -> transformers.PreTrainedModel:
    """A tiny model of random values in float64, by the name of its class."""
    family = name.partition("For")[0].removesuffix("Model").removesuffix("Encoder")
    config = getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**values)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def first_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def heads_of(structure: Structure) -> list[Axis]:
    return [axis for axis in structure.axes if axis.kind is Kind.HEADS]


def check_a_cut(model: nn.Module, inputs: dict, structure: Structure, kept: dict) -> nn.Module:
    """Masked equals cut on the whole model, which the mask changes; returns the cut model."""
    with torch.no_grad():
        whole = first_of(model(**inputs))
        with masked(model, structure.axes, kept):
            wanted = first_of(model(**inputs))
        smaller = copy.deepcopy(model)
        cut(smaller, structure.axes, kept)
        result = first_of(smaller(**inputs))
    assert (wanted - whole).abs().max() > 1e-4 * whole.abs().max()
    assert torch.allclose(result, wanted, rtol=0, atol=1e-10 * float(whole.abs().max()))
    return smaller


def test_a_table_that_no_other_layer_shares_is_cut_with_its_heads() -> None:
    model = built("UMT5EncoderModel", d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    structure = find_structure(model, IDS)
    heads = heads_of(structure)
    assert [(axis.size, axis.tied) for axis in heads] == [(4, ""), (4, "")]
    assert not structure.refusals
    check_a_cut(model, IDS, structure, {heads[0].name: [0, 3], heads[1].name: [1, 2, 3]})


@pytest.mark.parametrize("groups", [2, 4])
def test_norms_across_kv_groups_are_cut_with_them(groups: int) -> None:
    model = built("Olmo2Model", **ENCODER, num_key_value_heads=groups, pad_token_id=0)
    structure = find_structure(model, IDS)
    heads, kv = heads_of(structure)[0], f"{heads_of(structure)[0].parent}"
    assert not structure.refusals
    kept = {heads.name: [2, 3], kv: [1]} if groups == 2 else {heads.name: [0, 3]}
    check_a_cut(model, IDS, structure, kept)


class Heads(nn.Module):
    """An attention of four heads over 16 features, whose forward writes its shapes in some way."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.num_heads, self.embed_dim = style, 4, 16
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        b, t, width = x.shape
        if self.style == "width over heads":
            shape = (b, t, 3, self.num_heads, width // self.num_heads)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)).flatten(0, 1) if self.style == "folded" else None
        if weights is None:
            context = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        else:
            context = ((weights + bias).softmax(-1) @ v.flatten(0, 1)).view(b, self.num_heads, t, 4)
        merged = context.transpose(1, 2)
        if self.style == "width of the input":
            merged = merged.reshape(b, t, width)
        elif self.style == "a free size":
            merged = merged.flatten(2).view(b, -1, width)
        else:
            merged = merged.flatten(2)
        return self.out(merged), bias


class Biased(nn.Module):
    """Layers that take a bias or a slope for each head from outside, and hand it on."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.embeddings, self.score = nn.Embedding(19, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList([Heads(style) for _ in range(2)])
        self.places = nn.Embedding(5, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        b, t, _ = x.shape
        bias = x.new_zeros(1, 1, t, t)
        if self.style == "a table outside":
            place = torch.arange(t)
            bias = self.places((place[:, None] - place).clamp(-2, 2) + 2).permute(2, 0, 1)[None]
        elif self.style in ("slopes", "folded"):
            bias = -torch.arange(1, 5).to(x)[:, None, None] * torch.arange(t).to(x)
            bias = bias.repeat(b, 1, 1) if self.style == "folded" else bias
        for layer in self.layers:
            out, bias = layer(x, bias=bias)
            x = x + out
        return self.score(x)


OUTSIDE = ["a table outside", "slopes", "folded"]
WRITTEN = ["width of the input", "width over heads", "a free size"]


@pytest.mark.parametrize("style", OUTSIDE + WRITTEN)
def test_sizes_of_all_heads_that_come_from_outside_are_brought_to_fewer(style: str) -> None:
    torch.manual_seed(0)
    model = Biased(style).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    structure = find_structure(model, IDS)
    first, second = heads_of(structure)
    need = first.adaptation
    assert need.module == "layers.0"
    assert (need.arguments, bool(need.width)) == (
        (("bias",), False) if style in OUTSIDE else ((), True)
    )
    kept = {first.name: [0, 3], second.name: [1, 2, 3]}
    check_a_cut(model, IDS, structure, kept)
    check_a_cut(model, IDS, structure, {first.name: [], second.name: [0, 2]})

    once = copy.deepcopy(model)
    old = cut(once, structure.axes, {first.name: [0, 1, 3], second.name: [1, 2, 3]})
    fresh = Biased(style).double().eval()  # built anew, and filled from a checkpoint
    for _ in range(2):
        resize(fresh, old)
    fresh.load_state_dict(once.state_dict())
    assert torch.equal(fresh(**IDS), once(**IDS))
    again = find_structure(once, IDS)  # cut once more
    assert {axis.size for axis in heads_of(again)} == {3}
    new = cut(once, again.axes, {first.name: [0, 2], second.name: [0, 1]})
    direct = copy.deepcopy(model)
    cut(direct, structure.axes, {first.name: [0, 3], second.name: [1, 2]})
    merged = Biased(style).double().eval()
    resize(merged, merge_records(old, new))
    merged.load_state_dict(once.state_dict())
    for result in (once(**IDS), merged(**IDS)):
        assert torch.allclose(result, direct(**IDS), rtol=0, atol=1e-12)


def test_a_bias_that_layers_hand_on_stays_whole_where_an_attention_goes() -> None:
    values = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    model = built("UdopEncoderModel", **values, vocab_size=19, image_size=16, patch_size=8)
    inputs = {**IDS, "bbox": torch.rand(2, 6, 4).double()}
    structure = find_structure(model, inputs)
    first, second = heads_of(structure)
    assert first.removal.returns[1] == "position_bias"
    check_a_cut(model, inputs, structure, {first.name: [1, 3], second.name: [0, 1, 3]})
    check_a_cut(model, inputs, structure, {first.name: [], second.name: [0, 3]})
    costs = count_costs(model, structure, inputs, layout="per_layer")
    smaller = check_a_cut(model, inputs, structure, {first.name: [], second.name: [0, 3]})
    counts = {axis.name: axis.size for axis in structure.axes} | {first.name: 0, second.name: 2}
    assert costs["params"].of(counts) == sum(p.numel() for p in smaller.parameters())


def test_the_stock_class_cannot_say_what_comes_from_outside() -> None:
    model = built("BloomModel", hidden_size=16, n_layer=2, n_head=4, vocab_size=19)
    space = find_stock_space(model, find_structure(model, IDS))
    heads = heads_of(find_structure(model, IDS))
    assert all("made outside of it" in space.refused[axis.name] for axis in heads)


class Joined(nn.Module):
    """One attention over a sequence that learned tokens, each with a place, are joined to."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.score = nn.Linear(6, 16), nn.Linear(16, 3)
        self.first, self.tokens = (nn.Parameter(torch.randn(1, n, 16)) for n in (1, 5))
        self.places = nn.Parameter(torch.randn(1, 10, 16))
        self.norm, self.attention = nn.LayerNorm(16), Heads("plain")

    def forward(self, pixels: Tensor) -> Tensor:
        b = len(pixels)
        parts = (self.first.expand(b, -1, -1), self.patches(pixels), self.tokens.expand(b, -1, -1))
        x = torch.cat(parts, 1) + self.places
        out, _ = self.attention(self.norm(x), bias=x.new_zeros(1))
        return self.score(x + out)


def test_learned_tokens_of_a_sequence_are_no_units_of_their_own() -> None:
    torch.manual_seed(0)
    model, inputs = Joined().double().eval(), {"pixels": torch.randn(2, 4, 6).double()}
    structure = find_structure(model, inputs)
    (heads,) = heads_of(structure)
    assert (heads.size, heads.minimum) == (4, 0)
    check_a_cut(model, inputs, structure, {heads.name: [0, 3]})


class Soft(nn.Module):
    """An attention whose softmax is a module of its own, whose heads a module outside makes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        b, t, _ = x.shape
        heads = (self.q(x) + query, self.k(x), self.v(x))
        q, k, v = (z.view(b, t, -1, 4).transpose(1, 2) for z in heads)
        context = self.softmax(q @ k.transpose(-1, -2) + bias) @ v
        return self.out(context.transpose(1, 2).flatten(2))


class Queried(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.score = nn.Embedding(19, 16), nn.Linear(16, 3)
        self.places, self.attention = nn.Linear(16, 16), Soft()
        self.bias = nn.Buffer(torch.randn(4, 6, 6))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        return self.score(x + self.attention(x, self.places(x), bias=self.bias))


def test_what_owns_rows_of_heads_runs_in_the_proof_and_a_softmax_is_no_attention() -> None:
    torch.manual_seed(0)
    model = Queried().double().eval()
    structure = find_structure(model, IDS)
    (heads,) = heads_of(structure)
    assert heads.removal.module == heads.adaptation.module == "attention"
    assert {part.module for part in heads.slices} >= {"places", "attention.q", "attention.out"}
    check_a_cut(model, IDS, structure, {heads.name: [1, 2]})


class Sized(nn.Module):
    """Grouped attention over a fused projection, split by sizes of unusual names."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.score = nn.Embedding(19, 16), nn.Linear(16, 3)
        self.fused, self.out = nn.Linear(16, 32), nn.Linear(16, 16)
        self.q_extent, self.kv_extent, self.ratio = 16, 8, 4  # the ratio is no number of heads

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        b, t, _ = x.shape
        parts = self.fused(x).split([self.q_extent, self.kv_extent, self.kv_extent], -1)
        q, k, v = (z.view(b, t, -1, 4).transpose(1, 2) for z in parts)
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        context = (q @ k.transpose(-1, -2)).softmax(-1) @ v / self.ratio
        return self.score(x + self.out(context.transpose(1, 2).flatten(2)))


def test_attributes_of_any_name_are_sizes_where_the_proof_needs_them() -> None:
    torch.manual_seed(0)
    model = Sized().double().eval()
    structure = find_structure(model, IDS)
    (heads,) = heads_of(structure)
    named = {(a.name, a.axis, a.factor) for a in heads.attributes}
    assert named == {("q_extent", heads.name, 4), ("kv_extent", heads.parent, 4)}
    smaller = check_a_cut(model, IDS, structure, {heads.name: [2], heads.parent: [1]})
    assert (smaller.q_extent, smaller.kv_extent, smaller.ratio) == (4, 4, 4)
