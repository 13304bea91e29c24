"""Attentions and FFNs however they are written; and that every parameter is accounted for."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_gradnas import GradNASPruner
from hf_gradnas.masks import masked
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Axis, Kind, Structure
from hf_gradnas.verification import find_structure


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Net(transformers.PreTrainedModel):
    """One FFN, in a list or as an attribute."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, config: transformers.PreTrainedConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(9, 8)
        if config.listed:
            self.layers = nn.ModuleList([Ffn()])
        else:
            self.ffn = Ffn()
        self.score = nn.Linear(8, 3)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> ModelOutput:
        x = self.embeddings(input_ids)
        x = x + (self.layers[0] if self.config.listed else self.ffn)(x)
        logits = self.score(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits)


def shapes_of(axis: Axis, path: str) -> tuple[object, ...]:
    slices = {(s.tensor.removeprefix(path), s.dim, s.width, s.role) for s in axis.slices}
    taps = [(tap.module.removeprefix(path), tap.side, tap.dim) for tap in axis.taps]
    return axis.kind, axis.size, axis.minimum, slices, taps


def test_an_ffn_in_a_list_and_as_an_attribute_are_one_thing() -> None:
    found = []
    for listed in (True, False):
        torch.manual_seed(0)
        model = Net(transformers.PreTrainedConfig(listed=listed)).eval()
        torch.manual_seed(1)
        batch = {"input_ids": torch.randint(9, (4, 6)), "labels": torch.randint(3, (4,))}
        pruner = GradNASPruner(model, score="fisher", layout="per_layer")
        (axis,) = pruner.discover(batch).axes
        path = "layers.0" if listed else "ffn"
        assert axis.name == f"{path}:neurons"
        found.append((shapes_of(axis, path), pruner.score([batch]).values[axis.name]))
    assert found[0][0] == found[1][0]
    assert found[0][0][:3] == (Kind.NEURONS, 32, 0)
    assert found[0][1].tobytes() == found[1][1].tobytes()


class Attention(nn.Module):
    """An attention over 16 features in a stream, written in several ways."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        groups = 2 if style in ("grouped", "folded") else 4
        self.groups = groups
        self.q, self.k, self.v = (
            nn.Linear(16, 16),
            nn.Linear(16, 4 * groups),
            nn.Linear(16, 4 * groups),
        )
        self.gate, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.q_norm, self.slopes = nn.LayerNorm(4), nn.Parameter(torch.randn(4))
        self.embeddings, self.score = nn.Embedding(9, 16), nn.Linear(16, 3)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, -1, 4).transpose(1, 2)  # (b, heads, t, 4)
        k, v = (w(x).view(b, t, -1, 4).transpose(1, 2) for w in (self.k, self.v))
        if self.style == "norm inside":
            q = self.q_norm(q)
        if self.style == "partial rotary":
            q = torch.cat([-q[..., 1:2], q[..., :1], q[..., 2:]], -1)
        heads = q.shape[1]
        if self.style == "grouped":
            rep = heads // k.shape[1]
            k, v = (z.repeat_interleave(rep, 1) for z in (k, v))
        if self.style == "kernel":
            return self.merged(nn.functional.scaled_dot_product_attention(q, k, v))
        if self.style == "folded":
            shape = (b, k.shape[1], -1, 4)
            weights = (q.reshape(shape) @ k.transpose(-1, -2)).softmax(-1)
            return self.merged((weights @ v).reshape(b, heads, t, 4))
        if self.style == "three dimensions":
            q, k, v = (z.reshape(-1, t, 4) for z in (q, k, v))
            weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
            return self.merged(torch.bmm(weights, v).view(b, heads, t, 4))
        context = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        if self.style == "gate in heads":
            gate = self.gate(x).view(b, t, -1, 4) + self.slopes[:, None]
            return (context.transpose(1, 2) * gate.sigmoid()).flatten(2)
        context = self.merged(context)
        return context * self.gate(x).sigmoid() if self.style == "gate" else context

    def merged(self, context: Tensor) -> Tensor:
        return context.transpose(1, 2).flatten(2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        context = self.attend(x)
        return self.score(x + self.out(context))


STYLES = ["plain", "grouped", "folded", "kernel", "gate"]
STYLES += ["three dimensions", "norm inside", "partial rotary", "gate in heads"]


@pytest.mark.parametrize("style", STYLES)
def test_an_attention_is_found_however_it_is_written(style: str) -> None:
    torch.manual_seed(0)
    model, ids = Attention(style).double().eval(), torch.randint(9, (2, 5))
    structure = find_structure(model, {"ids": ids})
    axes = {axis.kind: axis for axis in structure.axes}
    heads = axes[Kind.HEADS]
    assert heads.size == 4
    grouped = style in ("grouped", "folded")
    assert (Kind.KV_GROUPS in axes) is grouped
    owners = {part.module for part in heads.slices}
    own = {"q", "out"} if grouped else {"q", "k", "v", "out"}
    gates = {"gate": {"gate"}, "gate in heads": {"gate", ""}}
    assert owners == own | gates.get(style, set())
    kept = {heads.name: [1, 3]}
    twin = copy.deepcopy(model)
    with torch.no_grad(), masked(model, structure.axes, kept):
        wanted = model(ids)
    cut(twin, structure.axes, kept)
    with torch.no_grad():
        torch.testing.assert_close(twin(ids), wanted, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
def test_every_parameter_is_in_an_axis_a_refusal_or_a_list(family: str) -> None:
    model, inputs = zoo.build(family)
    structure: Structure = find_structure(model, inputs)
    held = {part.tensor for axis in structure.axes for part in axis.slices}
    refused = tuple(f"{r.module}." for r in structure.refusals if r.module)
    for name, _ in model.named_parameters():
        ways = (name in held, name.startswith(refused), name in structure.unpruned)
        assert any(ways), name
    assert not held & structure.unpruned.keys()
    assert all(structure.unpruned.values())
