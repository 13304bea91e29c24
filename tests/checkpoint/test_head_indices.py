"""Heads that a generation config names are counted anew; word timestamps work after a cut."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
import zoo

from hf_gradnas import GradNASPruner, Plan
from hf_gradnas.checkpoint.head_indices import renumber_heads
from hf_gradnas.errors import GradNASWarning
from hf_gradnas.types import Axis, Kind, Tap

PATH = "model.decoder.layers.{}.encoder_attn:heads"
PAIRS = [[0, 1], [1, 0], [1, 3], [2, 2]]


def whisper(**options: Any) -> tuple[GradNASPruner, dict[str, Any]]:
    model, inputs = zoo.build("whisper", dtype=torch.float32)
    model.generation_config.alignment_heads = [list(pair) for pair in PAIRS]
    model.generation_config._from_model_config = False  # as one that was read from a file
    pruner = GradNASPruner(model, layout="per_layer", **options)
    pruner.discover(inputs)
    return pruner, inputs


def plan_of(pruner: GradNASPruner, **kept: tuple[int, ...]) -> Plan:
    """A plan that keeps all but in the cross-attentions that are named, as ``_1=(0, 3)``."""
    axes = pruner.structure.axes
    names = {PATH.format(layer.removeprefix("_")): units for layer, units in kept.items()}
    assert names.keys() <= {axis.name for axis in axes}
    units = {axis.name: names.get(axis.name, tuple(range(axis.size))) for axis in axes}
    return Plan(units, {axis.name: axis.size for axis in axes}, "per_layer")


def timestamps(model: Any, inputs: dict[str, Any], pairs: Any) -> torch.Tensor:
    """Times of the tokens that a greedy search finds, as ``generate`` computes them for words."""
    ids = torch.ones(4, 1, dtype=torch.long)
    found = tf.GenerationMixin.generate(
        model, inputs["input_features"], decoder_input_ids=ids, max_new_tokens=6,
        output_attentions=True, return_dict_in_generate=True, do_sample=False,
    )  # fmt: skip
    return model._extract_token_timestamps(found, pairs, num_frames=40, num_input_ids=1)


@pytest.mark.leaves_state
def test_kept_heads_are_counted_anew_and_give_the_same_times(tmp_path: Path) -> None:
    pruner, inputs = whisper()
    plan = plan_of(pruner, _0=(1, 2), _1=(0, 2, 3), _2=(2,))
    with pruner.masked(plan):
        expected = timestamps(pruner.model, inputs, PAIRS)
    model = pruner.apply(plan)
    found = model.generation_config.alignment_heads
    assert found == [[0, 0], [1, 0], [1, 2], [2, 0]]
    assert torch.equal(timestamps(model, inputs, found), expected)
    saved = pruner.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(saved, attn_implementation="eager").eval()
    assert again.generation_config.alignment_heads == found
    assert torch.equal(timestamps(again, inputs, found), expected)


@pytest.mark.leaves_state
def test_a_head_that_is_gone_is_taken_out_with_a_warning() -> None:
    pruner, inputs = whisper()
    with pytest.warns(GradNASWarning, match=r"loses \[\[1, 3\]\].*keeps 3 of 4.*encoder_attn"):
        model = pruner.apply(plan_of(pruner, _1=(0, 1)))
    assert model.generation_config.alignment_heads == [[0, 1], [1, 0], [2, 2]]
    timestamps(model, inputs, model.generation_config.alignment_heads)


@pytest.mark.leaves_state
@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ({"_0": ()}, r"since model.decoder.layers.0.encoder_attn lost all its heads"),
        ({"_0": (0,), "_1": (1,), "_2": (0,)}, "since they were all cut"),
    ],
)
def test_where_no_time_can_be_found_the_key_goes(kept: Any, why: str, tmp_path: Path) -> None:
    pruner, _ = whisper()
    with pytest.warns(GradNASWarning, match=why):
        model = pruner.apply(plan_of(pruner, **kept))
    assert not hasattr(model.generation_config, "alignment_heads")
    saved = pruner.save_pretrained(tmp_path / "out")
    assert not hasattr(tf.GenerationConfig.from_pretrained(saved), "alignment_heads")


@pytest.mark.parametrize("value", [None, [], "x", [[0]], [[0, 1.5]], {"a": 1}])
def test_what_is_no_list_of_pairs_stays_as_it_is(value: Any) -> None:
    axis = Axis(
        PATH.format(0), PATH.format(0).partition(":")[0], Kind.HEADS, 4, (), (Tap("", "input", -1),)
    )
    model = SimpleNamespace(generation_config=SimpleNamespace(alignment_heads=value))
    renumber_heads(model, [axis], {axis.name: (1,)})
    assert model.generation_config.alignment_heads == value
    renumber_heads(SimpleNamespace(generation_config=None), [axis], {})
