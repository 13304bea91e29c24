"""Copies of weights without the neurons that go: the same as masks, or none."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from hf_gradnas import Plan
from hf_gradnas.masks import masked
from hf_gradnas.repair import first, least_squares
from hf_gradnas.repair.first import Narrow, find_narrow, pruned
from hf_gradnas.repair.least_squares import find_repair
from hf_gradnas.types import Kind
from hf_gradnas.verification import find_structure


def uneven(family):
    """A tiny float64 model, its batch and axes, and units that stay: other counts in each layer."""
    model, batch = zoo.build(family)
    axes = find_structure(model, batch).axes
    kept = {}
    for number, axis in enumerate(axes):
        count = max(axis.size // 2 - 3 * number, 2) if axis.kind is Kind.NEURONS else axis.size
        kept[axis.name] = tuple(range(axis.size))[-count:]
    return model, batch, axes, kept


def output_of(model, batch):
    with torch.no_grad():
        return model(**batch)[1] if "labels" in batch else model(**batch)[0]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_model_with_copies_puts_out_what_it_does_with_masks(family):
    with zoo.float64_throughout():
        model, batch, axes, kept = uneven(family)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = find_narrow(model, axes, kept, lambda: model(**batch))
        with masked(model, axes, kept):
            wanted = output_of(model, batch)
        with pruned(model, axes, kept, found):
            torch.testing.assert_close(output_of(model, batch), wanted, rtol=1e-10, atol=1e-12)
        plain = output_of(model, batch)
    assert found.axes == {axis.name for axis in axes if axis.kind is Kind.NEURONS}
    assert not found.axes & found.masks(kept).keys()
    assert (plain - wanted).abs().max() > 1e-6
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    widths = {len(rows) for dims in found.rows.values() for rows in dims.values()}
    assert len(widths) > 1
    for name, copy in found.weights.items():
        assert torch.equal(found.part(name, before[name]), copy)
        assert copy.numel() < before[name].numel()


def test_layers_that_keep_their_size_beside_their_weight_are_left_as_they_are():
    """A ``Conv1D`` gives its output a shape by it."""
    with zoo.float64_throughout():
        model, batch, axes, kept = uneven("gpt2")
        assert find_narrow(model, axes, kept, lambda: model(**batch)) == Narrow()


@pytest.mark.parametrize("fault", ["other values", "an error"])
def test_a_model_that_counts_its_neurons_elsewhere_has_none(fault):
    """Code between the layers may know the whole number of them."""
    with zoo.float64_throughout():
        model, batch, axes, kept = uneven("bert")
        intermediate = model.bert.encoder.layer[1].intermediate
        width = intermediate.dense.out_features
        plain = intermediate.forward

        def forward(hidden):
            x = plain(hidden)
            return x.view(*x.shape[:-1], width) if fault == "an error" else x * x.shape[-1] / width

        intermediate.forward = forward
        try:
            found = find_narrow(model, axes, kept, lambda: model(**batch))
        finally:
            del intermediate.forward
        assert found == Narrow()
        assert all(p.shape[0] for p in model.parameters())


def test_layers_that_are_in_part_of_another_axis_are_left_as_they_are():
    """Their outputs are split by sizes."""
    with zoo.float64_throughout():
        model, _, axes, kept = uneven("bert")
        axis = next(axis for axis in axes if axis.kind is Kind.NEURONS)
        name = next(part.tensor for part in axis.slices if part.dim == 0)
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight[:2]]))
        assert not first._rows_of(model, axis, kept)


def test_there_is_room_for_some_only(monkeypatch):
    with zoo.float64_throughout():
        model, batch, axes, kept = uneven("bert")
        whole = find_narrow(model, axes, kept, lambda: model(**batch))
        size = sum(tensor.nbytes for tensor in whole.weights.values())
        monkeypatch.setattr(first, "MOST_BYTES", size - 1)
        found = find_narrow(model, axes, kept, lambda: model(**batch))
    assert found.axes
    assert found.axes < whole.axes
    assert sum(tensor.nbytes for tensor in found.weights.values()) < size
    neurons = next(axis for axis in axes if axis.kind is Kind.NEURONS)
    assert neurons.name in found.axes


def test_what_is_compared_alone_keeps_its_whole_input():
    with zoo.float64_throughout():
        model, batch, axes, kept = uneven("bert")
        paths = [axis.taps[0].module for axis in axes if axis.kind is Kind.NEURONS]
        found = find_narrow(model, axes, kept, lambda: model(**batch), but_at=paths[:1])
    assert len(found.axes) == len(paths) - 1


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_repair_is_the_same_with_masks_alone(family, monkeypatch):
    with zoo.float64_throughout():
        model, batch, axes, kept = uneven(family)
        plan = Plan(kept, {axis.name: axis.size for axis in axes}, layout="per_layer")
        batches = [{name: value.roll(n, -1) for name, value in batch.items()} for n in range(5)]
        batches = [{**each, "attention_mask": batch["attention_mask"]} for each in batches]
        found = find_repair(model, axes, plan, batches)
        monkeypatch.setattr(least_squares, "first_narrow", lambda *_: Narrow())
        wanted = find_repair(model, axes, plan, batches)
    assert found.kl_after == pytest.approx(wanted.kl_after, rel=1e-6)
    assert found.kl_before == pytest.approx(wanted.kl_before, rel=1e-9)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-6, atol=1e-8)
