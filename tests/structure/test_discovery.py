"""The probe reads the layout of every family; what it cannot read is refused by name."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from hf_gradnas.errors import DataError, StructureError
from hf_gradnas.structure.discovery import discover
from hf_gradnas.types import Kind, Slice
from hf_gradnas.verification import Trial, find_structure

ALL = sorted(zoo.FAMILIES)
GROUPED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"}
CROSS = {"t5", "bart", "whisper"}


@pytest.mark.parametrize("family", ALL)
def test_every_family_is_found_and_proved_whole(family: str) -> None:
    model, inputs = zoo.build(family)
    structure = find_structure(model, inputs)
    kinds = [axis.kind for axis in structure.axes]
    layers = 1 if family == "albert" else 6 if family in CROSS else 3
    attentions = 9 if family in CROSS else layers
    streams = [r.module for r in structure.refusals if "residual stream" in r.reason]
    assert streams == (["model.encoder.conv2"] if family == "whisper" else [])
    assert len(structure.refusals) == len(streams)
    assert kinds.count(Kind.CHANNELS) == (1 if family == "whisper" else 0)
    assert kinds.count(Kind.HEADS) == attentions
    assert kinds.count(Kind.NEURONS) == layers
    assert kinds.count(Kind.KV_GROUPS) == (3 if family in GROUPED else 0)
    sizes = {axis.kind: axis.size for axis in structure.axes}
    assert sizes[Kind.HEADS] == 4
    assert sizes[Kind.NEURONS] == 96


def test_names_and_slices_of_bert() -> None:
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    heads = structure["bert.encoder.layer.0.attention:heads"]
    neurons = structure["bert.encoder.layer.2:neurons"]
    prefix = "bert.encoder.layer.0.attention."
    assert Slice(prefix + "self.key.bias", 0, 16, 0, 16) in heads.slices
    assert Slice(prefix + "output.dense.weight", 1, 16, 0, 16) in heads.slices
    assert heads.taps[0].module == prefix + "output.dense"
    assert Slice("bert.encoder.layer.2.intermediate.dense.weight", 0, 1, 0, 1) in neurons.slices


def test_fused_layouts() -> None:
    for family, tensor, dim, blocks in (
        (
            "gpt2",
            "transformer.h.1.attn.c_attn.weight",
            1,
            [(16, 0, 16), (16, 64, 16), (16, 128, 16)],
        ),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight", 0, [(48, 0, 48)]),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", 0, [(16, 0, 16)]),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", 0, [(1, 0, 1), (1, 96, 1)]),
    ):
        model, inputs = zoo.build(family)
        found = [
            (s.width, s.offset, s.stride)
            for axis in find_structure(model, inputs).axes
            if axis.kind in (Kind.HEADS, Kind.NEURONS)
            for s in axis.slices
            if s.tensor == tensor and s.dim == dim
        ]
        assert found == blocks


def test_a_shared_position_bias_ties_the_heads_of_a_stack() -> None:
    model, inputs = zoo.build("t5")
    tied = {a.name: a.tied for a in find_structure(model, inputs).axes}
    encoder = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    decoder = encoder.replace("encoder", "decoder", 1)
    assert tied["encoder.block.2.layer.0.SelfAttention:heads"] == encoder
    assert tied["decoder.block.1.layer.0.SelfAttention:heads"] == decoder
    assert tied["decoder.block.1.layer.1.EncDecAttention:heads"] == ""
    assert tied["encoder.block.1.layer.1.DenseReluDense:neurons"] == ""


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = zoo.build("llama")
    model.train()
    model.model.layers[1].eval()
    model.config._attn_implementation = "sdpa"
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = [m.training for m in model.modules()]
    find_structure(model, inputs)
    assert [m.training for m in model.modules()] == flags
    assert model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    model.eval()


def test_nothing_to_prune_is_an_error() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    with pytest.raises(StructureError, match="found nothing to prune"):
        find_structure(Plain(), {"x": torch.ones(2, 4)})


class _Coupled(nn.Module):
    """Multiplies every value by the mean of all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.mean(-1, keepdim=True)


def test_heads_that_are_coupled_are_refused_and_the_rest_is_pruned() -> None:
    model, inputs = zoo.build("bert")
    for layer in model.bert.encoder.layer:
        query = layer.attention.self.query
        layer.attention.self.query = nn.Sequential(query, _Coupled()).eval()
    structure = find_structure(model, inputs)
    assert {a.kind for a in structure.axes} == {Kind.NEURONS}
    assert {(r.module, r.kind) for r in structure.refusals} == {
        (f"bert.encoder.layer.{i}.attention", "heads") for i in range(3)
    }
    assert all("differs from masked" in r.reason for r in structure.refusals)


def test_a_norm_across_heads_is_cut_with_them() -> None:
    model, inputs = zoo.build("bert")
    norms = []
    for layer in model.bert.encoder.layer:
        query = layer.attention.self.query
        norm = nn.LayerNorm(64).double()
        layer.attention.self.query = nn.Sequential(query, norm).eval()
        norms.append(norm)
    structure = find_structure(model, inputs)
    heads = [axis for axis in structure.axes if axis.kind is Kind.HEADS]
    assert not structure.refusals
    for index, axis in enumerate(heads):
        path = f"bert.encoder.layer.{index}.attention.self.query.1"
        assert [norm.module for norm in axis.norms] == [path]
        assert Slice(f"{path}.weight", 0, 16, 0, 16) in axis.slices


def test_ffns_that_follow_each_other_without_an_attention_are_told_apart() -> None:
    model, inputs = zoo.build("convnext", depths=[1, 3, 1])
    places = discover(model, (), inputs).places
    stages = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    wanted = [f"convnext.encoder.stages.{stage}.layers.{layer}" for stage, layer in stages]
    assert [place.scope for place in places] == wanted


def test_the_width_of_an_image_is_no_number_of_features() -> None:
    model, inputs = zoo.build("efficientnet")
    found = discover(model, (), inputs)
    assert found.places == ()
    assert found.refusals == ()


def test_targets_of_one_token_are_enough() -> None:
    model, inputs = zoo.build("t5")
    inputs["labels"] = inputs["labels"][:, :1]
    assert find_structure(model, inputs).refusals == ()


def test_one_degenerate_layer_does_not_condemn_its_kind() -> None:
    model, inputs = zoo.build("bert")
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.dense.weight.zero_()
        layer.output.dense.weight.zero_()
    structure = find_structure(model, inputs)
    assert len(structure.axes) == 6


def test_dead_neurons_are_probed_in_another_layer() -> None:
    model, inputs = zoo.build("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias.fill_(-1e3)
    assert len(find_structure(model, inputs).axes) == 6


def test_padding_on_the_left_hides_nothing() -> None:
    model, inputs = zoo.build("llama")
    ids = torch.nn.functional.pad(inputs["input_ids"], (20, 0))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (20, 0))
    structure = find_structure(model, {"input_ids": ids, "attention_mask": mask})
    assert len(structure.axes) == 9
    assert structure.refusals == ()


def test_an_ffn_as_wide_as_the_model_is_not_refused_by_mistake() -> None:
    model, inputs = zoo.build("llama", intermediate_size=64)
    structure = find_structure(model, inputs)
    assert structure.refusals == ()
    assert len(structure.axes) == 9


def test_a_batch_that_the_model_cannot_run_is_named() -> None:
    model, inputs = zoo.build("t5")
    del inputs["labels"]
    with pytest.raises(DataError, match="T5ForConditionalGeneration cannot run a batch of"):
        find_structure(model, inputs)


def test_layers_that_are_all_degenerate_are_proved_with_drawn_values() -> None:
    model, inputs = zoo.build("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.zero_()
            layer.output.dense.weight.zero_()
    assert len(find_structure(model, inputs).axes) == 6
    assert not any(layer.output.dense.weight.any() for layer in model.bert.encoder.layer)


def test_a_model_without_provable_axes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build("bert")
    for outcome, reason in (((0.5, 1.0), "differs from masked"), ((0.0, 0.0), "has no effect")):
        monkeypatch.setattr(Trial, "compared", lambda *_, found=outcome, **__: found)
        with pytest.raises(StructureError, match=f"none can be pruned with proof.*{reason}"):
            find_structure(model, inputs)


class _Experts(nn.Module):
    """Two experts whose matrices are in one tensor, beside an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btd,edi->bti", x, self.up)


def test_a_tensor_of_several_matrices_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 16)
            self.outer = nn.Linear(16, 8)
            self.experts = _Experts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts(x + self.outer(torch.tanh(self.inner(x))))

    structure = find_structure(Model().eval(), {"x": torch.randn(2, 3, 8)})
    assert [axis.name for axis in structure.axes] == ["outer:neurons"]
    reasons = {refusal.module: refusal.reason for refusal in structure.refusals}
    assert "one tensor holds several matrices" in reasons["experts"]
