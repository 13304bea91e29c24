"""Attentions that differ from the usual one in a single respect, one kind a test."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from hf_gradnas.masks import masked
from hf_gradnas.surgery.cut import cut
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


def heads_of(structure: Structure) -> list[Axis]:
    return [axis for axis in structure.axes if axis.kind is Kind.HEADS]


def check_a_cut(model: nn.Module, inputs: dict, structure: Structure, kept: dict) -> nn.Module:
    """Masked equals cut on the whole model, which the mask changes; returns the cut model."""
    with torch.no_grad():
        whole = model(**inputs)[0]
        with masked(model, structure.axes, kept):
            wanted = model(**inputs)[0]
        smaller = copy.deepcopy(model)
        cut(smaller, structure.axes, kept)
        result = smaller(**inputs)[0]
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
