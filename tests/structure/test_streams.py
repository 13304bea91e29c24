"""Streams of values inside of a layer, which several modules read and write."""

from __future__ import annotations

import pytest
import torch
import transformers
import zoo

from hf_gradnas.errors import StructureError
from hf_gradnas.masks import masked
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Kind
from hf_gradnas.verification import find_structure


def test_the_narrow_stream_of_a_mobilebert_layer_is_cut_with_its_elementwise_norms():
    config = transformers.MobileBertConfig(
        vocab_size=60,
        hidden_size=24,
        embedding_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        true_hidden_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
    )
    torch.manual_seed(0)
    model = transformers.MobileBertModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    inputs = {"input_ids": torch.randint(3, 60, (2, 9))}
    structure = find_structure(model, inputs)
    axes = [a for a in structure.axes if a.taps[0].module.endswith("output.bottleneck.dense")]
    assert [axis.size for axis in axes] == [16, 16]
    readers = {tap.module for tap in axes[0].taps}
    inside = "encoder.layer.0"
    assert readers == {
        f"{inside}.output.bottleneck.dense",
        f"{inside}.intermediate.dense",
        f"{inside}.ffn.0.intermediate.dense",
    }
    kept = {axis.name: [u for u in range(16) if (u + i) % 3] for i, axis in enumerate(axes)}
    others = [a for a in structure.axes if a.kind is Kind.NEURONS and a not in axes]
    kept |= {axis.name: [u for u in range(axis.size) if u % 4] for axis in others}
    with torch.no_grad(), zoo.float64_throughout(), masked(model, structure.axes, kept):
        expected = model(**inputs).last_hidden_state
    cut(model, structure.axes, kept)
    with torch.no_grad(), zoo.float64_throughout():
        found = model(**inputs).last_hidden_state
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    ("groups", "reason"),
    [(1, "all values that it reads go together"), (2, "mixer.norm is a norm across them")],
)
def test_values_that_a_norm_ties_together_are_refused_by_name(groups, reason):
    config = transformers.Mamba2Config(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=8,
        expand=2,
        state_size=4,
        n_groups=groups,
        chunk_size=4,
    )
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(config).eval()
    with pytest.raises(StructureError, match=rf"mixer\.out_proj neurons: \S*{reason}"):
        find_structure(model, {"input_ids": torch.randint(3, 60, (2, 9))})
