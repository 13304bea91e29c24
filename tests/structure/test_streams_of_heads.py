"""Attentions that several weights read, that learned sequences feed, or that keep results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, unfold

from hf_gradnas.masks import masked
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Axis, Kind, Structure
from hf_gradnas.verification import find_structure

X = {"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).double()}


class Attention(nn.Module):
    """Four heads over 16 features, in some style."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.num_heads = style, 4
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 16)
        if style == "a gate of the values":
            self.gate = nn.Linear(16, 4)
        if style == "two results":
            self.narrow, self.also = nn.Linear(16, 8), nn.Linear(8, 6)
        if style == "a shift":
            self.places = nn.Linear(16, 16)
        if style == "a cache":
            self.biases, self.cache = nn.Parameter(torch.zeros(4, 25)), {}

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def bias(self, q: Tensor, v: Tensor) -> Tensor | float:
        if self.style == "a gate of the values":
            return self.gate(v).transpose(1, 2).unsqueeze(2)
        if self.style == "a shift":  # as of Transformer-XL
            scores = q @ self.split(self.places(torch.ones(1, 9, 16).to(q))).transpose(-1, -2)
            b, h, t, places = scores.shape
            zeros = torch.zeros((b, h, t, 1)).to(scores)
            padded = torch.cat([zeros, scores], -1).view(b, h, places + 1, t)
            return padded[:, :, 1:].view_as(scores)[..., :t]
        if self.style == "a cache":  # as of LeViT
            if "cpu" not in self.cache:
                self.cache["cpu"] = self.biases.view(self.num_heads, 5, 5)
            return self.cache["cpu"]
        return 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, v = self.split(self.q(x)), self.v(x)
        scores = q @ self.split(self.k(x)).transpose(-1, -2) + self.bias(q, v)
        context = (scores.softmax(-1) @ self.split(v)).transpose(1, 2).flatten(2)
        if self.style == "values that skip it":
            return self.out(context) + v, x
        if self.style == "no projection":
            return context, x
        if self.style == "two results":
            other = (scores.softmax(-1) @ self.split(self.narrow(x))).transpose(1, 2).flatten(2)
            return self.out(context), self.also(other)
        return self.out(context), x


class Deformable(nn.Module):
    """Each of four heads weighs the values at places of its own (Deformable DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.d_model = 4, 16
        self.values, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.places, self.weights = nn.Linear(16, 4 * 3 * 2), nn.Linear(16, 4 * 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, t, _ = x.shape
        values = self.values(x).view(b, t, self.n_heads, self.d_model // self.n_heads)
        images = values.flatten(2).transpose(1, 2).reshape(b * self.n_heads, -1, 1, t)
        places = self.places(x).view(b, t, self.n_heads, 3, 2).tanh()
        places = places.transpose(1, 2).flatten(0, 1)
        weights = self.weights(x).view(b, t, self.n_heads, 3).softmax(-1)
        found = grid_sample(images, places, align_corners=False)
        parts = found * weights.transpose(1, 2).reshape(b * self.n_heads, 1, t, 3)
        context = parts.sum(-1).view(b, -1, t)
        return self.out(context.transpose(1, 2)), weights


class Windowed(nn.Module):
    """Four heads, and beside them four that weigh the values in a window (ConvBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.width = 4, 16
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.near, self.window, self.out = nn.Linear(16, 16), nn.Linear(16, 12), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, t, _ = x.shape
        shape = (b, t, self.num_heads, -1)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        far = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)
        weights = self.window(self.q(x) * self.k(x)).reshape(-1, 3, 1).softmax(1)
        columns = unfold(self.near(x).transpose(1, 2)[..., None], (3, 1), padding=(1, 0))
        columns = columns.transpose(1, 2).reshape(-1, self.width // self.num_heads, 3)
        near = (columns @ weights).view(shape)
        return self.out(torch.cat([far, near], 2).view(b, t, 2 * self.width)), x


class Encoder(nn.Module):
    def __init__(self, style: str, *, queries: bool = False) -> None:
        super().__init__()
        self.stem, self.score = nn.Linear(16, 16), nn.Linear(16, 3)
        others = {"deformable": Deformable, "windowed": Windowed}
        self.attention = others[style]() if style in others else Attention(style)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.rest = nn.Linear(6, 3) if style == "two results" else None
        self.queries = nn.Parameter(torch.randn(5, 16)) if queries else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) if self.queries is None else self.queries.expand(len(x), -1, -1)
        result, other = self.attention(x)
        x = x + result
        x = x + self.down(torch.relu(self.up(x)))
        return self.score(x) + (0 if self.rest is None else self.rest(other))


def built(style: str, *, queries: bool = False) -> Encoder:
    torch.manual_seed(0)
    return Encoder(style, queries=queries).double().eval()


def heads_of(structure: Structure) -> Axis:
    (heads,) = [axis for axis in structure.axes if axis.kind is Kind.HEADS]
    return heads


def check_a_cut(model: nn.Module, structure: Structure, kept: list[int]) -> None:
    heads = heads_of(structure)
    with torch.no_grad():
        whole = model(**X)
        with masked(model, structure.axes, {heads.name: kept}):
            wanted = model(**X)
        smaller = copy.deepcopy(model)
        cut(smaller, structure.axes, {heads.name: kept})
        result = smaller(**X)
    assert (wanted - whole).abs().max() > 1e-4
    assert torch.allclose(result, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", ["a gate of the values", "two results"])
def test_heads_that_several_weights_read_are_masked_at_each(style: str) -> None:
    model = built(style)
    structure = find_structure(model, X)
    heads = heads_of(structure)
    other = {"a gate of the values": "gate", "two results": "also"}[style]
    assert [tap.module for tap in heads.taps] == ["attention.out", f"attention.{other}"]
    assert heads.minimum == 1  # an attention without heads is replaced by one projection's bias
    check_a_cut(model, structure, [0, 3])
    check_a_cut(model, structure, [1])


@pytest.mark.parametrize("style", ["values that skip it", "no projection"])
def test_heads_that_are_added_to_the_stream_are_refused_in_plain_words(style: str) -> None:
    structure = find_structure(built(style), X)
    (refusal,) = [refusal for refusal in structure.refusals if refusal.kind == Kind.HEADS]
    assert (
        "meet the stream of values that all layers share, with no out-projection" in refusal.reason
    )
    assert refusal.module == "attention"


@pytest.mark.parametrize("style", ["plain", "a gate of the values"])
def test_an_attention_over_learned_queries_is_pruned_as_any_other(style: str) -> None:
    model = built(style, queries=True)
    structure = find_structure(model, X)
    assert heads_of(structure).size == 4
    check_a_cut(model, structure, [0, 3])


def test_zeros_beside_the_scores_of_a_head_go_with_it() -> None:
    model = built("a shift")
    structure = find_structure(model, X)
    check_a_cut(model, structure, [0, 2, 3])


def test_what_an_attention_keeps_of_its_last_run_is_made_anew() -> None:
    model = built("a cache")
    structure = find_structure(model, X)
    model(**X)  # fills it
    check_a_cut(model, structure, [1, 3])
    assert model.attention.cache["cpu"].shape == (4, 5, 5)


def test_heads_that_weigh_values_at_places_of_their_own_are_found() -> None:
    model = built("deformable")
    structure = find_structure(model, X)
    assert heads_of(structure).size == 4
    assert not [refusal for refusal in structure.refusals if refusal.kind == Kind.HEADS]
    check_a_cut(model, structure, [0, 3])
    check_a_cut(model, structure, [])


def test_two_attentions_side_by_side_with_one_number_of_heads_are_one_axis() -> None:
    model = built("windowed")
    structure = find_structure(model, X)
    heads = heads_of(structure)
    at_out = [tap for tap in heads.taps if tap.module == "attention.out"]
    assert [(tap.width, tap.offset, tap.stride) for tap in at_out] == [(4, 0, 4), (4, 16, 4)]
    check_a_cut(model, structure, [0, 3])


def test_a_softmax_over_what_one_layer_makes_is_no_attention() -> None:
    class Router(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.down(torch.relu(self.up(x)))
            return self.score(
                x * self.attention.weights(x).unflatten(-1, (4, 3)).softmax(-1).mean()
            )

    torch.manual_seed(0)
    structure = find_structure(Router("deformable").double().eval(), X)
    assert not [axis for axis in structure.axes if axis.kind is Kind.HEADS]
    assert not [refusal for refusal in structure.refusals if refusal.kind == Kind.HEADS]


def test_channels_that_are_weighed_one_by_one_are_no_heads() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weights = nn.Conv1d(3, 8, 3), nn.Conv1d(3, 8, 3)
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x) * self.weights(x).softmax(-1)).sum(-1))

    torch.manual_seed(0)
    structure = find_structure(Pooled().double().eval(), {"x": torch.randn(2, 3, 6).double()})
    assert [(axis.name, axis.size) for axis in structure.axes] == [("first:channels", 8)]


def test_values_at_places_stay_channels_where_places_are_of_no_head() -> None:
    class Warped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.flow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
            self.last = nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            places = self.flow(x).tanh().permute(0, 2, 3, 1)
            return self.last(grid_sample(torch.relu(self.first(x)), places, align_corners=False))

    torch.manual_seed(0)
    structure = find_structure(Warped().double().eval(), {"x": torch.randn(2, 3, 6, 6).double()})
    assert [(axis.name, axis.size) for axis in structure.axes] == [("first:channels", 8)]
